"""Which photos are worth comparing: by the predicted geometry, by looks and by order.

S frames. No source alone decides: where the prediction is wrong, looks and order still bring
photos together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cli.device import one_thread_each
from vggt_cli.geometry import project, resize, unproject
from vggt_cli.reconstruction.matches import count_matches
from vggt_cli.scene import Cameras, ImageSet, Prediction, Tracks

ALL_PAIRS = 300  # photos at most of which tables of every two are made unasked
EXHAUSTIVE = 20  # photos up to which every pair is compared: 190 pairs
BY_GEOMETRY, BY_LOOKS, BY_ORDER = 10, 5, 2  # partners of a photo beyond that
AGREEMENT = 0.2  # of the depth: rough networks may err that much and still see the same place
SAMPLES = 32  # pixels along each side of a frame
LARGEST = 256  # features of a photo that stand for its looks
AT_ONCE = 8  # photos whose looks are compared with one photo's
ALIKE = 8  # of these match between photos that do look alike; strangers have one or two


@dataclass(frozen=True, eq=False)
class Guess:
    """What is believed of the photos before a feature was looked at; it may be wrong."""

    cameras: Cameras  # [S] pixels of the upright source images
    covisible: Tensor  # [S, S] float32 in [0, 1]: share of the first's pixels that the second sees

    def __post_init__(self) -> None:
        S = len(self.cameras)
        assert self.covisible.shape == (S, S), self.covisible.shape


def guess(prediction: Prediction, images: ImageSet) -> Guess:
    """What a network's cameras and depth say."""
    cameras = resize(prediction.cameras, images.source_from_network, images.source_size)
    return Guess(cameras, covisible(prediction, images.valid))


def guess_from_tracks(cameras: Cameras, tracks: Tracks) -> Guess:
    """What a model without depth says: frames that see the same points see the same place."""
    shared = torch.zeros(len(cameras), len(cameras))
    seen = torch.zeros(len(cameras), len(tracks.xyz), dtype=torch.bool)
    seen[tracks.frame.long(), tracks.point] = True
    for i, points in enumerate(seen):
        shared[i] = seen[:, points].float().mean(1) if points.any() else 0
    return Guess(cameras, shared)


def covisible(prediction: Prediction, valid: Tensor) -> Tensor:
    """[S, S] float32: share of the first frame's `valid` pixels [S, H, W] that the second sees.

    A pixel is seen where its point lies before the camera, in the image, and within 20 % of the
    depth there.
    """
    cameras, depth = prediction.cameras, prediction.depth
    S, H, W = depth.shape
    rows = torch.linspace(0, H - 1, min(H, SAMPLES)).round().long()
    columns = torch.linspace(0, W - 1, min(W, SAMPLES)).round().long()
    share = torch.zeros(S, S)
    for i in range(S):
        usable = (valid[i] & depth[i].isfinite() & (depth[i] > 0))[rows[:, None], columns]
        points = unproject(depth[i], cameras.intrinsics[i], cameras.extrinsics[i])
        points = points[rows[:, None], columns][usable]  # [n, 3]
        if not len(points):
            continue
        everywhere = points.expand(S, 1, -1, 3)
        xy, z = (x[:, 0] for x in project(everywhere, cameras.intrinsics, cameras.extrinsics))
        inside = (z > 0) & (xy >= 0).all(-1) & (xy[..., 0] < W) & (xy[..., 1] < H)
        column, row = torch.where(inside[..., None], xy, 0).long().unbind(-1)
        # What is looked up, not whole maps: those would be S times S.
        pixel = row * W + column
        there = depth.flatten(1).gather(1, pixel)
        known = valid.flatten(1).gather(1, pixel) & (there > 0)  # infinite depth agrees with none
        share[i] = (inside & known & ((there - z).abs() < AGREEMENT * z)).float().mean(1)
    return share


def alike(
    vectors: Sequence[Tensor], progress: Callable[[int, int], None] = lambda done, total: None
) -> Tensor:
    """[S, S] float32: how many of the first of each photo's features `vectors` [n, D] match.

    progress: photos done, of all.
    Source: Wu, 3DV 2013, section 3.1 (the largest features tell whether the rest is worth it).
    """
    counts = torch.zeros(len(vectors), len(vectors))
    few = [x[:LARGEST] for x in vectors]

    def row(i: int) -> Tensor:
        starts = range(i + 1, len(few), AT_ONCE)
        return torch.cat([count_matches(few[i], few[at : at + AT_ONCE]) for at in starts])

    with one_thread_each() as pool:
        for i, found in enumerate(pool.map(row, range(len(few) - 1))):
            counts[i, i + 1 :] = counts[i + 1 :, i] = found
            progress(i + 1, len(few))
    return counts


def choose(covisible: Tensor, looks: Tensor) -> list[tuple[int, int]]:
    """Pairs i < j to compare, ascending; all of them for few photos.

    covisible, looks: [S, S], of `Guess` and of `alike`.
    """
    S = len(covisible)
    if S <= EXHAUSTIVE:
        return [(i, j) for i in range(S) for j in range(i + 1, S)]
    wanted = torch.zeros(S, S, dtype=torch.bool)
    either = torch.maximum(covisible, covisible.mT)
    for score, least, count in ((either, 0.0, BY_GEOMETRY), (looks, ALIKE - 1, BY_LOOKS)):
        alone = score.clone().fill_diagonal_(-1)
        best = alone.sort(dim=1, descending=True, stable=True)
        rows = torch.arange(S)[:, None].expand(S, count)
        chosen = best.values[:, :count] > least
        wanted[rows[chosen], best.indices[:, :count][chosen]] = True
    for step in range(1, BY_ORDER + 1):
        wanted.diagonal(step).fill_(True)
    i, j = (wanted | wanted.mT).triu(1).nonzero().unbind(1)
    return list(zip(i.tolist(), j.tolist(), strict=True))
