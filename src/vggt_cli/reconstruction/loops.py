"""Frames of far windows that see the same place: found by looks, confirmed by the network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.formats.colmap import Array
from vggt_cli.reconstruction.pairs import covisible
from vggt_cli.scene import ImageSet, Prediction

GRID = 8  # cells along each side of a thumbnail
LOOKED_AT = 2500  # frames at most, evenly spread: neighbours see the same place anyway
NEAR = 2  # links: windows within it are joined well enough
SHARED = 0.2  # of a frame's pixels that a frame of the other side must see


def descriptors(chunks: Iterable[tuple[ImageSet, Tensor | None]]) -> Tensor:
    """[S, D] float32 unit vectors whose products say how alike the frames of all chunks look.

    A chunk: images, and their tokens [S, 1+R, 2D] of the network if it gives any. Of these the
    registers count, as the camera token says where a frame stands and not what it shows; beside
    them, and alone where there are none, a thumbnail in colour. Measured: docs/windows.md.
    """
    thumbnails, registers = [], []
    for images, tokens in chunks:
        small = F.interpolate(images.pixels.float(), (GRID, GRID), mode="area")
        thumbnails.append(small.flatten(1))
        if tokens is not None:
            registers.append(tokens[:, 1:].float().mean(1))
    parts = [torch.cat(part) for part in (thumbnails, registers) if part]
    apart = [F.normalize(part - part.mean(0), dim=-1) for part in parts]
    return F.normalize(torch.cat(apart, 1), dim=-1)


def candidates(vectors: Tensor, owner: Tensor, hops: Array, limit: int) -> list[tuple[int, int]]:
    """Pairs of frames, at most `limit`, best first, that look as alike as frames of one window do.

    vectors: [S, D] of `descriptors`; owner: [S] window of each frame; hops: see `graph.hops`.
    Of pairs between the same windows or their neighbours only the best is taken.
    """
    apart = torch.from_numpy(hops)
    W = len(apart)
    some = torch.arange(0, len(vectors), -(-len(vectors) // LOOKED_AT))
    alike, window = vectors[some] @ vectors[some].T, owner[some]
    pair = window[:, None] * W + window
    best = torch.full((W * W,), -torch.inf)
    best = best.scatter_reduce(0, pair.flatten(), alike.flatten(), "amax").view(W, W)
    best[(apart <= NEAR) | (best < usual_within(vectors, owner))] = -torch.inf
    best = best.triu()
    taken: list[tuple[int, int]] = []
    while len(taken) < limit and best.max() > 0:
        a, b = divmod(int(best.argmax()), W)
        i, j = ((window == n).nonzero()[:, 0] for n in (a, b))
        row, column = divmod(int(alike[i][:, j].argmax()), len(j))
        taken.append((int(some[i[row]]), int(some[j[column]])))
        best[(apart[a] <= 1)[:, None] & (apart[b] <= 1)] = -torch.inf
        best[(apart[b] <= 1)[:, None] & (apart[a] <= 1)] = -torch.inf
    return taken


def usual_within(vectors: Tensor, owner: Tensor) -> float:
    """The median product of two frames that are half of one window's own frames apart."""
    found = []
    for number in owner.unique().tolist():
        own = vectors[owner == number]
        half = len(own) // 2
        if half:
            found.append((own[:-half] * own[half:]).sum(-1))
    return float(torch.cat(found).median()) if found else 1.0


def sees_both(prediction: Prediction, valid: Tensor, first: int) -> bool:
    """Whether some frame among the `first` ones and some other see the same points."""
    share = covisible(prediction, valid)
    across = torch.minimum(share[:first, first:], share[first:, :first].T)
    return bool(across.max() >= SHARED)
