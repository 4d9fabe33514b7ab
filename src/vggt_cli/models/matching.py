"""Matches of cells between frames, by the likeness of their features.

B sequences, S frames, K target frames of each, N matched cells, C channels. Places
are (x, y) in halves of the images' longer side from the centre.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 32  # frames matched at a time, for memory
EXACT = 0.1  # cells: what is better counts no more
REACH = 1.5  # cells from the middle of the most alike one within which a match can be found


class Matches(NamedTuple):
    """For some cells of each patch their places in other frames; N of them in all."""

    cell: Tensor  # [B, S, N] int64 which cells of their frame: of all patches the surest, then on
    own: Tensor  # [B, S, N, 2] its place
    target: Tensor  # [B, S, K] int64 frames
    place: Tensor  # [B, S, K, N, 2] in the target
    certainty: Tensor  # [B, S, K, N] in [0, 1]; 1: each other's only candidate
    best: Tensor  # [B, S, K, N] int64 the most alike cell there


class MatchHead(nn.Module):
    """What a cell and its most alike one say: where exactly the match is, and whether at all."""

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * width + 2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 4),
        )

    def forward(self, own: Tensor, other: Tensor, certainty: Tensor) -> Verdict:
        """The verdict on features [..., C] of unit length, and a certainty [...] as in Matches."""
        alike = (own * other).sum(-1, keepdim=True)
        rarity = certainty.clamp(min=1e-6).log()[..., None] / 4
        out = self.layers(torch.cat([own * 8, other * 8, alike * 8 - 4, rarity], -1))
        return Verdict(out[..., :2], out[..., 2], out[..., 3])


class Verdict(NamedTuple):
    """Of a match."""

    offset: Tensor  # [..., 2] in cells from the middle of the most alike one
    log_error: Tensor  # [...] of how far off the offset may be, in cells
    logit: Tensor  # [...] of the point being visible there, within REACH


def find(
    features: Tensor, target: Tensor, sharpness: float, side: int, per_patch: int = 1
) -> Matches:
    """Matches of features [B, S, C, h, w] with frames `target` [B, S, K].

    sharpness: of likeness, with which the features were trained. side: cells of a patch's side;
    per_patch: how many of its cells are matched, the surest. A match is the mean place of the cells
    around the most alike one, weighted by likeness.
    """
    B, S, _, h, w = features.shape
    unit = F.normalize(features.float().flatten(3), dim=2).mT  # [B, S, cells, C]
    where, around = places(h, w).to(unit), _around(h, w).to(unit.device)
    every = torch.arange(B)[:, None]
    found: list[tuple[Tensor, ...]] = []
    for s, k in product(range(0, S, CHUNK), range(target.shape[2])):
        other = unit[every, target[:, s : s + CHUNK, k]]
        alike = (unit[:, s : s + CHUNK] * sharpness @ other.mT).exp_()  # [B, chunk, cells, cells]
        # The largest of likeness^2 / (sum of its row x sum of its column), in few passes.
        most, best = (alike * alike.sum(-2, keepdim=True).rsqrt()).max(-1)
        certainty = most.square() / alike.sum(-1)
        spot = around[best]  # [B, chunk, cells, 9]
        weight = alike.gather(-1, spot)[..., None]
        place = (weight * where[spot]).sum(-2) / weight.sum(-2)
        found.append((place, certainty, best))
    K = target.shape[2]
    place, certainty, best = (
        torch.cat([torch.stack(x[i : i + K], 2) for i in range(0, len(x), K)], 1)
        for x in zip(*found, strict=True)
    )
    patches = F.pixel_unshuffle(torch.arange(h * w).view(1, h, w), side).flatten(1).T.to(best)
    surest = certainty.sum(2)[..., patches].topk(per_patch, -1).indices
    cell = patches.expand(B, S, -1, -1).gather(-1, surest).mT.flatten(2)
    chosen = cell[:, :, None].expand(-1, -1, K, -1)
    place = place.gather(3, chosen[..., None].expand(-1, -1, -1, -1, 2))
    certainty, best = certainty.gather(3, chosen), best.gather(3, chosen)
    return Matches(cell, where[cell], target, place, certainty, best)


def judge(matches: Matches, features: Tensor, head: MatchHead) -> Verdict:
    """What `head` says, [B, S, K, N], by the features [B, S, C, h, w] that found the matches."""
    unit = F.normalize(features.float().flatten(3), dim=2).mT
    own = unit.gather(2, matches.cell[..., None].expand(-1, -1, -1, unit.shape[-1]))
    every = torch.arange(len(unit), device=unit.device)[:, None, None]
    said = [
        head(own, unit[every, target[..., None], best], certainty)
        for target, best, certainty in zip(
            matches.target.unbind(2),
            matches.best.unbind(2),
            matches.certainty.unbind(2),
            strict=True,
        )
    ]
    return Verdict(*(torch.stack(x, 2) for x in zip(*said, strict=True)))


def refine(matches: Matches, features: Tensor, head: MatchHead) -> Matches:
    """The same matches as `head` sees them; the less exact they are, the less they count."""
    h, w = features.shape[-2:]
    said = judge(matches, features, head)
    offset = said.offset.clamp(-REACH, REACH) / (max(h, w) / 2)
    exact = (EXACT / said.log_error.exp()).clamp(max=1)
    place = places(h, w).to(offset)[matches.best] + offset
    return matches._replace(place=place, certainty=said.logit.sigmoid() * exact)


def others(features: Tensor, side: int, count: int = 8) -> Tensor:
    """[B, S, K] the frames to match each with: all others, or the two beside and the most alike.

    features: [B, S, C, h, w]; side: cells of a patch's side, which are compared as one. A single
    frame is matched with itself.
    """
    B, S = features.shape[:2]
    order = torch.arange(S, device=features.device)
    if count + 1 >= S:
        return (order[:, None] + order[min(1, S - 1) :]).remainder(S).expand(B, -1, -1)
    unit = F.normalize(features.float().flatten(0, 1), dim=1)
    coarse = F.normalize(F.avg_pool2d(unit, side).flatten(2).unflatten(0, (B, S)), dim=2)
    alike = [(coarse[:, s : s + 1].mT @ coarse).amax(-1).mean(-1) for s in range(S)]
    close = torch.stack(alike, 1)
    close = close + close.mT
    apart = (order[:, None] - order).abs()
    close = close + 9.0 * (apart == 1) - 9.0 * (apart == 0)
    return close.topk(count, dim=-1).indices


def places(h: int, w: int) -> Tensor:
    """[h w, 2]: where cells lie."""
    rows, columns = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    xy = torch.stack([columns, rows], -1).flatten(0, 1)
    return (xy - torch.tensor([w / 2, h / 2])) / (max(h, w) / 2)


def _around(h: int, w: int) -> Tensor:
    """[h w, 9] int64: the cells around each cell; beyond the border the nearest."""
    step = torch.arange(-1, 2)
    rows = (torch.arange(h)[:, None] + step).clamp(0, h - 1)  # [h, 3]
    columns = (torch.arange(w)[:, None] + step).clamp(0, w - 1)
    return (rows[:, None, :, None] * w + columns[None, :, None]).flatten(2).flatten(0, 1)
