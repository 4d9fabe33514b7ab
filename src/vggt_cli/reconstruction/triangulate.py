"""Points of feature tracks from given cameras, without trust in any single observation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cli.geometry import distort, invert, project_tracks, undistort
from vggt_cli.scene import Cameras, Setup, Tracks

HYPOTHESES = 12  # pairs of observations tried for each point, besides all together
FAR = 1e4  # pixels: the error of an observation behind its camera
MIN_ANGLE = 1.0  # degrees between two rays of a point that is counted


@dataclass(frozen=True, eq=False)
class Points:
    """What tracks say under given cameras."""

    xyz: Tensor  # [N, 3] float64
    error: Tensor  # [K] pixels at 1024; FAR behind the camera and for what cannot be computed
    angle: Tensor  # [N] degrees, the widest between two rays that agree with the point

    def good(self, tracks: Tracks, limit: float) -> Tensor:
        """[K] observations with an error below `limit`, of points seen from two sides."""
        near = self.error < limit
        seen = torch.bincount(tracks.point[near], minlength=len(self.xyz))
        return near & ((self.angle > MIN_ANGLE) & (seen > 1))[tracks.point]


def pixel_scale(cameras: Cameras) -> Tensor:
    """[S] pixels of the photo in one pixel at 1024, float64."""
    return cameras.image_size.amax(-1).double() / 1024


def reprojection_errors(tracks: Tracks, setup: Setup) -> Tensor:
    """[K] pixels at 1024 from each observation to its point; FAR where there is no projection."""
    frame = tracks.frame.long()
    xy, z = project_tracks(tracks, setup.cameras)
    seen = distort(xy, setup.cameras.intrinsics[frame], setup.radial[frame])
    error = (seen - tracks.xy.double()).norm(dim=-1) / pixel_scale(setup.cameras)[frame]
    return torch.where((z > 0) & (error < FAR), error, FAR)


def triangulate(tracks: Tracks, setup: Setup, limit: float, seed: int = 0) -> Points:
    """The points of the tracks, whose own xyz is not looked at.

    Each is the best, by the sum of its errors, of what all its rays say, and of what pairs of them
    say; then those that agree within about `limit` pixels at 1024 say it together.
    """
    tracks = _with_xyz(tracks, tracks.xyz.new_zeros(len(tracks.xyz), 3).double())
    centre, direction = rays(tracks, setup)
    n = len(tracks.xyz)
    usable = direction.isfinite().all(-1).double()
    direction = torch.where(usable[:, None] > 0, direction, torch.tensor([0.0, 0, 1]).double())
    xyz = _meeting(centre, direction, usable, tracks.point, n)
    best = _with_xyz(tracks, xyz)
    error = reprojection_errors(best, setup)
    for a, b in _pairs(tracks, seed):
        both = torch.cat([a, b])
        at = torch.arange(n).repeat(2)
        xyz = _meeting(centre[both], direction[both], usable[both], at, n)
        best, error = _better(best, error, xyz, setup, 4 * limit)
    for _ in range(3):
        distance = (best.xyz[tracks.point] - centre).square().sum(-1).clamp(min=1e-30)
        weight = usable / distance / (1 + (error / limit).square())
        xyz = _meeting(centre, direction, weight, tracks.point, n)
        best, error = _better(best, error, xyz, setup, 4 * limit)
    angle = _widest_angle(best, centre, error < limit)
    return Points(best.xyz, error, angle)


def rays(tracks: Tracks, setup: Setup) -> tuple[Tensor, Tensor]:
    """Optical centre [K, 3] and unit direction [K, 3], in the world, of observations; NaN: none."""
    frame = tracks.frame.long()
    intrinsics = setup.cameras.intrinsics[frame]
    xy = undistort(tracks.xy.double(), intrinsics, setup.radial[frame])
    focal = torch.diagonal(intrinsics, dim1=-2, dim2=-1)[:, :2]
    xy = (xy - intrinsics[:, :2, 2]) / focal
    direction = torch.nn.functional.normalize(
        torch.cat([xy, torch.ones_like(xy[:, :1])], -1), dim=-1
    )
    world_from_camera = invert(setup.cameras.extrinsics)[frame]
    return world_from_camera[:, :, 3], (world_from_camera[:, :, :3] @ direction[..., None])[..., 0]


def _with_xyz(tracks: Tracks, xyz: Tensor) -> Tracks:
    return Tracks(xyz, tracks.point, tracks.frame, tracks.xy)


def _meeting(centre: Tensor, direction: Tensor, weight: Tensor, point: Tensor, n: int) -> Tensor:
    """[n, 3] the points with the least weighted sum of squared distances to their rays."""
    across = torch.eye(3).to(centre) - direction[:, :, None] * direction[:, None, :]
    across = across * weight[:, None, None]
    matrix = torch.zeros(n, 3, 3, dtype=torch.float64).index_add_(0, point, across)
    target = (across @ centre[..., None])[..., 0]
    vector = torch.zeros(n, 3, dtype=torch.float64).index_add_(0, point, target)
    # Parallel rays meet nowhere: a trace of the identity keeps the matrix invertible.
    trace = torch.diagonal(matrix, dim1=-2, dim2=-1).sum(-1)
    ridge = torch.where(trace > 0, trace * 1e-13, 1.0)[:, None, None] * torch.eye(3).to(centre)
    meeting: Tensor = torch.linalg.solve(matrix + ridge, vector)
    return meeting


def _pairs(tracks: Tracks, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Two observations [N] of each point, HYPOTHESES times."""
    n = len(tracks.xyz)
    length = torch.bincount(tracks.point, minlength=n)
    assert bool((length > 0).all()), "a point without observations"
    start = length.cumsum(0) - length
    random = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(HYPOTHESES):
        first = (torch.rand(n, generator=random) * length).long()
        step = 1 + (torch.rand(n, generator=random) * (length - 1)).long()
        drawn.append((start + first, start + (first + step) % length))
    return drawn


def _better(
    best: Tracks, error: Tensor, xyz: Tensor, setup: Setup, most: float
) -> tuple[Tracks, Tensor]:
    """Of two points for each track the one with the smaller sum of errors; and the errors [K].

    An error counts as `most` at most: an observation that is wrong is no worse for being far off.
    """
    other = reprojection_errors(_with_xyz(best, xyz), setup)
    n = len(xyz)
    difference = error.clamp(max=most) - other.clamp(max=most)
    gain = torch.zeros(n, dtype=torch.float64).index_add_(0, best.point, difference)
    wins = gain > 0
    chosen = torch.where(wins[:, None], xyz, best.xyz)
    return _with_xyz(best, chosen), torch.where(wins[best.point], other, error)


def _widest_angle(tracks: Tracks, centre: Tensor, agrees: Tensor) -> Tensor:
    """[N] degrees between the ray farthest from the mean ray and the one farthest from it.

    At most the widest angle, and at least half of it; every pair would cost the square.
    """
    point, n = tracks.point, len(tracks.xyz)
    ray = torch.nn.functional.normalize(tracks.xyz[point] - centre, dim=-1) * agrees[:, None]
    reference = torch.zeros(n, 3, dtype=torch.float64).index_add_(0, point, ray)
    reference = torch.nn.functional.normalize(reference, dim=-1)
    widest = torch.zeros(n, dtype=torch.float64)
    for _ in range(2):
        aside = torch.linalg.cross(ray, reference[point]).norm(dim=-1)
        turn = torch.atan2(aside, (ray * reference[point]).sum(-1)) * agrees
        widest = torch.zeros(n, dtype=torch.float64).scatter_reduce_(0, point, turn, "amax")
        farthest = agrees & (turn >= widest[point])
        reference = torch.zeros(n, 3, dtype=torch.float64).index_copy_(
            0, point[farthest], ray[farthest]
        )
    return torch.rad2deg(widest)
