"""Losses of features that match, and of what is said of their matches: docs/training.md."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.geometry import project
from vggt_cli.learning import losses
from vggt_cli.learning.losses import Truth
from vggt_cli.models.matching import REACH, Matches, Verdict


def matching_loss(
    features: Tensor,
    truth: Truth,
    patch: int,
    temperature: float = 0.07,
    every_pair: bool = False,
) -> Tensor:
    """Cross-entropy of finding each patch of one frame among those of another, and its accuracy.

    features: [B, S, N, C] of each patch. A patch's match is the patch that the point at its middle
    projects into, where the depth there agrees within 5 %. All ordered pairs with frame 0, or all.
    Returns [2]: loss, share found first. Zero where nothing matches.
    """
    source, target = _ordered(features.shape[1], every_pair)
    match = _matches(truth, source, target, patch)  # [B, P, N]
    unit = F.normalize(features, dim=-1)
    logits = unit[:, source] @ unit[:, target].mT / temperature  # [B, P, N, N]
    there = match >= 0
    if not there.any():
        return features.new_zeros(2)
    loss = F.cross_entropy(logits[there], match[there])
    found = (logits[there].argmax(-1) == match[there]).to(loss).mean()
    return torch.stack([loss, found.detach()])


def match_loss(matches: Matches, said: Verdict, truth: Truth, cell: int) -> Tensor:
    """How well a verdict fits, on matches between cells of so many pixels.

    Returns [2]: of right matches the negative logarithm of the chance (Laplace's) of their error,
    and the cross-entropy of whether a match is right: its point visible, and within reach.
    """
    points, valid = losses.patch_points(truth, cell)
    columns = points.shape[3]
    points, valid = points.flatten(2, 3), valid.flatten(2)
    points = points.gather(2, matches.cell[..., None].expand(*matches.cell.shape, 3))
    every = torch.arange(len(points), device=points.device)[:, None, None]
    k, extrinsics = truth.intrinsics[every, matches.target], truth.extrinsics[every, matches.target]
    xy, z = project(points[:, :, None, None], k, extrinsics)
    xy, z = xy[..., 0, :, :], z[..., 0, :]  # [B, S, K, N, 2] and [B, S, K, N]
    with torch.no_grad():
        maps = torch.where(truth.valid, truth.depth, 0)[every, matches.target]  # [B, S, K, H, W]
        H, W = maps.shape[-2:]
        inside = (z > 0) & (xy >= 0).all(-1) & (xy[..., 0] < W) & (xy[..., 1] < H)
        column, row = torch.where(inside[..., None], xy, 0).long().unbind(-1)
        there = maps.flatten(3).gather(3, row * W + column)
        agrees = inside & ((there / z.clamp(min=1e-6) - 1).abs() < 0.05)
        middle = torch.stack([matches.best % columns, matches.best // columns], -1) + 0.5
        apart = xy / cell - middle
        right = agrees & valid.gather(2, matches.cell)[:, :, None]
        right &= apart.abs().amax(-1) < REACH
    whether = F.binary_cross_entropy_with_logits(said.logit, right.to(said.logit))
    error = (said.offset - apart)[right].norm(dim=-1)
    log_error = said.log_error[right]
    place = (error * (-log_error).exp() + 2 * log_error).sum() / max(1, len(error))
    return torch.stack([place, whether])


def _ordered(S: int, every: bool) -> tuple[Tensor, Tensor]:
    """Both frames of all ordered pairs of S, or of those with frame 0."""
    a, b = torch.triu_indices(S, S, 1)
    if not every:
        a, b = a[: S - 1], b[: S - 1]
    return torch.cat([a, b]), torch.cat([b, a])


def _matches(truth: Truth, source: Tensor, target: Tensor, patch: int) -> Tensor:
    """[B, P, N] the patch of frames `target` [P] that shows the point of each of `source`'s [P].

    -1: none.
    """
    points, valid = (x[:, source] for x in losses.patch_points(truth, patch))
    k, extrinsics = truth.intrinsics[:, target], truth.extrinsics[:, target]
    xy, z = project(points, k, extrinsics)
    H, W = truth.depth.shape[-2:]
    h, w = H // patch, W // patch
    inside = (z > 0) & (xy >= 0).all(-1) & (xy[..., 0] < w * patch) & (xy[..., 1] < h * patch)
    column, row = torch.where(inside[..., None], xy, 0).long().unbind(-1)
    pixel = (row * W + column).flatten(2)
    depth = truth.depth[:, target].flatten(2).gather(2, pixel)
    seen = truth.valid[:, target].flatten(2).gather(2, pixel)
    agrees = (depth / z.flatten(2).clamp(min=1e-6) - 1).abs() < 0.05
    index = ((row // patch) * w + column // patch).flatten(2)
    shows = valid.flatten(2) & inside.flatten(2) & seen & agrees
    return torch.where(shows, index, -1)
