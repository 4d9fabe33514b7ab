"""The two laws of tracks from depth, on rendered scenes with true depth and cameras."""

import pytest
import torch
from torch import Tensor

from vggt_cli.geometry import from_first_camera, project
from vggt_cli.learning import synthetic
from vggt_cli.reconstruction.fuse import FuseOptions, fuse
from vggt_cli.scene import Cameras, ImageSet, PointCloud, Prediction

SIZE = (120, 160)
SEEDS = range(6)


def scene(seed: int, frames: int = 6) -> tuple[synthetic.World, Cameras, Prediction, ImageSet]:
    """A rendered world with its truth as the prediction."""
    random = torch.Generator().manual_seed(seed)
    world = synthetic.world(random)
    cameras = synthetic.cameras(random, world, synthetic.Path(frames, SIZE, 0.7))
    truth = synthetic.render(world, cameras)
    size = torch.tensor([SIZE]).repeat(frames, 1)
    identity = torch.eye(3, dtype=torch.float64).repeat(frames, 1, 1)
    names = tuple(str(i) for i in range(frames))
    images = ImageSet(names, truth.pixels.clamp(0, 1), truth.valid, identity, size)
    return world, cameras, Prediction(cameras, truth.depth, torch.ones_like(truth.depth)), images


def kept(cloud: PointCloud, frames: int) -> Tensor:
    """[S, N] bool: which frames have an observation of which point."""
    tracks = cloud.observations
    assert tracks is not None
    found = torch.zeros(frames, len(cloud), dtype=torch.bool)
    found[tracks.frame.long(), tracks.point] = True
    return found


def really_visible(world: synthetic.World, cameras: Cameras, xyz: Tensor) -> Tensor:
    """[S, N] bool by the renderer: inside the image and first on its ray."""
    points = xyz.expand(len(cameras), 1, -1, -1)
    xy, z = project(points, cameras.intrinsics, cameras.extrinsics)
    limit = torch.tensor([SIZE[1], SIZE[0]])
    inside = (z > 0) & (xy >= 0).all(-1) & (xy < limit).all(-1)
    return inside[:, 0] & synthetic.visible(world, xyz, cameras)


@pytest.mark.parametrize("seed", SEEDS)
def test_observations_are_seen_and_what_is_seen_is_observed(seed: int) -> None:
    world, cameras, prediction, images = scene(seed)
    cloud = fuse(prediction, images, FuseOptions(points=20_000, confidence=0))
    observed = kept(cloud, len(cameras))
    seen = really_visible(world, cameras, cloud.xyz)
    true = (observed & seen).sum() / observed.sum()
    complete = (observed & seen).sum() / seen.sum()
    print(f"seed {seed}: {len(cloud)} points, {true:.4f} true, {complete:.4f} complete")
    assert true >= 0.98
    assert complete >= 0.90


def test_moving_the_world_to_the_first_camera_changes_no_observation() -> None:
    _, _, prediction, images = scene(0)
    options = FuseOptions(points=3000, confidence=0)
    before, after = (
        fuse(p, images, options).observations for p in (prediction, from_first_camera(prediction))
    )
    assert before is not None
    assert after is not None
    assert abs(len(before.point) - len(after.point)) < 0.05 * len(before.point)
