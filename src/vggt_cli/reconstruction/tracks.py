"""Feature tracks: the same spot of the scene in several photos, measured at full size.

Three sources, each for what the one before it left: SIFT for all photos; for those where it finds
too little the tracker of the network, if it has one, then XFeat, if it is installed. The matches of
every source pass the same two-view verification.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats.colmap import Array
from vggt_cli.formats.features import NOTHING, Camera, Features, TwoView, verify
from vggt_cli.models.networks import Network
from vggt_cli.reconstruction import detect
from vggt_cli.reconstruction.matches import union
from vggt_cli.reconstruction.pairs import EXHAUSTIVE, Guess, alike, choose
from vggt_cli.reconstruction.sources import (
    Pair,
    Source,
    by_likeness,
    by_tracker,
    clear,
    has_tracker,
    inside,
)
from vggt_cli.scene import ImageSet, Photo, Tracks

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # stage, done, total

ENOUGH = 100  # observations in tracks: a photo with fewer asks the next source
# A pair needs that many verified matches if its rotation is about the predicted one, and if not:
# repeated structure gives few and wrong ones. The prediction weighs, but strong evidence wins.
AGREED, DISAGREED, DISAGREED_SHARE = 15, 30, 0.25
AGREEMENT = 30.0  # degrees: what a rough network may be off
COMPARED = 4096  # features of a photo, the largest, where not every pair is compared
QUERIES = 8  # photos at most whose points the network's tracker follows


@dataclass(frozen=True)
class ImageRow:
    """What was found in a photo."""

    name: str
    keypoints: int  # of all sources, away from masks and borders
    matched: int  # of these, with a likely partner in another photo
    verified: int  # of these, with a partner that a two-view geometry explains
    tracks: int  # observations
    partners: int  # photos with which it shares verified matches
    sources: tuple[str, ...]  # of the verified: "sift", "tracker", "xfeat"


@dataclass(frozen=True, eq=False)
class FeatureTracks:
    """Tracks and how they came about."""

    tracks: Tracks  # in two frames or more, once in each; xyz are zeros, since nobody knows them
    images: tuple[ImageRow, ...]  # [S]
    pairs: Tensor  # [P, 2] int64 frames i < j that share verified matches, ascending
    verified: Tensor  # [P] int64 how many


class _Verified(NamedTuple):
    """A source whose matches were tested."""

    name: str
    xy: list[Array]  # [S] of [n, 2]
    matched: list[Array]  # [S] of [n] bool
    inliers: dict[Pair, Array]  # [m, 2], of pairs that hold


def follow(
    photos: Sequence[Photo],
    images: ImageSet,
    guess: Guess,
    network: Network | None = None,
    cache: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> FeatureTracks:
    """Tracks through `photos`, in pixels of their upright files; the same input gives the same.

    images: of the same photos. Nothing is observed in pixels of it that are not valid, nor in
    those that touch one or the border. guess: see `pairs`. network: its tracker is asked where SIFT
    finds too little, which is under 100 observations in a photo. cache: folder for features, None
    for none; `detect.cache_folder()` is the user's.
    A photo in which nothing is found has no observations, and its row says so.
    """
    assert len(photos) == len(images) == len(guess.cameras), (len(photos), len(images))
    region = clear(images)
    detected = detect.sift(photos, cache, lambda n: progress("find features", n, len(photos)))
    features = [_kept(f, i, images, region) for i, f in enumerate(detected)]
    looks = torch.zeros(len(photos), len(photos))
    if len(photos) > EXHAUSTIVE:
        vectors = [torch.from_numpy(f.vectors) for f in features]
        looks = alike(vectors, partial(progress, "compare photos"))
        # A quarter of the time; adjustment takes a thousand tracks of a photo.
        features = [Features(f.xy[:COMPARED], f.vectors[:COMPARED]) for f in features]
    pairs = choose(guess.covisible, looks)
    test = partial(_verified, guess=guess, progress=partial(progress, "match features"))
    found = [test(by_likeness("sift", features, pairs))]
    weak = _weak(found)
    if weak and network is not None and has_tracker(network, images):
        spread = np.linspace(0, len(weak) - 1, min(len(weak), QUERIES)).round().astype(int)
        asked = {weak[k]: [i + j - weak[k] for i, j in pairs if weak[k] in (i, j)] for k in spread}
        found += [test(source) for source in by_tracker(network, images, region, asked)]
        weak = _weak(found)
    few = [pair for pair in pairs if set(pair) & set(weak)]
    if learned := _learned(photos, few, cache):
        features = [_kept(f, i, images, region) for i, f in enumerate(learned)]
        found.append(test(by_likeness("xfeat", features, few, ratio=1.0)))  # as in XFeat's paper
    return _gathered(images.names, found)


def _kept(features: Features, frame: int, images: ImageSet, region: Tensor) -> Features:
    kept = inside(features.xy, frame, images, region)
    return Features(features.xy[kept], features.vectors[kept])


def _learned(
    photos: Sequence[Photo], pairs: Sequence[Pair], cache: Path | None
) -> list[Features] | None:
    """XFeat's features of the photos in `pairs`; None where there are none or it is missing."""
    wanted = {i for pair in pairs for i in pair}
    try:
        found = {i: detect.xfeat(photos[i], cache) for i in sorted(wanted)}
    except InputError as error:
        log.warning("few features in some photos, and %s; %s", error, error.hint)
        return None
    return [found.get(i, NOTHING) for i in range(len(photos))] if found else None


def _verified(source: Source, guess: Guess, progress: Callable[[int, int], None]) -> _Verified:
    """The matches of `source` that a two-view geometry explains, pair by pair."""
    intrinsics, rotation = (
        x.double().numpy() for x in (guess.cameras.intrinsics, guess.cameras.extrinsics[:, :, :3])
    )
    sizes = [(int(h), int(w)) for h, w in guess.cameras.image_size]
    cameras = [Camera(k, size) for k, size in zip(intrinsics, sizes, strict=True)]
    matched = [np.zeros(len(xy), bool) for xy in source.xy]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # RANSAC lets go of Python's lock
        tested = []
        for done, ((i, j), rows) in enumerate(source.matches, 1):
            matched[i][rows[:, 0]] = True
            matched[j][rows[:, 1]] = True
            views = (cameras[i], cameras[j]), (source.xy[i], source.xy[j])
            if len(rows) >= AGREED:  # fewer never hold, and strangers take RANSAC longest
                tested.append(((i, j), len(rows), pool.submit(verify, *views, rows)))
            progress(done, source.pairs)
        inliers = {}
        for (i, j), count, future in tested:
            if _holds(future.result(), count, rotation[j] @ rotation[i].T):
                inliers[i, j] = future.result().inliers
    return _Verified(source.name, source.xy, matched, inliers)


def _holds(found: TwoView, matches: int, predicted: Array) -> bool:
    """Whether the evidence is enough; a rotation unlike the `predicted` [3, 3] takes more."""
    if found.rotation is not None:
        cosine = (np.trace(found.rotation @ predicted.T) - 1) / 2
        if np.degrees(np.arccos(np.clip(cosine, -1, 1))) <= AGREEMENT:
            return len(found.inliers) >= AGREED
    return len(found.inliers) >= max(DISAGREED, DISAGREED_SHARE * matches)


def _weak(found: Sequence[_Verified]) -> list[int]:
    """The frames with under 100 verified places."""
    count = [0] * len(found[0].xy)
    for source in found:
        seen = [np.zeros(len(xy), bool) for xy in source.xy]
        for pair, rows in source.inliers.items():
            for frame, of_frame in zip(pair, rows.T, strict=True):
                seen[frame][of_frame] = True
        count = [n + int(x.sum()) for n, x in zip(count, seen, strict=True)]
    return [i for i, n in enumerate(count) if n < ENOUGH]


def _gathered(names: Sequence[str], found: Sequence[_Verified]) -> FeatureTracks:
    """The sources' matches joined to tracks; features at the same spot of a photo are one place."""
    xy, frame, node = _places([source.xy for source in found])
    edges, weights = [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
    matched, shared = np.zeros(len(xy), bool), Counter[Pair]()
    sources: list[list[str]] = [[] for _ in names]
    for source, places in zip(found, node, strict=True):
        for of_frame, yes in zip(places, source.matched, strict=True):
            matched[of_frame[yes]] = True
        for (i, j), rows in source.inliers.items():
            edges.append(np.stack([places[i][rows[:, 0]], places[j][rows[:, 1]]], 1))
            weights.append(np.full(len(rows), len(rows)))
            shared[i, j] += len(rows)
            for k in (i, j):
                sources[k] += [source.name] * (source.name not in sources[k])
    ends = np.concatenate(edges)
    tracks = _tracks(xy, frame, ends, np.concatenate(weights))
    count = partial(np.bincount, minlength=len(names))
    counts = np.stack(
        [
            count(frame),
            count(frame[matched]),
            count(frame[np.unique(ends)]),
            count(tracks.frame.numpy()),
            count(np.array(list(shared), np.int64).ravel()),
        ],
        axis=1,
    ).tolist()
    pairs = sorted(shared)
    return FeatureTracks(
        tracks,
        tuple(map(_row, names, counts, sources)),
        torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        torch.tensor([shared[pair] for pair in pairs], dtype=torch.long),
    )


def _row(name: str, counts: Sequence[int], sources: Sequence[str]) -> ImageRow:
    keypoints, matched, verified, tracks, partners = counts
    return ImageRow(name, keypoints, matched, verified, tracks, partners, tuple(sources))


def _places(sources: Sequence[list[Array]]) -> tuple[Array, Array, list[list[Array]]]:
    """Distinct places xy [n, 2] with their frames [n], and the place of each source's features."""
    node: list[list[Array]] = [[] for _ in sources]
    xy: list[Array] = []
    start = 0
    for of_frame in zip(*sources, strict=True):
        distinct, which = np.unique(np.concatenate(of_frame), axis=0, return_inverse=True)
        ends = np.cumsum([len(x) for x in of_frame])
        for mine, part in zip(node, np.split(which.ravel() + start, ends[:-1]), strict=True):
            mine.append(part)
        xy.append(distinct)
        start += len(distinct)
    return np.concatenate(xy), np.repeat(np.arange(len(xy)), [len(x) for x in xy]), node


def _tracks(xy: Array, frame: Array, edges: Array, weight: Array) -> Tracks:
    label = union(*(torch.from_numpy(x) for x in (frame, edges, weight))).numpy()
    _, number, length = np.unique(label, return_inverse=True, return_counts=True)
    seen = np.flatnonzero(length[number] > 1)
    order = seen[np.lexsort((frame[seen], number[seen]))]
    _, point = np.unique(number[order], return_inverse=True)
    return Tracks(
        torch.zeros(int(np.sum(length > 1)), 3),
        torch.from_numpy(point.astype(np.int64)),
        torch.from_numpy(frame[order].astype(np.int32)),
        torch.from_numpy(xy[order].astype(np.float32)),
    )
