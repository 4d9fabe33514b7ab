"""Points of the first frame in all frames, by their true depth: what trackers learn from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from vggt_cli.geometry import project, unproject
from vggt_cli.learning.losses import Truth

MARGIN = 4  # pixels from the border within which nothing counts as seen
AGREEMENT = 0.05  # share of depth within which two surfaces are one


class Labels(NamedTuple):
    """T tracks of each of B sequences of S frames."""

    xy: Tensor  # [B, S, T, 2] pixels, centres at +0.5; anywhere where not seen
    seen: Tensor  # [B, S, T] bool


def labels(truth: Truth, random: Generator, count: int = 512, slack: float = 0.01) -> Labels:
    """`count` tracks a sequence through pixels of frame 0 that are seen in another frame too.

    They are drawn from the better half of all by number of frames. Where there are fewer, the
    other places hold tracks that are never seen.
    slack: depth that may differ beyond 5 %, in units of the truth; VGGT-Omega's labels have 0.01
    in normalised units, VGGT's 0. random: of the CPU, whatever the truth's device.
    Source: spec vggt section 14, vggt_omega section 15.
    """
    B = len(truth.depth)
    each = [_of_sequence(Truth(*(x[b] for x in truth)), random, count, slack) for b in range(B)]
    xy, seen = zip(*each, strict=True)
    return Labels(torch.stack(xy), torch.stack(seen))


def _of_sequence(
    truth: Truth, random: Generator, count: int, slack: float
) -> tuple[Tensor, Tensor]:
    """xy [S, count, 2] and seen [S, count] of a sequence, whose truth has no axis B."""
    S, H, W = truth.depth.shape
    points = unproject(truth.depth[0], truth.intrinsics[0], truth.extrinsics[0])[truth.valid[0]]
    everywhere = points.expand(S, 1, -1, 3)
    xy, z = (x[:, 0] for x in project(everywhere, truth.intrinsics, truth.extrinsics))
    xy = torch.where(z[..., None] > 0, xy, -1.0)
    seen = _seen(xy, z, truth, slack)
    frames = seen.sum(0) * seen[0]
    # In random order, so that which of equally good tracks are in the better half is chance.
    order = torch.randperm(len(frames), generator=random).to(frames.device)
    best = order[frames[order].argsort(descending=True, stable=True)]
    half = best[: (int((frames > 1).sum()) + 1) // 2]
    drawn = half[torch.randperm(len(half), generator=random)[:count].to(half.device)]
    size = torch.tensor([W, H]).to(xy)
    empty = torch.rand(count - len(drawn), 2, generator=random).to(xy) * size
    never = torch.zeros(S, len(empty), dtype=torch.bool, device=seen.device)
    return (
        torch.cat([xy[:, drawn], empty.expand(S, -1, -1)], 1),
        torch.cat([seen[:, drawn], never], 1),
    )


def _seen(xy: Tensor, z: Tensor, truth: Truth, slack: float) -> Tensor:
    """[S, N]: where points at pixels [S, N, 2] and depth [S, N] are the surface that is seen.

    They are if the depth there or one pixel to the right or below is theirs: a point between
    pixels, on a slope or at an outline, has the depth of one of them.
    """
    H, W = truth.depth.shape[1:]
    size = torch.tensor([W, H]).to(xy)
    inside = (z > 0) & (xy >= MARGIN).all(-1) & (xy <= size - MARGIN).all(-1)
    column, row = torch.where(inside[..., None], xy, 0).long().unbind(-1)
    agrees = torch.zeros_like(inside)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        pixel = (row + down) * W + column + right
        depth = truth.depth.flatten(1).gather(1, pixel)
        close = (depth - z).abs() < AGREEMENT * torch.minimum(depth, z) + slack
        agrees |= close & truth.valid.flatten(1).gather(1, pixel)
    return inside & agrees
