"""Rendered scenes: exact, consistent between frames, the same on every run."""

import pytest
import torch
from torch.testing import assert_close

from vggt_cli.geometry import project, unproject
from vggt_cli.learning import synthetic
from vggt_cli.learning.metrics import relative_pose_errors
from vggt_cli.learning.synthetic import Path

PATH = Path(4, (96, 128), 0.6)


@pytest.mark.parametrize("seed", range(4))
def test_a_pixel_projected_into_another_frame_meets_its_depth_and_colour(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    world = synthetic.world(random)
    cameras = synthetic.cameras(random, world, PATH)
    found = synthetic.render(world, cameras)
    xyz = unproject(found.depth[0], cameras.intrinsics[0], cameras.extrinsics[0])
    xyz = xyz.flatten(0, 1)[found.valid[0].flatten()]
    seen = synthetic.visible(world, xyz, cameras, 1e-3)
    assert seen[0].float().mean() > 0.999
    origin = cameras.centers[:, None].expand(-1, len(xyz), -1)
    met = synthetic.cast(world, origin, xyz - origin).distance[seen]
    # The surface is where the pixel says, but for rays that graze an outline.
    assert ((met - 1).abs() > 2e-3).float().mean() < 2e-3
    xy, z = project(xyz.expand(4, 1, -1, -1), cameras.intrinsics, cameras.extrinsics)
    xy, z = xy[:, 0], z[:, 0]
    color = found.pixels[0].flatten(1).T[found.valid[0].flatten()]
    for frame in range(1, 4):
        at = (xy[frame] - 0.5).round()
        inside = (z[frame] > 0) & (at >= 0).all(-1) & (at < torch.tensor([128, 96])).all(-1)
        chosen = inside & seen[frame]
        if chosen.sum() < 100:
            continue
        column, row = at[chosen].long().unbind(-1)
        depth = found.depth[frame, row, column]
        assert ((depth / z[frame][chosen] - 1).abs() < 0.05).float().mean() > 0.9
        difference = (found.pixels[frame, :, row, column].T - color[chosen]).abs().mean(-1)
        assert difference.median() < 0.06
        hidden = inside & ~seen[frame]
        column, row = at[hidden].long().unbind(-1)
        nearer = found.depth[frame, row, column] < z[frame][hidden] * 1.01
        assert nearer.float().mean() > 0.9 or hidden.sum() < 50


def test_the_same_seed_gives_the_same_scene_and_another_does_not() -> None:
    first, again, other = (synthetic.sample(seed, PATH) for seed in (3, 3, 4))
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.depth, again.depth)
    assert torch.equal(first.cameras.extrinsics, again.cameras.extrinsics)
    assert not torch.equal(first.pixels, other.pixels)


def test_the_truth_of_a_box_a_ball_and_a_cylinder_is_that_of_their_formulas() -> None:
    world = synthetic.world(torch.Generator().manual_seed(0), 3)
    world = synthetic.World(
        **{
            **vars(world),
            "room": torch.tensor([5.0, 2.0, 5.0]),
            "roofless": False,
            "kind": torch.tensor([0, 1, 2]),
            "center": torch.tensor([[-1.0, 0, 2], [0, 0, 2], [1, 0, 2]]),
            "half": torch.tensor([[0.3, 0.4, 0.5], [0.3, 0.3, 0.3], [0.2, 0.4, 0.2]]),
            "turn": torch.zeros(3),
        }
    )
    targets = torch.tensor([[-1.0, 0, 2], [0, 0, 2], [1, 0, 2], [0, 0, -1], [0, 1, 0]])
    from_above = torch.tensor([1.0, -1.9, 2.0])
    origin = torch.cat([targets[:3] * torch.tensor([1.0, 1, 0]), torch.zeros(2, 3)])
    direction = torch.cat([torch.tensor([[0.0, 0, 1]]).repeat(3, 1), targets[3:]])
    hit = synthetic.cast(world, origin, direction)
    assert_close(hit.distance, torch.tensor([1.5, 1.7, 1.8, 5.0, 2.0]))
    assert hit.shape.tolist() == [0, 1, 2, 3 + 4, 3 + 3]
    normals = torch.tensor([[0, 0, -1], [0, 0, -1], [0, 0, -1], [0, 0, 1], [0, -1, 0]]).float()
    assert_close(hit.normal, normals)
    lid = synthetic.cast(world, from_above[None], torch.tensor([[0.0, 1, 0]]))
    assert_close(lid.distance, torch.tensor([1.5]))
    assert_close(lid.normal, torch.tensor([[0.0, -1, 0]]))


def test_normals_of_turned_shapes_are_those_of_their_depth() -> None:
    random = torch.Generator().manual_seed(6)
    world = synthetic.world(random)
    cameras = synthetic.cameras(random, world, Path(3, (96, 128), 0.6))
    k, e = cameras.intrinsics, cameras.extrinsics
    found = synthetic.render(world, cameras)
    points = unproject(found.depth, k, e)
    across, down = points.diff(dim=2)[:, :-1], points.diff(dim=1)[:, :, :-1]
    measured = torch.nn.functional.normalize(torch.linalg.cross(across, down), dim=-1)
    origin = cameras.centers[:, None, None].expand_as(points)
    stated = synthetic.cast(world, origin, points - origin).normal[:, :-1, :-1]
    cosine = (measured * stated).sum(-1).abs()[found.valid[:, :-1, :-1]]
    assert (cosine > 0.98).float().mean() > 0.85  # the rest are edges


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


def test_every_device_renders_the_same_scene(device: torch.device) -> None:
    here, there = synthetic.sample(2, PATH), synthetic.sample(2, PATH, device)
    assert there.pixels.device.type == device.type
    difference = (there.depth.cpu() - here.depth).abs() > 1e-3
    assert difference.float().mean() < 1e-3  # rays along an outline may fall either way
    seen = synthetic.photographed(torch.Generator().manual_seed(0), there.pixels)
    assert seen.device.type == device.type
