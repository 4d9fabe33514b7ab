"""Fusion: which pixels become points, what they observe, and the two laws with true depth."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from wall import EVERYTHING, H, S, W, wall

from vggt_cli.errors import GeometryError
from vggt_cli.formats import room
from vggt_cli.geometry import project, project_tracks, surface_normals, unproject
from vggt_cli.reconstruction import fuse as fuse_module
from vggt_cli.reconstruction import trust
from vggt_cli.reconstruction.fuse import (
    AGREEMENT,
    _in_blocks,
    _Seeds,
    _seen,
    _thin_out,
    fuse,
)
from vggt_cli.reconstruction.trust import confident_pixels, depth_edges
from vggt_cli.scene import PointCloud, Prediction


def lengths(cloud: PointCloud) -> Tensor:
    assert cloud.observations is not None
    return torch.bincount(cloud.observations.point, minlength=len(cloud))


def test_pixels_that_see_one_place_become_one_point_with_all_of_them() -> None:
    cloud = fuse(*wall(), EVERYTHING)
    assert_close(cloud.xyz[:, 2], torch.full_like(cloud.xyz[:, 2], 2))
    inside = (cloud.xyz[:, 0] > -1 / 30 * 2 * 4) & (cloud.xyz[:, 0] < 0.6)
    assert (lengths(cloud)[inside] == S).all()
    # Four frames of 24 x 32 pixels show 24 x 44 places.
    assert 0.7 * H * (W + 12) < len(cloud) < 1.3 * H * (W + 12)


def test_an_observation_is_a_pixel_centre_of_the_source_near_the_projection() -> None:
    prediction, images = wall()
    cloud = fuse(prediction, images, EVERYTHING)
    tracks = cloud.observations
    assert tracks is not None
    in_network = tracks.xy / 2
    assert_close(in_network % 1, torch.full_like(in_network, 0.5))
    xy, z = project_tracks(tracks, prediction.cameras)
    assert (xy - in_network).abs().max() <= 1
    assert (z - 2).abs().max() <= AGREEMENT * 2
    pairs = torch.stack([tracks.point, tracks.frame.long()], -1)
    assert len(pairs.unique(dim=0)) == len(pairs)  # at most one pixel per frame
    assert (tracks.point.diff() >= 0).all()


def seeds(count: int, footprint: float = 1.0) -> _Seeds:
    """Seeds on the walls of a cube of side 2, of a random confidence."""
    random = torch.Generator().manual_seed(0)
    xyz = 2 * torch.rand(3, count, generator=random) - 1
    xyz[torch.randint(3, (count,), generator=random), torch.arange(count)] = 0.99
    confidence = 1 + torch.randperm(count, generator=random) / 2**12
    size = torch.full((count,), footprint)
    return _Seeds(xyz, confidence, size, torch.zeros(count, dtype=torch.int32), torch.arange(count))


def test_the_surest_seed_of_each_voxel_stays() -> None:
    given = seeds(3000, 1 / 16)
    surest: dict[tuple[float, ...], int] = {}
    for i in given.confidence.argsort().tolist():
        surest[tuple((given.xyz[:, i] * 16).floor().tolist())] = i
    with ThreadPoolExecutor(2) as pool:
        kept = _thin_out(given, 3000, pool)
    assert kept.pixel.tolist() == sorted(surest.values())


@pytest.mark.parametrize("budget", [500, 5000])
def test_counting_some_of_the_voxels_is_enough_for_the_budget(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse_module, "COUNTED", 250)
    with ThreadPoolExecutor(2) as pool:
        kept = _thin_out(seeds(20_000, 1e-4), budget, pool)
    assert 0.85 * budget <= len(kept.pixel) <= budget
    assert (kept.pixel.diff() > 0).all()


def test_a_frame_sees_the_points_that_project_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_module, "BLOCK", 16)
    prediction, _ = wall()
    xyz = 3 * seeds(1000).xyz[:, seeds(1000).xyz[0].argsort()]
    looked_at = 0
    for frame, turn in enumerate(torch.linspace(0, 5, S)):
        c, s = turn.cos(), turn.sin()
        rotation = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        prediction.cameras.extrinsics[frame, :, :3] = rotation
        K, E = prediction.cameras.intrinsics[frame], prediction.cameras.extrinsics[frame]
        xy, z = project(xyz.T[None], K, E)
        x, y = xy[0].unbind(-1)
        expected = (z[0] > 0) & (x >= 0) & (y >= 0) & (x < W) & (y < H)
        point, pixel, depth = _seen(_in_blocks(xyz), prediction, frame)
        assert torch.equal(point, expected.nonzero()[:, 0])
        assert torch.equal(pixel, (y.long() * W + x.long())[expected])
        assert_close(depth, z[0, expected])
        looked_at += len(point)
    assert looked_at > 100


@pytest.mark.parametrize("budget", [1, 10, 100, 400])
def test_the_budget_is_kept_and_used(budget: int) -> None:
    cloud = fuse(*wall(), dataclasses.replace(EVERYTHING, points=budget))
    assert 0.5 * budget <= len(cloud) <= budget


def test_the_same_seed_gives_the_same_cloud() -> None:
    options = dataclasses.replace(EVERYTHING, points=50)
    first, second = (fuse(*wall(), options) for _ in range(2))
    assert torch.equal(first.xyz, second.xyz)
    other = fuse(*wall(), dataclasses.replace(options, seed=1))
    assert not torch.equal(first.xyz[:20], other.xyz[:20])


def test_confidence_is_a_percentile_of_the_valid_pixels() -> None:
    prediction, images = wall()
    cloud = fuse(prediction, images, dataclasses.replace(EVERYTHING, confidence=80), observe=False)
    assert cloud.confidence.min() >= prediction.confidence.quantile(0.8) - 1e-6
    scaled = dataclasses.replace(prediction, confidence=prediction.confidence * 1e-3)
    again = fuse(scaled, images, dataclasses.replace(EVERYTHING, confidence=80), observe=False)
    assert torch.equal(again.xyz, cloud.xyz)  # never an absolute threshold


def test_padding_and_unusable_depth_become_no_points() -> None:
    prediction, images = wall()
    valid = images.valid.clone()
    valid[:, :, : W // 2] = False
    prediction.depth[1, :5] = float("nan")
    prediction.depth[2, :5] = float("inf")
    prediction.depth[3, :5] = 0
    cloud = fuse(prediction, dataclasses.replace(images, valid=valid), EVERYTHING)
    assert cloud.xyz.isfinite().all()
    tracks = cloud.observations
    assert tracks is not None
    assert (tracks.xy[:, 0] > W).all()
    assert (tracks.xy[tracks.frame > 0][:, 1] > 10).all()


def test_no_usable_pixel_is_an_error_with_the_confidence() -> None:
    prediction, images = wall()
    with pytest.raises(GeometryError, match=r"confidence 1 to 2"):
        fuse(
            prediction,
            dataclasses.replace(images, valid=torch.zeros_like(images.valid)),
            EVERYTHING,
        )


def test_a_point_that_most_frames_look_through_is_dropped() -> None:
    prediction, images = wall()
    prediction.depth[0, 10:14, 24:28] = 1.0  # three frames see the wall behind it
    cloud = fuse(prediction, images, EVERYTHING)
    assert cloud.xyz[:, 2].min() > 1.9


def test_frames_that_contradict_each_other_everywhere_still_give_points() -> None:
    prediction, images = wall()
    for frame in range(S):
        prediction.depth[frame] *= 1 + frame
    assert len(fuse(prediction, images, EVERYTHING)) > 0


def test_the_nearer_of_two_surfaces_is_no_observation_of_the_farther() -> None:
    prediction, images = wall()
    prediction.depth[1, 8:16, 8:16] = 1.0
    cloud = fuse(prediction, images, EVERYTHING)
    tracks = cloud.observations
    assert tracks is not None
    _, z = project_tracks(tracks, prediction.cameras)
    column, row = (tracks.xy / 2).long().unbind(-1)
    own = prediction.depth[tracks.frame.long(), row, column]
    assert ((own / z - 1).abs() <= AGREEMENT + 1e-6).all()


def test_depth_edges_mark_both_sides_of_a_step_and_no_slope() -> None:
    depth, everywhere = torch.full((1, 6, 8), 2.0), torch.ones(1, 6, 8, dtype=torch.bool)
    depth[:, :, 4:] = 3.0
    expected = torch.zeros(1, 6, 8, dtype=torch.bool)
    expected[:, :, 3:5] = True
    assert torch.equal(depth_edges(depth, everywhere), expected)
    slope = torch.linspace(2, 2.1, 8).expand(1, 6, 8)
    assert not depth_edges(slope, everywhere).any()


def test_a_rough_depth_map_keeps_most_of_its_pixels_and_loses_its_steps() -> None:
    random = torch.Generator().manual_seed(0)
    depth = 2 + 0.1 * torch.rand(1, 40, 60, generator=random)
    depth[:, :, 30:] += 2
    edges = depth_edges(depth, torch.ones_like(depth, dtype=torch.bool))
    assert edges[:, :, 29:31].all()
    assert edges.float().mean() < 0.1


def test_normals_of_a_wall_point_to_the_camera() -> None:
    prediction, images = wall()
    cloud = fuse(prediction, images, EVERYTHING)
    assert_close(cloud.normals, torch.tensor([0.0, 0, -1]).expand_as(cloud.normals))
    one_pixel = surface_normals(torch.ones(1, 1, 3), torch.zeros(3))
    assert_close(one_pixel.norm(dim=-1), torch.ones(1, 1))


def test_colours_are_those_of_the_seed_pixels() -> None:
    prediction, images = wall()
    images.pixels[:] = torch.tensor([0.0, 0.5, 1.0])[:, None, None]
    cloud = fuse(prediction, images, EVERYTHING)
    assert cloud.rgb.unique(dim=0).tolist() == [[0, 128, 255]]


def test_one_frame_alone_is_enough() -> None:
    prediction, images = wall()
    first = Prediction(prediction.cameras[:1], prediction.depth[:1], prediction.confidence[:1])
    cloud = fuse(first, images[:1], EVERYTHING)
    assert (lengths(cloud) == 1).all()
    assert len(cloud) > 0.5 * H * W


def test_how_many_frames_are_looked_at_at_once_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = dataclasses.replace(EVERYTHING, confidence=30)
    whole = fuse(*wall(), options)
    monkeypatch.setattr(room, "AT_ONCE", 1)
    monkeypatch.setattr(fuse_module, "AHEAD", 1)
    monkeypatch.setattr(fuse_module, "IN_CACHE", 7)
    monkeypatch.setattr(fuse_module, "BLOCK", 3)
    again = fuse(*wall(), options)
    assert torch.equal(again.xyz, whole.xyz)
    assert again.observations is not None
    assert whole.observations is not None
    assert torch.equal(again.observations.point, whole.observations.point)
    assert torch.equal(again.observations.xy, whole.observations.xy)


def test_edges_are_where_the_windows_of_a_pooling_differ() -> None:
    random = torch.Generator().manual_seed(0)
    depth = 2 + 0.05 * torch.randn(3, 9, 11, generator=random)
    depth[1, 4, 4] = torch.nan
    padded = F.pad(depth[:, None], (1, 1, 1, 1), mode="replicate")
    spread = (F.max_pool2d(padded, 3, 1) + F.max_pool2d(-padded, 3, 1))[:, 0] / depth
    valid = depth.isfinite()
    limit = max(0.03, 3 * float(spread[valid].median()))
    assert torch.equal(depth_edges(depth, valid), spread > limit)
    assert depth_edges(depth[:, :1, :1], valid[:, :1, :1]).sum() == 0


def test_a_point_beside_unknown_depth_faces_its_camera() -> None:
    points = unproject(torch.full((4, 5), 2.0), torch.eye(3), torch.eye(3, 4))
    points[1, 2] = torch.nan
    normals = surface_normals(points, torch.zeros(3))
    known = points.isfinite().all(-1)
    assert normals[known].isfinite().all()
    assert_close(normals[1, 1], F.normalize(-points[1, 1], dim=0))


def test_a_percentile_of_many_values_is_taken_from_some(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, images = wall()
    monkeypatch.setattr(trust, "SAMPLED", S * H * W // 4)
    kept = confident_pixels(prediction, images, 60)
    assert kept.float().mean() == pytest.approx(0.4, abs=0.05)
