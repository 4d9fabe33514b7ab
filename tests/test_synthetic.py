"""Rendered scenes: exact, consistent between frames, the same on every run."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vggt_cli.geometry import pixel_centers, project, unproject
from vggt_cli.learning import paths, photographs, places, rays, synthetic
from vggt_cli.learning.metrics import relative_pose_errors
from vggt_cli.learning.rays import nearest
from vggt_cli.learning.synthetic import Path
from vggt_cli.learning.world import BALL, BOX, CYLINDER, TORUS, World

PATH = Path(4, (96, 128), 0.6)


KINDS = {"box": BOX, "ball": BALL, "cylinder": CYLINDER, "torus": TORUS}


def place(name: str, seed: int) -> World:
    """A random place with shapes of one kind alone, or with hills, or as it is drawn."""
    random = torch.Generator().manual_seed(seed)
    if name == "hills":
        return next(w for w in iter(lambda: places.outdoors(random), None) if len(w.hills))
    if name not in KINDS:
        return cast("World", getattr(places, name)(random))
    world = places.room(random)
    half = world.half.clone()
    if name != "box":
        half[:, 2] = half[:, 0]
    if name in ("ball", "torus"):
        half[:, 1] = half[:, 0] * (0.3 if name == "torus" else 1)
    return replace(world, kind=torch.full_like(world.kind, KINDS[name]), half=half)


PLACES = [*KINDS, "hills", "room", "tabletop", "outdoors"]


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("seed", range(2))
def test_a_pixel_projected_into_another_frame_meets_its_depth_and_colour(
    name: str, seed: int
) -> None:
    world = place(name, seed)
    cameras = synthetic.cameras(torch.Generator().manual_seed(seed), world, PATH)
    found = synthetic.render(world, cameras)
    xyz = unproject(found.depth[0], cameras.intrinsics[0], cameras.extrinsics[0])
    xyz = xyz.flatten(0, 1)[found.valid[0].flatten()]
    seen = synthetic.visible(world, xyz, cameras, 1e-3)
    assert seen[0].float().mean() > 0.999
    for frame in range(4):
        origin = cameras.centers[frame][:, None].expand(3, len(xyz))
        met = nearest(world, origin, xyz.T - origin)[0][seen[frame]]
        # The surface is where the pixel says, but for rays that graze an outline or a far crest.
        assert ((met - 1).abs() > 2e-3).float().mean() < 4e-3
    xy, z = project(xyz.expand(4, 1, -1, -1), cameras.intrinsics, cameras.extrinsics)
    xy, z = xy[:, 0], z[:, 0]
    color = found.pixels[0].flatten(1).T[found.valid[0].flatten()]
    compared = 0
    for frame in range(1, 4):
        at = (xy[frame] - 0.5).round()
        inside = (z[frame] > 0) & (at >= 0).all(-1) & (at < torch.tensor([128, 96])).all(-1)
        chosen = inside & seen[frame]
        if chosen.sum() < 100:
            continue
        compared += 1
        # Half a pixel away depth may be another, but the point's is between those around.
        around = torch.stack([-found.depth[frame], found.depth[frame]])[None]
        near, far = torch.nn.functional.max_pool2d(around, 3, 1, 1)[0] * torch.tensor(
            [[[-1]], [[1]]]
        )
        column, row = at[chosen].long().unbind(-1)
        within = (z[frame][chosen] > 0.99 * near[row, column]) & (
            z[frame][chosen] < 1.01 * far[row, column]
        )
        assert within.float().mean() > 0.97
        difference = (found.pixels[frame, :, row, column].T - color[chosen]).abs().mean(-1)
        assert difference.median() < 0.06
        hidden = inside & ~seen[frame]
        column, row = at[hidden].long().unbind(-1)
        nearer = near[row, column] < z[frame][hidden] * 1.01
        assert nearer.float().mean() > 0.9 or hidden.sum() < 50
    assert compared > 0


@pytest.mark.parametrize("name", ["torus", "hills"])
def test_surfaces_found_by_steps_are_exact_and_the_first(name: str) -> None:
    world = place(name, 3)
    cameras = synthetic.cameras(torch.Generator().manual_seed(1), world, Path(4, (48, 64), 1.0))
    xy = pixel_centers((48, 64), cameras.intrinsics).flatten(0, 1)
    origin, direction = paths.rays(cameras, xy)
    hit = rays.cast(world, origin, direction)
    stepped = (
        hit.surface == len(world.kind) + 3 if name == "hills" else hit.surface < len(world.kind)
    )
    ray = (stepped & (hit.distance < 20)).nonzero()[:, 0]
    assert len(ray) > 500

    def gap(point: Tensor) -> Tensor:  # signed distance of points [3, n] on rays to their surface
        if name == "hills":
            return world.ground(point[0], point[2]) - point[1]
        shape = hit.surface[ray]
        local = (world.axes[shape] @ (point.T - world.center[shape])[..., None])[..., 0]
        tube, ring = world.half[shape, 1], world.half[shape, 0] - world.half[shape, 1]
        return torch.hypot(torch.hypot(local[:, 0], local[:, 2]) - ring, local[:, 1]) - tube

    o, d, t = origin[:, ray], direction[:, ray], hit.distance[ray]
    assert gap(o + t * d).abs().max() < 1e-4
    before = torch.stack([gap(o + part * t * d) for part in torch.linspace(0.01, 0.99, 99)])
    assert (before.amin(0) > -1e-4).float().mean() > 0.998  # a ridge may hide between two steps


def test_the_same_seed_gives_the_same_scene_and_another_does_not() -> None:
    first, again, other = (synthetic.sample(seed, PATH) for seed in (3, 3, 4))
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.depth, again.depth)
    assert torch.equal(first.cameras.extrinsics, again.cameras.extrinsics)
    assert not torch.equal(first.pixels, other.pixels)


def test_the_truth_of_each_shape_is_that_of_its_formula() -> None:
    world = replace(
        places.room(torch.Generator().manual_seed(0)),
        room=torch.tensor([5.0, 2.0, 5.0]),
        kind=torch.tensor([BOX, BALL, CYLINDER, TORUS]),
        center=torch.tensor([[-1.0, 0, 2], [0, 0, 2], [1, 0, 2], [3, 0, 2]]),
        half=torch.tensor([[0.3, 0.4, 0.5], [0.3, 0.3, 0.3], [0.2, 0.4, 0.2], [0.5, 0.1, 0.5]]),
        axes=torch.eye(3).repeat(4, 1, 1),
    )
    # Forward to each shape, to two sides of the room, from above on the lid and on the ring.
    level = [[-1, 0, 0], [0, 0, 0], [1, 0, 0], [3, 0, 0], [0, 0, 0], [0, 0, 0]]
    origin = torch.tensor([*level, [1, -1.9, 2], [3.4, -1.9, 2]])
    ways = {"forward": [0.0, 0, 1], "back": [0.0, 0, -1], "down": [0.0, 1, 0]}
    names = [*["forward"] * 4, "back", *["down"] * 3]
    direction = torch.tensor([ways[name] for name in names])
    hit = rays.cast(world, origin.T, direction.T)
    assert_close(hit.distance, torch.tensor([1.5, 1.7, 1.8, 1.5, 5.0, 2.0, 1.5, 1.8]))
    assert hit.surface.tolist() == [0, 1, 2, 3, 4 + 4, 4 + 3, 2, 3]
    assert_close(hit.normal.T, -direction, atol=1e-4, rtol=0)
    through = rays.nearest(world, torch.tensor([[3.0, -1.9, 2]]).T, torch.tensor([[0.0, 1, 0]]).T)
    assert_close(through[0], torch.tensor([3.9]))  # the hole in the ring


@pytest.mark.parametrize("name", PLACES)
def test_normals_are_those_of_the_depth(name: str) -> None:
    world = place(name, 6)
    cameras = synthetic.cameras(torch.Generator().manual_seed(6), world, Path(3, (96, 128), 0.6))
    found = synthetic.render(world, cameras)
    points = unproject(found.depth, cameras.intrinsics, cameras.extrinsics)
    across, down = points.diff(dim=2)[:, :-1], points.diff(dim=1)[:, :, :-1]
    measured = torch.nn.functional.normalize(torch.linalg.cross(across, down), dim=-1)
    xy = pixel_centers((96, 128), cameras.intrinsics).flatten(0, 1)
    stated = rays.cast(world, *paths.rays(cameras, xy)).normal.T.view_as(points)[:, :-1, :-1]
    # Across and down make a normal away from the camera.
    cosine = -(measured * stated).sum(-1)[found.valid[:, :-1, :-1]]
    assert (cosine > 0.98).float().mean() > 0.8  # the rest are edges


@pytest.mark.parametrize("name", ["room", "tabletop", "outdoors", "hills"])
def test_every_camera_shares_its_view_with_another_and_stands_clear(name: str) -> None:
    shares, clear = [], []
    for seed in range(6):
        world = place(name, seed)
        size = ((48, 64), (32, 64), (64, 32))[seed % 3]
        random = torch.Generator().manual_seed(seed)
        cameras = synthetic.cameras(random, world, Path(5, size, 1.0))
        clear.append(world.clearance(cameras.centers))
        found = synthetic.render(world, cameras)
        for i in range(5):
            xyz = unproject(found.depth[i], cameras.intrinsics[i], cameras.extrinsics[i])
            seen = synthetic.visible(world, xyz.flatten(0, 1), cameras) & found.valid[i].flatten()
            points = xyz.expand(5, -1, -1, -1)
            xy, z = project(points, cameras.intrinsics, cameras.extrinsics)
            inside = (z > 0) & (xy > 0).all(-1) & (xy < torch.tensor(size[::-1])).all(-1)
            share = (seen & inside.flatten(1)).float().mean(-1)
            share[i] = 0
            shares.append(share.max())
    assert torch.cat(clear).min() > 0.2
    assert torch.stack(shares).min() > 0.1


def test_cameras_stay_out_of_surfaces_and_see_something() -> None:
    for seed in range(20):
        found = synthetic.sample(seed, Path(6, (48, 64), 1.0))
        assert found.depth[found.valid].min() > 0.1, seed
        assert found.valid.float().mean() > 0.3, seed


def test_wide_paths_turn_more_than_near_ones() -> None:
    def turn(spread: float) -> float:
        angles = []
        for seed in range(20):
            random = torch.Generator().manual_seed(seed)
            world = synthetic.world(random)
            cameras = synthetic.cameras(random, world, Path(4, (48, 64), spread))
            still = torch.eye(3, 4).repeat(4, 1, 1)
            angles.append(relative_pose_errors(still, cameras.extrinsics)[0].median())
        return float(torch.stack(angles).median())

    assert turn(0.2) < 12
    assert turn(1.0) > 25


def test_a_photographed_frame_is_eight_bit_and_near_the_rendered() -> None:
    pixels = synthetic.sample(0, PATH).pixels
    seen = synthetic.photographed(torch.Generator().manual_seed(0), pixels)
    assert_close(seen * 255, (seen * 255).round())
    assert 0 < (seen - pixels).abs().mean() < 0.3
    assert seen.amin() >= 0
    assert seen.amax() <= 1


def test_jpeg_loses_little_at_high_quality_and_more_at_low() -> None:
    pixels = synthetic.sample(0, Path(2, (50, 60), 0.6)).pixels.clamp(0, 1)
    fine, coarse = (photographs.jpeg(pixels, quality) - pixels for quality in (100, 20))
    assert fine.abs().mean() < 0.01
    assert 0.01 < coarse.abs().mean() < 0.2
    flat = torch.full((1, 3, 16, 16), 0.5)
    assert_close(photographs.jpeg(flat, 50), flat, atol=0.01, rtol=0)


def test_blur_keeps_the_sum_of_a_point_and_spreads_it_by_sigma() -> None:
    point = torch.zeros(1, 3, 15, 15)
    point[..., 7, 7] = 1
    seen = photographs.blurred(point, 0.9)[0, 0]
    assert_close(seen.sum(), torch.tensor(1.0))
    offset = torch.arange(15) - 7.0
    assert_close((seen.sum(0) * offset**2).sum().sqrt(), torch.tensor(0.9), atol=0.05, rtol=0)


def test_every_device_renders_the_same_scene(device: torch.device) -> None:
    here, there = synthetic.sample(2, PATH), synthetic.sample(2, PATH, device)
    assert there.pixels.device.type == device.type
    difference = (there.depth.cpu() - here.depth).abs() > 1e-3
    assert difference.float().mean() < 1e-3  # rays along an outline may fall either way
    seen = synthetic.photographed(torch.Generator().manual_seed(0), there.pixels)
    assert seen.device.type == device.type
