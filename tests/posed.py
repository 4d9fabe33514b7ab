"""Cameras around a cloud of points with exact tracks, and what spoils them."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.geometry import compose, distort, invert, project_tracks
from vggt_cli.scene import Cameras, Tracks

SIZE = (480, 640)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arc(frames: int, degrees: float = 60.0, focal: float = 560.0) -> Cameras:
    """Cameras on an arc of radius 5 that look at the origin; the first is at [I | 0]."""
    angle = torch.linspace(0, math.radians(degrees), frames, dtype=torch.float64)
    height = 0.5 * torch.sin(3 * angle)
    center = torch.stack([5 * angle.sin(), height, -5 * angle.cos()], -1)
    forward = F.normalize(-center, dim=-1)
    down = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand_as(forward)
    right = F.normalize(torch.linalg.cross(down, forward), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], -2)
    extrinsics = torch.cat([rotation, -rotation @ center[..., None]], -1)
    return Cameras(_from_first(extrinsics), *_lens(frames, focal))


def _lens(frames: int, focal: float) -> tuple[Tensor, Tensor]:
    H, W = SIZE
    rows = [[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float64).repeat(frames, 1, 1), torch.tensor(
        [SIZE] * frames
    )


def _from_first(extrinsics: Tensor) -> Tensor:
    moved = compose(extrinsics, invert(extrinsics[:1]).expand_as(extrinsics))
    moved[0] = torch.eye(3, 4)
    return moved


def tracks_of(cameras: Cameras, points: int, seed: int = 0, radial: float = 0.0) -> Tracks:
    """Tracks of random points near the middle of the arc, wherever a photo shows them."""
    S, g = len(cameras), generator(seed)
    local = (torch.rand(points, 3, generator=g, dtype=torch.float64) - 0.5) * 2.5
    xyz = local + torch.tensor([0.0, 0.0, 5.0])
    point = torch.arange(points).repeat_interleave(S)
    frame = torch.arange(S, dtype=torch.int32).repeat(points)
    whole = Tracks(xyz, point, frame, torch.zeros(points * S, 2))
    xy, z = project_tracks(whole, cameras)
    k = torch.full_like(z, radial)
    xy = distort(xy, cameras.intrinsics.double()[frame.long()], k)
    H, W = SIZE
    seen = (z > 0) & (xy > 0).all(-1) & (xy[:, 0] < W) & (xy[:, 1] < H)
    seen &= torch.rand(len(seen), generator=g) < 0.8
    enough = (torch.bincount(point[seen], minlength=points) >= 2)[point]
    rows = seen & enough
    number = torch.unique(point[rows], return_inverse=True)[1]
    return Tracks(xyz[point[rows].unique()].float(), number, frame[rows], xy[rows].float())


def noisy(tracks: Tracks, pixels: float, wrong: float = 0.0, seed: int = 1) -> Tracks:
    """The same with noise on each observation, and a share of them anywhere in the photo."""
    g = generator(seed)
    xy = tracks.xy + pixels * torch.randn(tracks.xy.shape, generator=g)
    anywhere = torch.rand(xy.shape, generator=g) * torch.tensor([SIZE[1], SIZE[0]])
    bad = torch.rand(len(xy), generator=g) < wrong
    return Tracks(tracks.xyz, tracks.point, tracks.frame, torch.where(bad[:, None], anywhere, xy))


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
    return Cameras(_from_first(extrinsics), intrinsics, cameras.image_size)
