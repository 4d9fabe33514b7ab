"""From features of single photos to tracks through many: nearest neighbours, union."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.formats.colmap import Array

RATIO = 0.8  # of the distances to the nearest and the second nearest descriptor
ROWS = 4096  # of the table of likenesses that are held at a time


def match(first: Tensor, second: Tensor, ratio: float = RATIO) -> tuple[Tensor, Tensor]:
    """Rows of descriptors [n, D] and [m, D] that are each other's nearest, clearly so in `first`.

    ratio: of the distance to the nearest and to the second nearest, below which it is clear.
    Source: Lowe, IJCV 2004, section 7.1.
    """
    if not len(first) or len(second) < 2:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    a, b = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
    rows, partners = [], []
    for start in range(0, len(a), ROWS):
        nearest = (a[start : start + ROWS] @ b.mT).topk(2, dim=1)
        distance = (2 - 2 * nearest.values).clamp(min=0).sqrt()
        clear = (distance[:, 0] < ratio * distance[:, 1]).nonzero()[:, 0]
        rows.append(clear + start)
        partners.append(nearest.indices[clear, 0])
    row, partner = torch.cat(rows), torch.cat(partners)
    # Only the partners of clear matches are asked back: a few of many, and along the fast axis.
    back = torch.cat([(b[part] @ a.mT).argmax(1) for part in partner.split(ROWS)])
    kept = back == row
    return row[kept], partner[kept]


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
