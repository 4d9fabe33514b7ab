"""Two windows that hold the same frames: the similarity between their worlds, robustly.

The same pixel of the same frame is the same place, so correspondences are free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vggt_cli.errors import GeometryError
from vggt_cli.geometry import fit_similarity, invert, move
from vggt_cli.reconstruction.align import fit_cameras
from vggt_cli.reconstruction.trust import depth_edges
from vggt_cli.scene import Prediction, Similarity

POINTS = 6000  # compared, of the pixels of all shared frames: errors are those of the depth maps
SURE = 0.5  # quantile of confidence, in both windows, above which a pixel is compared
FEW = 50  # sure pixels: with less of them all usable ones are compared
ROUNDS = 8  # of weighting anew
WIDE = 0.05  # of the depth: shared cameras spread over it tell the scale better than depth does ...
STIFF = 0.1  # ... if they are in both windows where they are, within so much of their spread
AGREES = 0.05  # of the depth: points of the two windows within it count as the same


@dataclass(frozen=True, eq=False)
class Joint:
    """What the frames that two windows share say of their worlds."""

    similarity: Similarity  # world of the first window from that of the second
    anchors: Tensor  # [6, 3] float64, world of the second: as wide as what was compared
    depth: float  # median depth there, units of the first
    residual: float  # median distance between the two windows' points, of the depth
    agree: float  # share of the points within AGREES
    frames: int  # shared
    stretch: float = 1.0  # times as deep as it says is the second, as its cameras stand


def join(first: Prediction, second: Prediction, valid: Tensor) -> Joint:
    """How the world of `first` follows from that of `second`; both hold the same frames.

    valid: [S, H, W] bool, the pixels that show something.
    The scale is that of the shared cameras where they stand far apart, and the second's depth is
    stretched to it: where a camera moves sideways only, a network takes a longer lens and more
    depth for a shorter lens and less. Else it is the median ratio of the two depths of a pixel.
    Turn and shift are what the shared cameras say, or what a similarity of points says, whichever
    scatters less: a small network's cameras are better than its depth. Measured: docs/windows.md.
    Where too few pixels are usable the cameras alone decide, and the residual is 1.
    """
    assert first.depth.shape == second.depth.shape == valid.shape, valid.shape
    frame, row, column = _compared(first, second, valid)
    depth, there = (p.depth[frame, row, column].double() for p in (first, second))
    ratio = float((depth / there).median()) if len(frame) else 1.0
    usual = float(depth.median()) if len(frame) else math.inf
    similarity = _by_cameras(first, second, ratio, usual)
    stretch = ratio / similarity.scale
    lens = first.cameras.intrinsics  # of the same frames, so that one of the two is wrong
    second = stretched(replace(second, cameras=replace(second.cameras, intrinsics=lens)), stretch)
    x, y = (_points(p, frame, row, column) for p in (first, second))
    try:
        by_points = fit_robustly(y, x, depth, similarity)
    except GeometryError:
        centers = second.cameras.centers.double()
        return Joint(similarity, _anchors(centers), 1.0, 1.0, 0.0, len(valid))
    residuals = (by_points(y) - x).norm(dim=-1) / depth
    if _scatter(first, second, similarity, usual) > residuals.median():
        similarity = by_points
    residuals = (similarity(y) - x).norm(dim=-1) / depth
    agree = float((residuals <= AGREES).double().mean())
    middle = float(residuals.median())
    return Joint(similarity, _anchors(y), usual, middle, agree, len(valid), stretch)


def stretched(prediction: Prediction, times: float) -> Prediction:
    """The prediction so many times as deep, its cameras where they are."""
    return replace(prediction, depth=prediction.depth * times)


def through(first: Joint, second: Joint) -> Joint:
    """The joint of two windows by way of a third, to which `first` and `second` lead from each."""
    return Joint(
        first.similarity @ second.similarity.inverse,
        second.similarity(second.anchors),
        first.depth,
        float(torch.tensor([first.residual, second.residual]).norm()),
        min(first.agree, second.agree),
        min(first.frames, second.frames),
    )


def fit_robustly(source: Tensor, target: Tensor, depth: Tensor, start: Similarity) -> Similarity:
    """The similarity from `source` to `target` [N, 3].

    depth: [N] of the target's points; distances are in units of it, as errors of depth maps grow
    with depth. Weights are Geman and McClure's about three times the median distance, from
    `start` on: half of the points may be anywhere.
    Raises GeometryError as `fit_similarity` does.
    """
    similarity = start
    for _ in range(ROUNDS):
        distance = (similarity(source) - target).norm(dim=-1) / depth
        if not len(distance):
            raise GeometryError("no points for a similarity")
        width = 3 * distance.median().clamp(min=1e-6)
        weight = (1 + (distance / width).square()).pow(-2)
        similarity = fit_similarity(source, target, weight / depth.square())
    return similarity


def _compared(first: Prediction, second: Prediction, valid: Tensor) -> tuple[Tensor, ...]:
    """Frame, row and column [n] of sure pixels of both windows, evenly spread, away from edges."""
    usable = valid.clone()
    for p in (first, second):
        usable &= p.depth.isfinite() & (p.depth > 0) & p.confidence.isfinite()
    if not usable.any():
        return tuple(usable.nonzero().unbind(1))
    sure = usable.clone()
    for p in (first, second):
        of_usable = p.confidence[usable]
        threshold = of_usable.kthvalue(max(1, int(SURE * len(of_usable)))).values
        sure &= (p.confidence >= threshold) & ~depth_edges(p.depth.where(usable, 0), usable)
    chosen = (sure if sure.sum() >= FEW else usable).nonzero()
    return tuple(chosen[:: max(1, len(chosen) // POINTS)].unbind(1))


def _points(prediction: Prediction, frame: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """World points [n, 3] float64 of some pixels; see `geometry.unproject` for all of them."""
    cameras, depth = prediction.cameras, prediction.depth[frame, row, column].double()
    intrinsics, extrinsics = (x.double()[frame] for x in (cameras.intrinsics, cameras.extrinsics))
    xy = torch.stack([column, row], -1) + 0.5
    focal = torch.diagonal(intrinsics, dim1=-2, dim2=-1)[:, :2]
    rays = torch.cat([(xy - intrinsics[:, :2, 2]) / focal, torch.ones(len(xy), 1).double()], -1)
    to_world = invert(extrinsics)
    return (to_world[..., :3] @ (rays * depth[:, None])[..., None])[..., 0] + to_world[..., 3]


def _by_cameras(first: Prediction, second: Prediction, ratio: float, depth: float) -> Similarity:
    """The similarity that the cameras say, with the scale `ratio` of the depth maps if need be.

    depth: that usual in the first.
    """
    found = fit_cameras(second.cameras.extrinsics, first.cameras.extrinsics)
    here, there = (p.cameras.centers.double() for p in (first, second))
    spread = float((here - here.mean(0)).norm()) / len(here) ** 0.5
    off = float((found(there) - here).norm()) / len(here) ** 0.5
    if len(here) > 2 and spread >= WIDE * depth and off <= STIFF * spread:
        return found
    shift = (here - ratio * there @ found.rotation.T).quantile(0.5, dim=0)
    return Similarity(ratio, found.rotation, shift)


def _scatter(first: Prediction, second: Prediction, similarity: Similarity, depth: float) -> float:
    """Median distance, of the depth, between the points that shared cameras have before them."""
    a, b = first.cameras, move(second.cameras, similarity)
    there = [(c.centers + depth * c.extrinsics[:, 2, :3]).double() for c in (a, b)]
    return float((there[0] - there[1]).norm(dim=-1).median() / depth)


def _anchors(points: Tensor) -> Tensor:
    """[6, 3] points one standard deviation from the mean of `points` along the main axes."""
    mean = points.mean(0)
    _, spread, axes = torch.linalg.svd(points - mean, full_matrices=False)
    if len(spread) < 3:  # fewer than three points: any directions will do
        spread, axes = torch.ones(3).double() * points.abs().max().clamp(min=1), torch.eye(3)
    deviation = spread / max(1, len(points)) ** 0.5
    # A line or a plane would leave turns open.
    steps = deviation.clamp(min=float(0.1 * deviation.max().clamp(min=1e-6)))[:, None] * axes
    return torch.cat([mean + steps, mean - steps]).double()
