"""From features of single photos to tracks through many: nearest neighbours, union."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vggt_cli.device import multiplies_int8
from vggt_cli.formats.colmap import Array

RATIO = 0.8  # of the distances to the nearest and the second nearest descriptor
ROWS = 64  # of the table of likenesses that are held at a time: it stays in the processor's cache
BLOCK = 64  # columns of that table whose largest is found first


def match(first: Tensor, second: Tensor, ratio: float = RATIO) -> tuple[Tensor, Tensor]:
    """Rows of descriptors [n, D] and [m, D] that are each other's nearest, clearly so in `first`.

    ratio: of the distance to the nearest and to the second nearest, below which it is clear.
    Descriptors of uint8 give the same on every machine: sums of their products are exact.
    Source: Lowe, IJCV 2004, section 7.1.
    """
    if not len(first) or len(second) < 2:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    n, m = len(first), len(second)
    fill = _cosines(first, second, ROWS)
    blocks = max(2, -(-m // BLOCK))
    table = torch.full((ROWS, blocks * BLOCK), -2.0)  # less than any cosine where there is none
    most = torch.full((m,), -2.0)  # that any row is like each of `second`
    rows, partners, likeness = [], [], []
    for start in range(0, n, ROWS):
        part = table[: min(ROWS, n - start)]
        fill(slice(start, start + len(part)), part[:, :m])
        torch.maximum(most, part[:, :m].amax(0), out=most)
        value, index = _two_largest(part.unflatten(1, (blocks, BLOCK)))
        distance = (2 - 2 * value).clamp(min=0).sqrt()
        clear = (distance[:, 0] < ratio * distance[:, 1]).nonzero()[:, 0]
        rows.append(clear + start)
        partners.append(index[clear])
        likeness.append(value[clear, 0])
    row, partner = torch.cat(rows), torch.cat(partners)
    mutual = (torch.cat(likeness) >= most[partner]).nonzero()[:, 0]
    # Of rows that are equally like the same partner the first counts.
    _, once = np.unique(partner[mutual].numpy(), return_index=True)
    kept = mutual[np.sort(once)]
    return row[kept], partner[kept]


def count_matches(first: Tensor, others: Sequence[Tensor]) -> Tensor:
    """[K] float32: how many rows of `first` [n, D] `match` finds in each of `others` [m, D].

    For few rows: the whole table is held.
    """
    length = torch.tensor([len(x) for x in others])
    K, m = len(others), max(map(len, others), default=0)
    if not len(first) or m < 2:
        return torch.zeros(K)
    second = pad_sequence(list(others), batch_first=True).flatten(0, 1)
    table = torch.empty(len(first), K * m)
    _cosines(first, second, len(first))(slice(None), table)
    table = table.unflatten(1, (K, m))
    if int(length.min()) < m:
        table.masked_fill_(torch.arange(m) >= length[:, None], -2)
    value, index = table.topk(2, dim=2)
    distance = (2 - 2 * value).clamp(min=0).sqrt()
    clear = (distance[..., 0] < RATIO * distance[..., 1]) & (length > 1)  # [n, K]
    partner = index[..., 0].mT  # [K, n]
    mutual = value[..., 0].mT >= table.amax(0).gather(1, partner)
    other, row = (clear.mT & mutual).nonzero().unbind(1)
    found = torch.zeros(K, m)
    found[other, partner[other, row]] = 1
    return found.sum(1)


def _cosines(first: Tensor, second: Tensor, rows: int) -> Callable[[slice, Tensor], object]:
    """What writes the cosines of some rows of `first` with all of `second` into a table [r, m].

    rows: that are asked for at a time, at most.
    """
    if first.dtype != torch.uint8:
        a, b = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
        return lambda some, table: torch.mm(a[some], b.mT, out=table)
    over_first, over_second = (1 / x.float().norm(dim=1).clamp(min=1) for x in (first, second))
    products = _whole_products(first, second, rows)

    def fill(some: slice, table: Tensor) -> None:
        products(some, table)
        table.mul_(over_second).mul_(over_first[some, None])

    return fill


def _whole_products(first: Tensor, second: Tensor, rows: int) -> Callable[[slice, Tensor], object]:
    """What writes the products of rows of uint8 into a table; exact, as sums under 2^24 are."""
    if not multiplies_int8():
        a, b = first.float(), second.float()
        return lambda some, table: torch.mm(a[some], b.mT, out=table)
    # int8 ends at 127, so 128 less of each: a b = (a - 128)(b - 128) + 128 (a + b) - 128 128.
    near, far = ((x.short() - 128).to(torch.int8) for x in (first, second))
    to_row = 128 * first.int().sum(1, keepdim=True).float()
    to_column = (128 * second.int().sum(1) - 128 * 128 * second.shape[1]).int()
    far = far.T.contiguous()
    held = torch.empty(rows, len(second), dtype=torch.int32)

    def fill(some: slice, table: Tensor) -> None:
        exact = torch._int_mm(near[some], far, out=held[: len(table)])
        table.copy_(exact.add_(to_column)).add_(to_row[some])

    return fill


def _two_largest(table: Tensor) -> tuple[Tensor, Tensor]:
    """[r, 2] the two largest of each row of `table` [r, B, BLOCK], and [r] where the first is.

    They lie in the two blocks whose largest are largest.
    """
    block = table.amax(2).topk(2, dim=1).indices  # [r, 2]
    inside = table.gather(1, block[..., None].expand(-1, -1, BLOCK)).flatten(1)
    value, index = inside.topk(2, dim=1)
    place = index[:, :1]
    return value, (block.gather(1, place // BLOCK) * BLOCK + place % BLOCK)[:, 0]


def union(frame: Tensor, edges: Tensor, weight: Tensor) -> Tensor:
    """[n] int64: the track that each of n places belongs to, numbered by its first place.

    Places that `edges` connect are one track, but no two of a frame: where they would be, the
    edges are taken from the heaviest down, and those that would bring them together are left out.
    frame: [n] of each place. edges: [E, 2] places. weight: [E].
    """
    n = len(frame)
    ends, of = edges.numpy().reshape(-1, 2), frame.numpy().astype(np.int64)
    graph = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), (n, n))
    _, label = connected_components(graph, directed=False)
    place = label * (of.max(initial=0) + 1) + of  # of a track in a frame
    values, count = np.unique(place, return_counts=True)
    torn = np.isin(label, np.unique(label[np.isin(place, values[count > 1])]))
    parent = np.arange(n)
    first = np.full(n, n)
    np.minimum.at(first, label, parent)
    parent = np.where(torn, parent, first[label])
    inside = np.flatnonzero(torn[ends[:, 0]])
    heavy = inside[np.argsort(-weight.numpy()[inside], kind="stable")]
    _join_greedily(parent, of, ends[heavy])
    return torch.from_numpy(parent)


def _join_greedily(parent: Array, frame: Array, edges: Array) -> None:
    """Joins along `edges` in their order but where a frame would come twice; changes `parent`."""
    members: dict[int, list[int]] = {}
    for a, b in edges.tolist():
        low, high = sorted((int(parent[a]), int(parent[b])))
        ours, theirs = members.get(low, [low]), members.get(high, [high])
        if low == high or {frame[k] for k in ours} & {frame[k] for k in theirs}:
            continue
        parent[theirs] = low
        members[low] = ours + theirs
        members.pop(high, None)
