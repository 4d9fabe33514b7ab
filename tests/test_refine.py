"""Refinement on scenes whose cameras are known, and on real ones whose cameras were disturbed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from disturb import disturbed, generator
from posed import SIZE, arc, noisy, tracks_of

from vggt_cli.errors import GeometryError
from vggt_cli.formats import adjust
from vggt_cli.formats.colmap_read import read
from vggt_cli.geometry import keep_points
from vggt_cli.learning.metrics import auc, relative_pose_errors
from vggt_cli.reconstruction.refine import Refined, RefineOptions, refine
from vggt_cli.scene import Cameras, Setup, Tracks

pytestmark = pytest.mark.colmap
BA, SFM, AUTO = RefineOptions("ba"), RefineOptions("sfm"), RefineOptions("auto")


def worst_pair(found: Cameras, true: Cameras) -> float:
    """Degrees, of rotation or direction of translation."""
    rotation, direction = relative_pose_errors(found.extrinsics, true.extrinsics)
    return float(torch.maximum(rotation, direction).max())


def median_baseline(cameras: Cameras) -> float:
    centers = cameras.centers.double()
    i, j = torch.triu_indices(len(centers), len(centers), 1)
    return float((centers[i] - centers[j]).norm(dim=-1).quantile(0.5))


def without_tracks(tracks: Tracks, frame: int) -> Tracks:
    """The same where nothing is seen in `frame`."""
    rows = tracks.frame != frame
    return Tracks(tracks.xyz, tracks.point[rows], tracks.frame[rows], tracks.xy[rows])


def scrambled(tracks: Tracks, frame: int) -> Tracks:
    """The same with the observations in `frame` exchanged at random."""
    rows = (tracks.frame == frame).nonzero()[:, 0]
    xy = tracks.xy.clone()
    xy[rows] = xy[rows[torch.randperm(len(rows), generator=generator(0))]]
    return Tracks(tracks.xyz, tracks.point, tracks.frame, xy)


@pytest.fixture(scope="module")
def true() -> Cameras:
    return arc(6)


@pytest.fixture(scope="module")
def exact(true: Cameras) -> Tracks:
    return tracks_of(true, 240)


@pytest.fixture(scope="module")
def adjusted(true: Cameras, exact: Tracks) -> tuple[Cameras, Refined]:
    start = disturbed(true, 5, 0.1, focal=0.03)
    return start, refine(start, exact, [0] * 6, BA)


def test_exact_tracks_bring_disturbed_cameras_back(
    true: Cameras, adjusted: tuple[Cameras, Refined]
) -> None:
    start, refined = adjusted
    assert worst_pair(start, true) > 5
    assert refined.verdict.method == "ba", refined.verdict.words
    assert worst_pair(refined.cameras, true) < 0.02
    focal = refined.cameras.intrinsics[:, 0, 0]
    torch.testing.assert_close(focal, torch.full_like(focal, 560.0), rtol=2e-4, atol=0)
    assert not refined.radial.any()
    assert all(image.outcome == "kept" and image.after < 0.05 for image in refined.images)


def test_cameras_that_explain_next_to_nothing_are_not_taken(true: Cameras, exact: Tracks) -> None:
    start = disturbed(true, 10, 0.2, seed=1)
    verdict = refine(start, noisy(exact, pixels=0.3, wrong=0.6), [0] * 6, BA).verdict
    assert verdict.method == "none"
    before, after = re.findall(r"([0-9.]+) % of", verdict.words)
    assert float(before) < float(after) < 20, verdict.words  # better, and still chance


def test_the_first_frame_and_the_scale_of_the_prediction_stay(
    adjusted: tuple[Cameras, Refined],
) -> None:
    start, refined = adjusted
    assert torch.equal(refined.cameras.extrinsics[0], start.extrinsics[0])
    assert median_baseline(refined.cameras) == pytest.approx(median_baseline(start), rel=0.05)


def test_the_points_of_the_result_are_those_of_its_cameras(
    true: Cameras, adjusted: tuple[Cameras, Refined], exact: Tracks
) -> None:
    _, refined = adjusted
    scale = median_baseline(refined.cameras) / median_baseline(true)
    assert len(refined.tracks.xyz) > 0.9 * len(exact.xyz)
    near = torch.cdist(refined.tracks.xyz / scale, exact.xyz).amin(1)
    assert float(near.quantile(0.9)) < 0.01


def test_the_same_input_gives_the_same_cameras(
    adjusted: tuple[Cameras, Refined], exact: Tracks
) -> None:
    start, refined = adjusted
    again = refine(start, exact, [0] * 6, BA)
    assert torch.equal(again.cameras.extrinsics, refined.cameras.extrinsics)
    assert torch.equal(again.cameras.intrinsics, refined.cameras.intrinsics)
    assert torch.equal(again.tracks.xyz, refined.tracks.xyz)


def test_adjustment_never_ends_with_the_points_behind_the_cameras(
    true: Cameras, exact: Tracks
) -> None:
    origin = -true.centers  # the first stays at 0
    extrinsics = torch.cat(
        [true.extrinsics[:, :, :3], -true.extrinsics[:, :, :3] @ origin[..., None]], -1
    )
    mirrored = Cameras(extrinsics, true.intrinsics, true.image_size)
    tracks = Tracks(-exact.xyz, exact.point, exact.frame, exact.xy)
    setup = Setup(mirrored, torch.zeros(6, dtype=torch.float64), (0,) * 6)
    found = adjust.bundle_adjust(setup, tracks, adjust.Adjustment(1.0))
    torch.testing.assert_close(found.cameras.extrinsics, true.extrinsics, rtol=0, atol=1e-3)


def test_noise_and_wrong_observations_cost_little(true: Cameras, exact: Tracks) -> None:
    tracks = noisy(exact, pixels=0.3, wrong=0.15)
    refined = refine(disturbed(true, 5, 0.1, focal=-0.03), tracks, [0] * 6, AUTO)
    assert worst_pair(refined.cameras, true) < 0.3, refined.verdict.words
    assert len(refined.tracks.point) < 0.9 * len(tracks.point)


def test_an_image_whose_predicted_pose_is_wild_is_placed_anew(true: Cameras, exact: Tracks) -> None:
    start = disturbed(true, 2, 0.05)
    wild = disturbed(true, 150, 1.0).extrinsics[3]
    extrinsics = start.extrinsics.clone()
    extrinsics[3] = wild
    bad = Cameras(extrinsics, start.intrinsics, start.image_size)
    refined = refine(bad, exact, [0] * 6, BA)
    assert refined.images[3].outcome == "kept"
    assert worst_pair(refined.cameras, true) < 0.1, refined.verdict.words


def test_an_image_with_wrong_tracks_keeps_its_prediction_and_says_why(
    true: Cameras, exact: Tracks
) -> None:
    start = disturbed(true, 2, 0.05, focal=0.03)
    refined = refine(start, scrambled(exact, 4), [0] * 6, BA)
    others = [0, 1, 2, 3, 5]
    found, right = (
        Cameras(c.extrinsics[others], c.intrinsics[others], c.image_size[others])
        for c in (refined.cameras, true)
    )
    assert worst_pair(found, right) < 0.1, refined.verdict.words
    row = refined.images[4]
    assert row.outcome == "re-aligned"
    assert "observations agree with other images" in row.reason
    assert row.inliers < 0.2 * row.tracks
    assert worst_pair(refined.cameras, true) < 10  # where the prediction had it, not anywhere


def test_a_perfect_prediction_does_not_get_worse(true: Cameras, exact: Tracks) -> None:
    refined = refine(true, noisy(exact, 0.2), [0] * 6, AUTO)
    assert worst_pair(refined.cameras, true) < 0.15
    before, after = refined.verdict.before, refined.verdict.after
    assert before is not None
    assert after is not None
    assert not before.beats(after)


def test_two_photos_are_refined_by_their_matches() -> None:
    true = arc(2, degrees=20)
    tracks = noisy(tracks_of(true, 300), 0.2, wrong=0.05)
    start = disturbed(true, 3, 0.2)
    refined = refine(start, tracks, [0, 0], AUTO)
    assert refined.verdict.before is not None
    assert refined.verdict.before.by == "matches"
    assert worst_pair(refined.cameras, true) < 0.5, refined.verdict.words
    assert median_baseline(refined.cameras) == pytest.approx(median_baseline(start))
    assert torch.equal(refined.cameras.intrinsics, start.intrinsics)


def test_a_hopeless_prediction_is_replaced_by_structure_from_motion(
    true: Cameras, exact: Tracks
) -> None:
    tracks = noisy(exact, 0.2)
    refined = refine(disturbed(true, 100, 1.0), tracks, [0] * 6, AUTO)
    assert worst_pair(refined.cameras, true) < 0.3, refined.verdict.words
    assert torch.equal(refined.cameras.extrinsics[0], torch.eye(3, 4).double())
    again = refine(disturbed(true, 100, 1.0), tracks, [0] * 6, AUTO)
    assert torch.equal(again.cameras.extrinsics, refined.cameras.extrinsics)


def test_an_image_without_tracks_is_no_reason_to_try_structure_from_motion(
    true: Cameras, exact: Tracks, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = adjust.map_images

    def quickly(*arguments: Any) -> Any:
        if "incremental" in arguments:  # 20 s in vain for an image with wrong tracks
            raise GeometryError("left out")
        return mapped(*arguments)

    monkeypatch.setattr(adjust, "map_images", quickly)
    start = disturbed(true, 5, 0.1, focal=0.03)
    alone = refine(start, without_tracks(exact, 5), [0] * 6, AUTO)
    assert alone.verdict.method == "ba"
    assert "sfm" not in alone.verdict.words
    wrong = refine(start, scrambled(exact, 5), [0] * 6, AUTO)
    assert "sfm" in wrong.verdict.words  # that image has tracks: another way may place it


def test_structure_from_motion_leaves_an_image_without_tracks_where_it_was(
    true: Cameras, exact: Tracks
) -> None:
    start = disturbed(true, 2, 0.05)
    refined = refine(start, without_tracks(exact, 5), [0] * 6, SFM)
    assert refined.verdict.method == "sfm", refined.verdict.words
    assert [image.outcome for image in refined.images] == ["kept"] * 5 + ["re-aligned"]
    assert worst_pair(refined.cameras[:5], true[:5]) < 0.1
    assert worst_pair(refined.cameras, true) < 15


@pytest.mark.parametrize(("frames", "radial"), [(6, -0.12), (6, 0.0), (4, -0.12)])
def test_a_radial_term_is_found_where_five_images_share_a_lens_that_has_one(
    frames: int, radial: float
) -> None:
    true = arc(frames)
    tracks = noisy(tracks_of(true, 240, radial=radial), 0.2)
    refined = refine(disturbed(true, 2, 0.05), tracks, [0] * frames, BA)
    if frames < 5 or radial == 0:
        assert not refined.radial.any()
    else:
        assert float((refined.radial - radial).abs().max()) < 0.01
        assert worst_pair(refined.cameras, true) < 0.3


def test_known_intrinsics_stay(true: Cameras, exact: Tracks) -> None:
    intrinsics = true.intrinsics.clone()
    intrinsics[:, 1, 1] *= 1.02  # no square pixels, and still as given
    start = disturbed(Cameras(true.extrinsics, intrinsics, true.image_size), 2, 0.05)
    stretched = exact.xy * torch.tensor([1, 1.02]) + torch.tensor([0, -0.02 * SIZE[0] / 2])
    tracks = Tracks(exact.xyz, exact.point, exact.frame, stretched)
    refined = refine(start, tracks, [0] * 6, RefineOptions("ba", fixed_intrinsics=True))
    assert torch.equal(refined.cameras.intrinsics, start.intrinsics)
    assert worst_pair(refined.cameras, true) < 0.05, refined.verdict.words


def test_each_lens_has_its_own_focal_length() -> None:
    wide, long = arc(6), arc(6, focal=800.0)
    intrinsics = torch.cat([wide.intrinsics[:3], long.intrinsics[3:]])
    true = Cameras(wide.extrinsics, intrinsics, wide.image_size)
    refined = refine(
        disturbed(true, 2, 0.05, focal=0.03), tracks_of(true, 240), [0] * 3 + [1] * 3, BA
    )
    torch.testing.assert_close(refined.cameras.intrinsics, intrinsics, rtol=1e-3, atol=1e-3)


def kept(refined: Refined, start: Cameras) -> bool:
    same = torch.equal(refined.cameras.extrinsics.nan_to_num(), start.extrinsics.nan_to_num())
    rows = all(row.outcome == "predicted" and row.reason for row in refined.images)
    return same and rows and refined.verdict.method == "none"


def test_too_few_tracks_keep_the_prediction(true: Cameras) -> None:
    start = disturbed(true, 2, 0.05)
    refined = refine(start, tracks_of(true, 12), [0] * 6, AUTO)
    assert kept(refined, start)
    assert "too few feature tracks: 12" in refined.verdict.words


def test_no_tracks_at_all_keep_the_prediction(true: Cameras) -> None:
    none, frame = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    nothing = Tracks(torch.zeros(0, 3), none, frame, torch.zeros(0, 2))
    assert kept(refine(true, nothing, [0] * 6, AUTO), true)


def test_tracks_of_one_place_keep_the_prediction(true: Cameras, exact: Tracks) -> None:
    collapsed = Tracks(exact.xyz, exact.point, exact.frame, torch.full_like(exact.xy, 100.0))
    start = disturbed(true, 2, 0.05)
    refined = refine(start, collapsed, [0] * 6, AUTO)
    assert kept(refined, start), refined.verdict.words


def test_photos_taken_from_one_place_keep_the_prediction(true: Cameras, exact: Tracks) -> None:
    """Turning on the spot gives no angle between rays, however well the tracks fit."""
    extrinsics = true.extrinsics.clone()
    extrinsics[:, :, 3] = 0
    spot = Cameras(extrinsics, true.intrinsics, true.image_size)
    tracks = tracks_of(spot, 400)
    start = disturbed(true, 1, 0.02)
    refined = refine(start, tracks, [0] * 6, AUTO)
    assert kept(refined, start), refined.verdict.words


def test_cameras_that_are_no_numbers_are_returned_with_the_reason(
    true: Cameras, exact: Tracks
) -> None:
    extrinsics = true.extrinsics.clone()
    extrinsics[2, 0, 3] = torch.nan
    broken = Cameras(extrinsics, true.intrinsics, true.image_size)
    refined = refine(broken, exact, [0] * 6, AUTO)
    assert kept(refined, broken)
    assert "not finite" in refined.verdict.words


def test_what_pycolmap_cannot_do_keeps_the_prediction(
    true: Cameras, exact: Tracks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise GeometryError("bundle adjustment failed: no memory of any kind")

    monkeypatch.setattr(adjust, "bundle_adjust", fails)
    start = disturbed(true, 2, 0.05)
    refined = refine(start, exact, [0] * 6, AUTO)
    assert kept(refined, start)
    assert "no memory of any kind" in refined.verdict.words


def test_errors_of_pycolmap_are_ours(true: Cameras, exact: Tracks) -> None:
    setup = Setup(true, torch.zeros(6, dtype=torch.float64), (0,) * 6)
    nowhere = Tracks(exact.xyz * torch.nan, exact.point, exact.frame, exact.xy)
    with pytest.raises(GeometryError, match="bundle adjustment"):
        adjust.bundle_adjust(setup, nowhere, adjust.Adjustment(1.0))


def real(shared: Path, name: str) -> tuple[Cameras, Tracks, list[int]]:
    folder = shared / "data" / name / "reference"
    if not folder.is_dir():
        pytest.skip(f"no reference cameras at {folder}")
    model = read(folder)
    return model.cameras, model.tracks, list(model.camera_of_image)


def test_the_cameras_of_a_church_portal_come_back(shared: Path) -> None:
    """Published poses; turned by 5 degrees, moved by 10 % of their extent, focal length 3 % off."""
    true, tracks, group = real(shared, "herzjesu_p8")
    few = keep_points(tracks, torch.arange(len(tracks.xyz)) % 4 == 0)
    start = disturbed(true, 5, 0.1, focal=0.03)
    refined = refine(start, few, group, AUTO)
    assert auc(*relative_pose_errors(start.extrinsics, true.extrinsics), 5) < 20
    assert auc(*relative_pose_errors(refined.cameras.extrinsics, true.extrinsics), 5) >= 90
