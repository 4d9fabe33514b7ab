"""Where matches come from: likeness of features, and the tracker of a network.

S frames, M points that are followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.device import exact_convolutions, one_thread_each
from vggt_cli.formats.colmap import Array
from vggt_cli.formats.features import Features
from vggt_cli.models.networks import Network
from vggt_cli.models.vggt import VGGT
from vggt_cli.reconstruction.matches import RATIO, match
from vggt_cli.scene import ImageSet

Pair = tuple[int, int]  # frames i < j

STEP = 16  # network pixels between points that a tracker is asked for
TRACKABLE = 140  # network pixels, shorter side: the tracker's smallest image
SURE = 0.5  # visibility and confidence, both in [0, 1], of a place that counts


class Source(NamedTuple):
    """Places in each photo, and which of them may be the same spot."""

    name: str
    xy: list[Array]  # [S] of [n, 2] float32 pixels of the upright source image
    pairs: int  # how many `matches` has
    matches: Iterator[tuple[Pair, Array]]  # [m, 2] int64 rows of the two frames' places


def clear(images: ImageSet) -> Tensor:
    """[S, H, W] bool: valid pixels that touch neither a masked one nor the image's border."""
    blocked = F.pad((~images.valid).float()[:, None], (1, 1, 1, 1), value=1.0)
    return F.max_pool2d(blocked, 3, 1)[:, 0] == 0


def inside(xy: Array, frame: int, images: ImageSet, region: Tensor) -> Array:
    """[n] bool: which source pixels [n, 2] of a frame are in the `region` [S, H, W]."""
    H, W = images.size
    scale = images.source_from_network[frame].diagonal()[:2].numpy()
    shift = images.source_from_network[frame, :2, 2].numpy()
    column, row = np.floor((xy - shift) / scale).astype(np.int64).T
    there = (column >= 0) & (row >= 0) & (column < W) & (row < H)
    kept = region[frame].numpy()[np.where(there, row, 0), np.where(there, column, 0)]
    both: Array = kept & there
    return both


def by_likeness(
    name: str, features: Sequence[Features], pairs: Sequence[Pair], ratio: float = RATIO
) -> Source:
    """Features of the two photos of a pair that are each other's nearest; see `match`."""
    vectors = [torch.from_numpy(f.vectors) for f in features]

    def found(pair: Pair) -> Array:
        i, j = pair
        return torch.stack(match(vectors[i], vectors[j], ratio), 1).numpy()

    def matches() -> Iterator[tuple[Pair, Array]]:
        with one_thread_each() as pool:
            yield from zip(pairs, pool.map(found, pairs), strict=True)

    return Source(name, [f.xy for f in features], len(pairs), matches())


def has_tracker(network: Network | None, images: ImageSet) -> bool:
    """Whether `by_tracker` can be asked."""
    there = isinstance(network, VGGT) and network.track_head is not None
    return there and min(images.size) >= TRACKABLE and len(images) > 1


def by_tracker(
    network: Network, images: ImageSet, region: Tensor, asked: Mapping[int, Sequence[int]]
) -> Iterator[Source]:
    """A grid of points in each of the frames `asked`, followed by the network to other frames.

    region: [S, H, W] bool, where places count. asked: the other frames, by the grid's frame.
    """
    assert isinstance(network, VGGT), type(network)
    device = next(network.parameters()).device
    with torch.inference_mode(), exact_convolutions():
        cached = network.aggregate(images.pixels[None].to(device))
    for query, others in asked.items():
        grid = torch.zeros_like(region[query])
        grid[STEP // 2 :: STEP, STEP // 2 :: STEP] = True
        points = (grid & region[query]).nonzero().flip(-1)  # (x, y); the centre of one is (0, 0)
        if len(points) and len(others):
            # The tracker follows from the frame that comes first, whichever that is.
            frames = [query, *others]
            turned = {n: x[:, torch.tensor(frames, device=x.device)] for n, x in cached.items()}
            xy, sure = _followed(network, turned, images, frames, points)
            seen = [sure[k] & inside(xy[k], i, images, region) for k, i in enumerate(frames)]
            yield _tracked(len(images), frames, xy, seen)


def _followed(
    network: VGGT, cached: dict[int, Tensor], images: ImageSet, frames: list[int], points: Tensor
) -> tuple[Array, Array]:
    """Source pixels [F, M, 2] and certainty [F, M] bool of network pixels [M, 2] of the first."""
    with torch.inference_mode(), exact_convolutions():
        asked = points[None].to(images.pixels).to(next(network.parameters()).device)
        found = network.track(cached, images.size, asked)
    sure = (found.visibility[0] > SURE) & (found.confidence[0] > SURE)
    maps = images.source_from_network[frames]
    xy = (found.xy[-1, 0].cpu().double() + 0.5) * maps.diagonal(dim1=1, dim2=2)[:, None, :2]
    return (xy + maps[:, None, :2, 2]).float().numpy(), sure.cpu().numpy()


def _tracked(count: int, frames: list[int], xy: Array, seen: list[Array]) -> Source:
    """Places xy [F, M, 2] of the `frames` of `count`, each a match of the first's where `seen`."""
    places = [np.empty((0, 2), np.float32)] * count
    for k, frame in enumerate(frames):
        places[frame] = xy[k]
    first, others = frames[0], frames[1:]

    def matches() -> Iterator[tuple[Pair, Array]]:
        for k, other in enumerate(others, 1):
            rows = np.flatnonzero(seen[k])
            yield (min(first, other), max(first, other)), np.stack([rows, rows], 1)

    return Source("tracker", places, len(others), matches())
