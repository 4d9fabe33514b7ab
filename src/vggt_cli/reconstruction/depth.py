"""Depth maps that follow refined cameras: a scale, and a shift if it helps, for each frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cli.geometry import project_tracks
from vggt_cli.scene import Cameras, Tracks

FEW = 10  # points in a frame: fewer, and it takes the usual scale
MANY = 50  # points in a frame: fewer, and no shift is tried
HELPS = 0.9  # of the error without a shift: what it must come below
DISAGREES = 0.1  # of the depth


@dataclass(frozen=True)
class DepthFit:
    """refined depth = scale * predicted depth + shift, in one frame."""

    scale: float
    shift: float  # scene units
    error: float  # median of |fitted - refined| / refined; NaN without points
    points: int  # that the fit rests on

    @property
    def disagrees(self) -> bool:
        """The depth of this frame does not have the shape that the points have."""
        return self.error > DISAGREES


def follow(
    depth: Tensor, tracks: Tracks, cameras: Cameras, source_from_network: Tensor
) -> tuple[Tensor, list[DepthFit]]:
    """The depth maps [S, H, W] fitted to the points of `tracks` under `cameras`, and each fit.

    tracks, cameras: refined, in source pixels. source_from_network: [S, 3, 3], as in ImageSet.
    A frame that sees too few points takes the median scale of the others.
    """
    _, z = project_tracks(tracks, cameras)
    frame, row, column = network_pixels(tracks, source_from_network, depth.shape[1:])
    at = depth[frame, row, column].double()
    usable = at.isfinite() & (at > 0) & (z > 0)
    fits = []
    for i in range(len(depth)):
        chosen = usable & (frame == i)
        lowest = depth[i][depth[i] > 0].double()
        fits.append(fit(at[chosen], z[chosen], float(lowest.amin()) if len(lowest) else 0.0))
    known = [f.scale for f in fits if f.points >= FEW]
    usual = float(torch.tensor(known, dtype=torch.float64).quantile(0.5)) if known else 1.0
    fits = [f if f.points >= FEW else DepthFit(usual, 0.0, f.error, f.points) for f in fits]
    scale, shift = (torch.tensor([getattr(f, n) for f in fits]) for n in ("scale", "shift"))
    followed = depth * scale.to(depth)[:, None, None] + shift.to(depth)[:, None, None]
    return torch.where(depth > 0, followed, depth), fits


def network_pixels(
    tracks: Tracks, source_from_network: Tensor, size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column [K] of the network's pixel of each observation, in maps of `size`."""
    frame = tracks.frame.long()
    network_from_source = torch.linalg.inv(source_from_network.double())[frame]
    xy = torch.cat([tracks.xy.double(), torch.ones(len(frame), 1, dtype=torch.float64)], -1)
    column, row = (network_from_source @ xy[..., None])[:, :2, 0].floor().long().unbind(-1)
    return frame, row.clamp(0, size[0] - 1), column.clamp(0, size[1] - 1)


def fit(predicted: Tensor, refined: Tensor, lowest: float = 0.0) -> DepthFit:
    """What maps depths `predicted` [M] onto `refined` [M], with up to half of them wrong.

    The shift is kept only if it lowers the median relative error clearly, and leaves the depth
    `lowest`, the smallest of the map, in front of the camera.
    """
    if len(predicted) == 0:
        return DepthFit(1.0, 0.0, torch.nan, 0)
    scale = float((refined / predicted).quantile(0.5))
    plain = DepthFit(scale, 0.0, _error(predicted, refined, scale, 0.0), len(predicted))
    if len(predicted) < MANY:
        return plain
    # Least sum of relative errors: a (p / z) + b / z = 1, weighted by the error of the last turn.
    rows = torch.stack([predicted / refined, 1 / refined], -1)
    weight = 1 / ((scale * rows[:, 0] - 1).abs() + 1e-3)
    for _ in range(30):
        matrix = rows.mT @ (weight[:, None] * rows)
        a, b = torch.linalg.lstsq(matrix, rows.mT @ weight).solution.tolist()
        weight = 1 / ((rows @ torch.tensor([a, b]).to(rows) - 1).abs() + 1e-3)
    shifted = DepthFit(a, b, _error(predicted, refined, a, b), len(predicted))
    helps = shifted.error < HELPS * plain.error and a > 0 and a * lowest + b > 0
    return shifted if helps else plain


def _error(predicted: Tensor, refined: Tensor, scale: float, shift: float) -> float:
    return float(((scale * predicted + shift - refined).abs() / refined).quantile(0.5))
