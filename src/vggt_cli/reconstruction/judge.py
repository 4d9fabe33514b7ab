"""Which cameras explain feature tracks that nobody fitted to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cli.geometry import compose, invert, keep_points, undistort
from vggt_cli.reconstruction.triangulate import MIN_ANGLE, pixel_scale, triangulate
from vggt_cli.scene import Setup, Tracks

HELD_OUT = 0.1  # of the tracks
MANY = 50  # tracks of three views: enough to judge by, however many matches there are
CLOSE = 2.0  # pixels at 1024: an error below it counts
FOCAL_RANGE = (0.5, 2.0)  # of the predicted focal length, where EXIF does not agree
EXIF_AGREES = 0.15  # of the focal length from EXIF
COLLAPSED = 0.1  # of the predicted extent of the cameras, or of their angles between rays


@dataclass(frozen=True)
class Score:
    """How well cameras explain the held-out tracks."""

    share: float  # of all held-out observations: error below CLOSE, in front, seen from two sides
    median: float  # pixels at 1024
    observations: int
    by: str = "tracks"  # or "matches": symmetric epipolar errors of pairs

    def beats(self, other: Score) -> bool:
        """More observations are explained; among equals in whole percents the error is smaller."""
        mine, others = round(100 * self.share), round(100 * other.share)
        return mine > others or (mine == others and self.median < other.median)


def hold_out(tracks: Tracks, seed: int) -> tuple[Tracks, Tracks]:
    """A tenth of the tracks with three or more views, and the rest of all tracks.

    Where next to none has three, as of two photos, a tenth of those with two.
    """
    length = torch.bincount(tracks.point, minlength=len(tracks.xyz))
    long, short = length >= 3, length == 2
    enough = long if int(long.sum()) >= min(MANY, int(short.sum())) else short
    eligible = enough.nonzero()[:, 0]
    random = torch.Generator().manual_seed(seed)
    count = -(-len(eligible) // round(1 / HELD_OUT))
    chosen = eligible[torch.randperm(len(eligible), generator=random)[:count]]
    held = torch.zeros(len(tracks.xyz), dtype=torch.bool)
    held[chosen] = True
    return keep_points(tracks, held), keep_points(tracks, ~held & (length >= 2))


def score(setup: Setup, held: Tracks) -> Score:
    """The score of the cameras on the held-out tracks, whose points are triangulated anew."""
    if len(held.point) == 2 * len(held.xyz):
        return _score_of_matches(setup, held)
    points = triangulate(held, setup, CLOSE)
    good = points.good(held, CLOSE)
    return Score(float(good.double().mean()), float(points.error.median()), len(good))


def _score_of_matches(setup: Setup, held: Tracks) -> Score:
    """By the distances of two observations to each other's epipolar lines."""
    points = triangulate(held, setup, CLOSE)
    error = epipolar_errors(held, setup)
    in_front = (points.error < 1e4).view(-1, 2).all(-1)
    good = (error < CLOSE) & in_front & (points.angle > MIN_ANGLE)
    return Score(float(good.double().mean()), float(error.median()), len(error), "matches")


def epipolar_errors(matches: Tracks, setup: Setup) -> Tensor:
    """[N] symmetric epipolar error in pixels at 1024 of tracks with two observations each.

    Source: Hartley and Zisserman, Multiple View Geometry, 2nd edition, equation 11.10.
    """
    first, second = matches.frame.long().view(-1, 2).unbind(-1)
    a, b = (
        _homogeneous(undistort(xy.double(), setup.cameras.intrinsics[f], setup.radial[f]))
        for xy, f in zip(matches.xy.view(-1, 2, 2).unbind(1), (first, second), strict=True)
    )
    extrinsics = setup.cameras.extrinsics
    relative = compose(extrinsics[second], invert(extrinsics[first]))
    x, y, z = torch.nn.functional.normalize(relative[:, :, 3], dim=-1).unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 3, 3)
    inverse = torch.linalg.inv(setup.cameras.intrinsics)
    fundamental = inverse[second].mT @ cross @ relative[:, :, :3] @ inverse[first]
    line_b = (fundamental @ a[..., None])[..., 0]
    line_a = (fundamental.mT @ b[..., None])[..., 0]
    residual = (line_b * b).sum(-1)
    scale = pixel_scale(setup.cameras)
    squares = [
        (residual / line[:, :2].norm(dim=-1).clamp(min=1e-30) / scale[f]).square()
        for line, f in ((line_a, first), (line_b, second))
    ]
    mean: Tensor = (squares[0] + squares[1]) / 2
    return mean.sqrt().nan_to_num(1e4)


def _homogeneous(xy: Tensor) -> Tensor:
    return torch.cat([xy, torch.ones_like(xy[:, :1])], -1)


def objection(setup: Setup, predicted: Setup, exif: Tensor | None = None) -> str:
    """Why the cameras cannot be right whatever they score, in words; empty: nothing against them.

    exif: [S] focal length in pixels of the photo as the camera wrote it, NaN where it did not.
    """
    if not (
        setup.cameras.extrinsics.isfinite().all() and setup.cameras.intrinsics.isfinite().all()
    ):
        return "a camera is not finite"
    focal = setup.cameras.intrinsics[:, 0, 0]
    if not (focal > 0).all():
        return "a focal length is not positive"
    ratio = focal / predicted.cameras.intrinsics[:, 0, 0]
    wrong = (ratio < FOCAL_RANGE[0]) | (ratio > FOCAL_RANGE[1])
    if exif is not None:
        wrong &= ~((focal / exif - 1).abs() < EXIF_AGREES)
    if wrong.any():
        worst = int((ratio.log().abs() * wrong).argmax())
        return f"a focal length of {focal[worst]:.0f} px is {ratio[worst]:.2f} of the predicted one"
    extents = [
        (c - c.mean(0)).norm(dim=-1).square().mean().sqrt()
        for c in (setup.cameras.centers, predicted.cameras.centers)
    ]
    if extents[0] < COLLAPSED * extents[1]:
        return f"the cameras lie within {extents[0] / extents[1]:.3f} of their predicted extent"
    return ""
