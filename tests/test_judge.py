"""What refinement rests on: triangulation, alignment, the judge, and depth that follows."""

import pytest
import torch
from disturb import disturbed, generator, turned
from posed import arc, noisy, tracks_of

from vggt_cli.geometry import invert, keep_points, move, project_tracks
from vggt_cli.reconstruction.align import fit_cameras, hold_first
from vggt_cli.reconstruction.depth import DepthFit, fit, follow
from vggt_cli.reconstruction.judge import Score, epipolar_errors, hold_out, objection, score
from vggt_cli.reconstruction.triangulate import FAR, triangulate
from vggt_cli.scene import Cameras, Setup, Similarity, Tracks


def setup_of(cameras: Cameras, radial: float = 0.0) -> Setup:
    S = len(cameras)
    return Setup(cameras, torch.full((S,), radial, dtype=torch.float64), (0,) * S)


@pytest.mark.parametrize("radial", [0.0, -0.1, 0.1])
def test_exact_tracks_give_their_points(radial: float) -> None:
    true = arc(5)
    tracks = tracks_of(true, 100, radial=radial)
    points = triangulate(tracks, setup_of(true, radial), 2.0)
    torch.testing.assert_close(points.xyz.float(), tracks.xyz, atol=1e-4, rtol=0)
    assert float(points.error.max()) < 0.01
    assert bool(points.good(tracks, 2.0).all())


def test_wrong_observations_neither_move_a_point_nor_agree_with_it() -> None:
    true = arc(8)
    exact = tracks_of(true, 200)
    tracks = noisy(exact, 0.0, wrong=0.2)
    wrong = (tracks.xy - exact.xy).norm(dim=-1) > 20
    right = torch.bincount(exact.point[~wrong], minlength=200) >= 4
    points = triangulate(tracks, setup_of(true), 2.0)
    assert float((points.xyz.float() - exact.xyz)[right].norm(dim=-1).quantile(0.99)) < 1e-3
    good = points.good(tracks, 2.0)
    of_right = right[exact.point]
    assert not bool((good & wrong & of_right).any())
    assert float(good[of_right & ~wrong].double().mean()) > 0.99


def test_points_behind_a_camera_and_rays_without_angle_are_not_good() -> None:
    true = arc(2)
    away = true.extrinsics.clone()
    away[:, :, :3] = turned(180, torch.tensor([[0.0, 1, 0]] * 2).double()) @ away[:, :, :3]
    away[:, :, 3] = -(away[:, :, :3] @ true.centers[..., None])[..., 0]
    tracks = tracks_of(true, 50)
    backwards = triangulate(tracks, setup_of(Cameras(away, true.intrinsics, true.image_size)), 2.0)
    assert bool((backwards.error == FAR).any())
    assert not bool(backwards.good(tracks, 2.0).any())
    close = arc(2, degrees=0.5)
    narrow = tracks_of(close, 50)
    assert not bool(triangulate(narrow, setup_of(close), 2.0).good(narrow, 2.0).any())


def test_the_angle_of_two_rays_is_the_one_between_them() -> None:
    true = arc(2, degrees=30)
    at_origin = torch.tensor([[0.0, 0.0, 5.0]], dtype=torch.float64)
    tracks = Tracks(at_origin, torch.tensor([0, 0]), torch.tensor([0, 1]).int(), torch.zeros(2, 2))
    xy, _ = project_tracks(tracks, true)
    points = triangulate(Tracks(at_origin, tracks.point, tracks.frame, xy), setup_of(true), 2.0)
    a, b = true.centers
    cosine = torch.nn.functional.cosine_similarity(at_origin[0] - a, at_origin[0] - b, dim=0)
    assert float(points.angle[0]) == pytest.approx(float(torch.rad2deg(cosine.acos())), abs=1e-5)


def test_a_third_of_wrong_cameras_does_not_move_the_alignment() -> None:
    source = arc(9).extrinsics
    rotation = turned(70, torch.tensor([[1.0, 2, 3]]).double())[0]
    true = Similarity(2.5, rotation, torch.tensor([1.0, -2, 3]).double())
    target = move(Cameras(source, *_lenses(9)), true).extrinsics
    torch.testing.assert_close(invert(target)[..., 3], true(invert(source)[..., 3]))
    target[6:] = disturbed(Cameras(target, *_lenses(9)), 90, 1.0).extrinsics[6:]
    found = fit_cameras(source, target)
    torch.testing.assert_close(found.rotation, rotation, atol=1e-6, rtol=0)
    assert found.scale == pytest.approx(2.5, rel=1e-6)
    torch.testing.assert_close(found.translation, true.translation, atol=1e-5, rtol=0)


def _lenses(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    cameras = arc(frames)
    return cameras.intrinsics, cameras.image_size


def test_cameras_on_a_line_and_single_ones_are_aligned() -> None:
    source = torch.eye(3, 4).double().repeat(4, 1, 1)
    source[:, 0, 3] = torch.arange(4)
    rotation = turned(40, torch.tensor([[3.0, 1, 0]]).double())[0]
    true = Similarity(1.0, rotation, torch.tensor([0.0, 1, 0]).double())
    for count in (4, 1):
        cameras = Cameras(source[:count], *_lenses(count))
        found = fit_cameras(cameras.extrinsics, move(cameras, true).extrinsics)
        torch.testing.assert_close(found.rotation, rotation)
        torch.testing.assert_close(found.translation, true.translation)


def test_holding_the_first_camera_changes_no_camera_relative_to_it() -> None:
    cameras = arc(4)
    first = disturbed(cameras, 30, 0.5).extrinsics[2]
    held = hold_first(cameras.extrinsics, first)
    assert torch.equal(held[0], first)
    before, after = (
        (invert(e)[..., 3] - invert(e)[0, :, 3]) @ e[0, :, :3].T for e in (cameras.extrinsics, held)
    )
    torch.testing.assert_close(after, before)


def test_a_tenth_of_the_tracks_with_three_views_is_held_out_whole() -> None:
    tracks = tracks_of(arc(5), 300)
    held, rest = hold_out(tracks, seed=3)
    lengths = torch.bincount(tracks.point)
    assert len(held.xyz) == -(-int((lengths >= 3).sum()) // 10)
    assert int(torch.bincount(held.point).min()) >= 3
    assert len(held.point) + len(rest.point) == len(tracks.point)
    both = torch.cat([held.xyz, rest.xyz])
    assert len(both.unique(dim=0)) == len(tracks.xyz)
    again, other = hold_out(tracks, seed=3)[0], hold_out(tracks, seed=4)[0]
    assert torch.equal(held.xy, again.xy)
    assert not torch.equal(held.xyz, other.xyz)


def test_matches_are_held_out_where_next_to_no_track_has_three_views() -> None:
    tracks = tracks_of(arc(3), 300)
    lengths = torch.bincount(tracks.point)
    few = (lengths == 2) | ((lengths >= 3).cumsum(0) <= 5)
    held, rest = hold_out(keep_points(tracks, few), seed=0)
    assert len(held.point) == 2 * len(held.xyz) > 0
    assert int((torch.bincount(rest.point) >= 3).sum()) == 5
    assert score(setup_of(arc(3)), held).by == "matches"


def test_true_cameras_score_full_marks_and_disturbed_ones_few() -> None:
    true = arc(6)
    held, _ = hold_out(tracks_of(true, 600), seed=0)
    best = score(setup_of(true), held)
    assert best.share == 1.0
    assert best.median < 0.01
    worse = score(setup_of(disturbed(true, 3, 0.1)), held)
    assert worse.share < 0.5
    assert worse.observations == best.observations == len(held.point)
    assert best.beats(worse)
    assert not worse.beats(best)


def test_among_equal_shares_the_smaller_median_wins() -> None:
    assert Score(0.951, 0.3, 100).beats(Score(0.953, 0.4, 100))
    assert not Score(0.94, 0.1, 100).beats(Score(0.953, 0.4, 100))
    assert not Score(0.95, 0.3, 100).beats(Score(0.95, 0.3, 100))


def test_the_epipolar_error_of_a_side_by_side_pair_is_the_difference_in_height() -> None:
    """Epipolar lines are the rows; 640 pixels wide, one pixel counts 1.6 at 1024."""
    extrinsics = torch.eye(3, 4).double().repeat(2, 1, 1)
    extrinsics[1, 0, 3] = -1
    pair = Cameras(extrinsics, *_lenses(2))
    xy = torch.tensor([[300.0, 200], [250, 203], [100, 50], [90, 50]])
    index = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]).int()
    errors = epipolar_errors(Tracks(torch.zeros(2, 3), *index, xy), setup_of(pair))
    torch.testing.assert_close(errors, torch.tensor([3 * 1.6, 0.0]).double())


def test_guards_name_focal_lengths_and_collapsed_cameras() -> None:
    true = arc(4)
    predicted = setup_of(true)
    assert objection(predicted, predicted) == ""
    intrinsics = true.intrinsics.clone()
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 3 * 560.0
    long = setup_of(Cameras(true.extrinsics, intrinsics, true.image_size))
    assert "focal length of 1680 px is 3.00" in objection(long, predicted)
    agrees = torch.full((4,), 1600.0)
    assert objection(long, predicted, agrees) == ""
    assert objection(long, predicted, torch.full((4,), torch.nan)) != ""
    collapsed = true.extrinsics.clone()
    collapsed[:, :, 3] = 0.05 * collapsed[:, :, 3]
    spot = setup_of(Cameras(collapsed, true.intrinsics, true.image_size))
    assert "0.050 of their predicted extent" in objection(spot, predicted)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_scale_and_shift_of_depth_are_found_among_wrong_points(shift: float) -> None:
    g = generator(0)
    predicted = 1 + 3 * torch.rand(300, generator=g, dtype=torch.float64)
    refined = 2.5 * predicted + shift
    refined[:90] *= 1 + torch.rand(90, generator=g, dtype=torch.float64)
    found = fit(predicted, refined)
    assert found.scale == pytest.approx(2.5, rel=1e-3)
    assert found.shift == pytest.approx(shift, abs=1e-2)
    assert not found.disagrees


def test_a_shift_that_would_put_depth_behind_the_camera_is_not_taken() -> None:
    predicted = torch.linspace(2, 4, 100).double()
    assert fit(predicted, 2 * predicted - 1, lowest=0.4).shift == 0
    assert fit(predicted, 2 * predicted - 1, lowest=1.0).shift == pytest.approx(-1, abs=1e-3)


def test_depth_maps_follow_the_points_and_frames_that_disagree_say_so() -> None:
    cameras = arc(4)
    tracks = tracks_of(cameras, 300)
    S, H, W = 4, 120, 160
    source_from_network = torch.diag(torch.tensor([4.0, 4, 1])).double().repeat(S, 1, 1)
    xy, z = project_tracks(tracks, cameras)
    depth = torch.full((S, H, W), 5.0)
    column, row = (xy / 4).floor().long().unbind(-1)
    depth[tracks.frame.long(), row, column] = (z / 2).float()  # half of what the points say
    depth[2] = torch.rand(H, W, generator=generator(1)) * 20 + 0.1
    seen = tracks.frame != 3
    point = tracks.point[seen].unique(return_inverse=True)
    few = Tracks(tracks.xyz[point[0]], point[1], tracks.frame[seen], tracks.xy[seen])
    followed, fits = follow(depth, few, cameras, source_from_network)
    for i in (0, 1, 3):
        assert fits[i].scale == pytest.approx(2, rel=0.02), i
        torch.testing.assert_close(followed[i], depth[i] * fits[i].scale + fits[i].shift)
    assert [f.disagrees for f in fits] == [False, False, True, False]
    assert fits[3].points == 0


def test_depth_without_any_point_stays() -> None:
    assert fit(torch.zeros(0), torch.zeros(0)).points == 0
    nothing = Tracks(
        torch.zeros(0, 3),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(0, 2),
    )
    depth = torch.ones(2, 4, 6)
    same, fits = follow(depth, nothing, arc(2), torch.eye(3).double().repeat(2, 1, 1))
    assert torch.equal(same, depth)
    assert all(isinstance(f, DepthFit) and f.scale == 1 for f in fits)
