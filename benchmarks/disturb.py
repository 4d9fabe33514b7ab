"""Reference cameras disturbed, then refined on the tracks of the reference.

    python benchmarks/disturb.py SCENE...     # folders with reference/, a COLMAP model with points

Each camera is turned and moved on its own, the focal length is 3 % off, the principal point in the
centre; three levels, three seeds. One JSON line each.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.formats import colmap_read
from vggt_cli.geometry import compose, invert
from vggt_cli.learning.metrics import auc, relative_pose_errors
from vggt_cli.reconstruction.refine import RefineOptions, refine
from vggt_cli.scene import Cameras

LEVELS = ((2, 0.05), (5, 0.1), (10, 0.2))  # degrees, share of the rms extent of the cameras


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def from_first(extrinsics: Tensor) -> Tensor:
    """The cameras in the world of the first, whose extrinsics are [I | 0]."""
    moved = compose(extrinsics, invert(extrinsics[:1]).expand_as(extrinsics))
    moved[0] = torch.eye(3, 4)
    return moved


def turned(degrees: float, axes: Tensor) -> Tensor:
    """[S, 3, 3] rotations by the angle about `axes` [S, 3]."""
    x, y, z = (F.normalize(axes, dim=-1) * math.radians(degrees)).unbind(-1)
    o = torch.zeros_like(x)
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).view(-1, 3, 3)
    rotations: Tensor = torch.linalg.matrix_exp(cross)
    return rotations


def disturbed(
    cameras: Cameras, degrees: float, share: float, focal: float = 0.0, seed: int = 2
) -> Cameras:
    """Each camera turned and moved on its own, by `share` of their rms extent; one focal length."""
    g, S = generator(seed), len(cameras)
    axes, ways = (torch.randn(2, S, 3, generator=g, dtype=torch.float64)).unbind(0)
    centers = cameras.centers.double()
    extent = (centers - centers.mean(0)).norm(dim=-1).square().mean().sqrt()
    moved = centers + share * extent * F.normalize(ways, dim=-1)
    rotation = turned(degrees, axes) @ cameras.extrinsics[:, :, :3].double()
    extrinsics = torch.cat([rotation, -rotation @ moved[..., None]], -1)
    intrinsics = cameras.intrinsics.double().clone()
    intrinsics[:, 0, 0] *= 1 + focal
    intrinsics[:, 1, 1] *= 1 + focal
    intrinsics[:, :2, 2] = cameras.image_size.flip(-1).double() / 2
    return Cameras(from_first(extrinsics), intrinsics, cameras.image_size)


def measure(scene: Path, level: tuple[float, float], seed: int) -> dict[str, object]:
    """The figures of one disturbed start."""
    model = colmap_read.read(scene / "reference")
    true = model.cameras
    focal = 0.03 if seed % 2 == 0 else -0.03
    start = disturbed(true, *level, focal=focal, seed=seed)
    cpu = time.process_time()
    options = RefineOptions(seed=seed)
    refined = refine(start, model.tracks, list(model.camera_of_image), options)
    before, after = (
        relative_pose_errors(c.extrinsics, true.extrinsics) for c in (start, refined.cameras)
    )
    return {
        "scene": scene.name,
        "degrees": level[0],
        "share": level[1],
        "seed": seed,
        "auc@5 before": round(auc(*before, 5), 1),
        "auc@3": round(auc(*after, 3), 1),
        "auc@5": round(auc(*after, 5), 1),
        "focal": round(float(refined.cameras.intrinsics[0, 0, 0] / true.intrinsics[0, 0, 0]), 4),
        "radial": round(float(refined.radial[0]), 4),
        "processor seconds": round(time.process_time() - cpu, 1),
        "method": refined.verdict.method,
        "words": refined.verdict.words,
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for level in LEVELS:
            for seed in range(3):
                print(json.dumps(measure(Path(argument), level, seed)), flush=True)
