"""Cameras around a cloud of points with exact tracks, and what spoils them."""

import math

import torch
from disturb import from_first, generator
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.geometry import distort, project_tracks
from vggt_cli.scene import Cameras, Tracks

SIZE = (480, 640)


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
    return Cameras(from_first(extrinsics), *_lens(frames, focal))


def _lens(frames: int, focal: float) -> tuple[Tensor, Tensor]:
    H, W = SIZE
    rows = [[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float64).repeat(frames, 1, 1), torch.tensor(
        [SIZE] * frames
    )


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
