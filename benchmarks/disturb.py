"""Cameras disturbed each on its own, as starts for refinement."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.geometry import compose, invert
from vggt_cli.scene import Cameras


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
