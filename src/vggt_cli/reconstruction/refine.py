"""Cameras that feature tracks confirm: bundle adjustment, structure from motion, or neither.

The prediction is kept unless tracks that were held out say that other cameras are better.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from vggt_cli.errors import GeometryError
from vggt_cli.formats import adjust
from vggt_cli.geometry import keep_points
from vggt_cli.reconstruction.align import fit_cameras, hold_first
from vggt_cli.reconstruction.judge import CLOSE, Score, hold_out, objection, score
from vggt_cli.reconstruction.triangulate import Points, pixel_scale, triangulate
from vggt_cli.scene import Cameras, Setup, Tracks

Method = Literal["ba", "sfm"]

log = logging.getLogger(__name__)

ROUNDS = 12  # of triangulation, filter and adjustment, at most
FIRST_LIMIT = 50.0  # pixels at 1024: what may agree before anything was adjusted
SHARED_POINTS = 10  # that join an image to another
INLIERS = 0.15  # of an image's observations: fewer, and it does not take part
ROUGH = 10.0  # pixels at 1024: a limit above it is that of cameras far off
POINTS = {False: 1000, True: 200}  # of an image in an adjustment; while it is rough
ENOUGH_TRACKS = 20
SETTLED = 0.002  # of the observations that agree: a smaller change ends the rounds
RADIAL_IMAGES = 5  # that share a lens before its radial term is tried
RADIAL_GAIN = 0.98  # of the held-out error without it: what it must come below
GOOD = 0.9  # of the held-out observations explained: structure from motion is not tried


@dataclass(frozen=True)
class RefineOptions:
    """What `refine` may do."""

    method: Literal["auto", "ba", "sfm"] = "auto"
    seed: int = 0  # which tracks are held out, and what pycolmap draws
    fixed_intrinsics: bool = False  # they are known; focal length and lens stay as they are


Outcome = Literal["kept", "re-aligned", "predicted"]


@dataclass(frozen=True)
class ImageReport:
    """What became of one image.

    Its refined pose was kept, or its predicted pose was moved with the others, or all poses are
    those predicted.
    """

    outcome: Outcome
    inliers: int  # observations within CLOSE of their points
    tracks: int  # observations
    before: float  # median error in pixels of the photo, predicted cameras; NaN without tracks
    after: float
    reason: str  # in words, for an image whose refined pose was not kept


@dataclass(frozen=True)
class Verdict:
    """Which cameras were chosen, by what, and why."""

    method: Literal["none", "ba", "sfm"]  # none: the prediction
    before: Score | None  # of the prediction; None where nothing could be held out
    after: Score | None  # of the chosen cameras
    words: str  # in a sentence, with the figures of all that was tried


@dataclass(frozen=True, eq=False)
class Refined:
    """The cameras of choice and why they were chosen."""

    cameras: Cameras  # source pixels, in the world of the prediction; frame 0 has not moved
    radial: Tensor  # [S] float64 term of each lens, see `geometry.distort`; 0: pinhole
    tracks: Tracks  # with the points under these cameras; only observations that agree
    images: tuple[ImageReport, ...]  # [S]
    verdict: Verdict


@dataclass(frozen=True, eq=False)
class _Fit:
    """Cameras in the world of the prediction."""

    setup: Setup
    solved: Tensor  # [S] bool; the others keep their predicted pose
    reasons: dict[int, str] = field(default_factory=dict)  # of frames that are not solved


def refine(
    cameras: Cameras,
    tracks: Tracks,
    group: list[int],
    options: RefineOptions,
    exif: Tensor | None = None,
) -> Refined:
    """The best of the predicted `cameras` and of what `tracks` make of them; it raises nothing.

    cameras, tracks: in pixels of the upright source images; the points' xyz are not looked at.
    group: frame i shares its lens with those of equal group[i].
    exif: [S] focal length in pixels as the photos' headers have it, NaN where they do not.
    """
    predicted = _double(cameras, group)
    unchanged = _Fit(predicted, torch.zeros(len(group), dtype=torch.bool))
    tracks = keep_points(tracks, torch.bincount(tracks.point, minlength=len(tracks.xyz)) > 1)
    held, rest = hold_out(tracks, options.seed)
    verdict = Verdict("none", None, None, f"too few feature tracks: {len(tracks.xyz)}")
    if problem := objection(predicted, predicted):
        verdict = Verdict("none", None, None, f"the prediction cannot be refined: {problem}")
        return _result(cameras, predicted, unchanged, tracks, verdict)
    if len(rest.xyz) < ENOUGH_TRACKS or len(held.xyz) == 0:
        return _result(cameras, predicted, unchanged, tracks, verdict)
    before = score(predicted, held)
    best, chosen = before, unchanged
    method: Literal["none", "ba", "sfm"] = "none"
    notes = [f"predicted: {_words(before)}"]
    start = predicted if options.fixed_intrinsics else _square_pixels(predicted)
    for name in METHODS if options.method == "auto" else (options.method,):
        try:
            fit = METHODS[name](start, rest, held, options)
        except GeometryError as error:
            notes.append(f"{name}: {error}")
            continue
        reached, against = score(fit.setup, held), objection(fit.setup, predicted, exif)
        notes.append(f"{name}: {against or _words(reached)}")
        if not against and reached.beats(best):
            best, chosen, method = reached, fit, name
        if method != "none" and best.share >= GOOD and not chosen.reasons:
            break
    verdict = Verdict(method, before, best, "; ".join(notes))
    return _result(cameras, predicted, chosen, tracks, verdict)


def ba(start: Setup, rest: Tracks, held: Tracks, options: RefineOptions) -> _Fit:
    """Bundle adjustment from the cameras `start` on the tracks `rest`.

    One radial term is tried for lenses that five images share, and kept if the error on the tracks
    `held` falls. Raises GeometryError.
    """
    free = not options.fixed_intrinsics
    fit = _adjust(start, rest, frozenset(), free)
    sharing = [start.group[i] for i in fit.solved.nonzero()[:, 0].tolist()]
    several = frozenset(g for g in sharing if sharing.count(g) >= RADIAL_IMAGES)
    if free and several:
        try:
            bent = _adjust(fit.setup, rest, several, free)
        except GeometryError as error:
            log.debug("no radial term: %s", error)
        else:
            with_it, without = score(bent.setup, held), score(fit.setup, held)
            log.debug("radial term: %s; without: %s", _words(with_it), _words(without))
            if with_it.median < RADIAL_GAIN * without.median and not without.beats(with_it):
                fit = bent
    return _settle(fit, start)


def sfm(start: Setup, rest: Tracks, held: Tracks, options: RefineOptions) -> _Fit:
    """Cameras from the matches of the tracks `rest` alone, in the world of `start`, then `ba`.

    The better of two mappers by the tracks `held`; the second only if the first is not good.
    Raises GeometryError where neither finds a model.
    """
    best: tuple[Score, _Fit] | None = None
    failed = ""
    for mapper in ("global", "incremental"):
        try:
            found, frames = _mapped(start, rest, mapper, options.seed)
            solved = torch.zeros(len(start.group), dtype=torch.bool)
            solved[frames] = True
            fit = ba(_settle(_Fit(found, solved), start).setup, rest, held, options)
            fit = _settle(fit, start)
        except GeometryError as error:
            failed = f"{failed}; {error}" if failed else str(error)
            continue
        reached = score(fit.setup, held)
        if best is None or reached.beats(best[0]):
            best = reached, fit
        if best[0].share >= GOOD and bool(best[1].solved.all()):
            break
    if best is None:
        raise GeometryError(failed)
    return best[1]


METHODS: dict[Method, Callable[[Setup, Tracks, Tracks, RefineOptions], _Fit]]
METHODS = {"ba": ba, "sfm": sfm}


def _mapped(
    start: Setup, rest: Tracks, mapper: Literal["global", "incremental"], seed: int
) -> tuple[Setup, list[int]]:
    if len(start.group) == 2:
        return adjust.two_photos(start, rest, seed), [0, 1]
    found, frames = adjust.map_images(start, rest, mapper, seed)
    return Setup(found.cameras, start.radial, start.group), frames


def _adjust(start: Setup, tracks: Tracks, radial: frozenset[int], free: bool) -> _Fit:
    """Triangulate, filter, adjust, until nothing changes; frames that do not fit are left out.

    The limit of the filter follows the errors down to CLOSE. The world drifts in scale.
    Raises GeometryError.
    """
    setup, limit, count = start, FIRST_LIMIT, -1
    solved = torch.ones(len(start.group), dtype=torch.bool)
    tried: set[int] = set()
    for turn in range(ROUNDS):
        points = triangulate(tracks, setup, limit)
        typical = float(points.error[solved[tracks.frame.long()]].quantile(0.5))
        limit = max(CLOSE, min(3 * typical, 4 * FIRST_LIMIT))
        good = points.good(tracks, limit)
        solved, reasons = _taking_part(tracks, good, len(start.group))
        used = _problem(tracks, points, good & solved[tracks.frame.long()])
        log.debug(
            "round %d: error %.3f, limit %.2f, points %d", turn, typical, limit, len(used.xyz)
        )
        if len(used.xyz) < ENOUGH_TRACKS or int(solved.sum()) < 2:
            raise GeometryError(f"too few tracks agree: {len(used.xyz)} of {len(tracks.xyz)}")
        lost = [i for i in reasons if i not in tried] if turn > 0 else []
        tried.update(lost)
        seen = good & solved[tracks.frame.long()]
        if (found := _resected(setup, tracks, points, seen, lost)) is not None:
            setup = found
            continue
        if limit == CLOSE and abs(int(good.sum()) - count) <= SETTLED * count:
            return _Fit(setup, solved, reasons)
        count = int(good.sum())
        near = turn > 0 or limit < ROUGH  # far off, poses go before lenses
        loss = limit / 2 * float(pixel_scale(start.cameras).quantile(0.5))
        focal = free and near and int(solved.sum()) > 2  # two photos do not fix it
        how = adjust.Adjustment(loss, focal, radial if near else frozenset())
        most = POINTS[limit > CLOSE]
        setup = adjust.bundle_adjust(setup, _longest(used, most, len(start.group)), how)
    return _Fit(setup, solved, reasons)


def _taking_part(tracks: Tracks, good: Tensor, frames: int) -> tuple[Tensor, dict[int, str]]:
    """[S] bool frames that share enough good observations, and why each other one does not."""
    seen = torch.bincount(tracks.frame.long(), minlength=frames)
    agree = torch.bincount(tracks.frame.long()[good], minlength=frames)
    sound = agree >= torch.maximum(INLIERS * seen, torch.tensor(float(SHARED_POINTS)))
    rows = good & sound[tracks.frame.long()]
    ones = np.ones(int(rows.sum()), np.int32)
    at = (tracks.frame[rows].numpy(), tracks.point[rows].numpy())
    sees = csr_array((ones, at), shape=(frames, len(tracks.xyz)))
    _, part = connected_components((sees @ sees.T) >= SHARED_POINTS, directed=False)
    labels = torch.from_numpy(part.astype(np.int64))
    largest = torch.bincount(labels[sound]).argmax() if sound.any() else 0
    solved = sound & (labels == largest)
    reasons = {}
    for i in (~solved).nonzero()[:, 0].tolist():
        fraction = f"{int(agree[i])} of {int(seen[i])} observations agree with other images"
        reasons[i] = "shares too few points with the others" if sound[i] else fraction
    return solved, reasons


def _problem(tracks: Tracks, points: Points, rows: Tensor) -> Tracks:
    """The observations `rows` [K] bool of points that keep at least two."""
    enough = torch.bincount(tracks.point[rows], minlength=len(points.xyz)) >= 2
    rows = rows & enough[tracks.point]
    chosen = Tracks(points.xyz, tracks.point[rows], tracks.frame[rows], tracks.xy[rows])
    return keep_points(chosen, enough)


def _longest(tracks: Tracks, most: int, frames: int) -> Tracks:
    """The tracks that are among the `most` longest of a frame; more cost more than they give."""
    length = torch.bincount(tracks.point, minlength=len(tracks.xyz))
    chosen = torch.zeros(len(tracks.xyz), dtype=torch.bool)
    for frame in range(frames):
        point = tracks.point[tracks.frame == frame]
        chosen[point[length[point].argsort(descending=True, stable=True)[:most]]] = True
    return keep_points(tracks, chosen)


def _resected(
    setup: Setup, tracks: Tracks, points: Points, seen: Tensor, lost: list[int]
) -> Setup | None:
    """The cameras with those of `lost` that the points `seen` [K] bool by others place anew."""
    support = torch.bincount(tracks.point[seen], minlength=len(points.xyz)) >= 2
    extrinsics, any_found = setup.cameras.extrinsics.clone(), False
    scale = pixel_scale(setup.cameras)
    for i in lost:
        rows = (tracks.frame == i) & support[tracks.point]
        if int(rows.sum()) < ENOUGH_TRACKS:
            continue
        xyz, limit = points.xyz[tracks.point[rows]], 4 * CLOSE * float(scale[i])
        found = adjust.resect(setup, i, tracks.xy[rows], xyz, limit)
        if found is not None:
            extrinsics[i], any_found = found, True
    cameras = Cameras(extrinsics, setup.cameras.intrinsics, setup.cameras.image_size)
    return Setup(cameras, setup.radial, setup.group) if any_found else None


def _settle(fit: _Fit, start: Setup) -> _Fit:
    """The fit in the world of `start`: frame 0 and the scale stay, so do unsolved poses."""
    found, given = fit.setup.cameras, start.cameras.extrinsics
    similarity = fit_cameras(found.extrinsics[fit.solved], given[fit.solved])
    moved = similarity.cameras(found.extrinsics)
    moved[~fit.solved] = given[~fit.solved]
    cameras = Cameras(hold_first(moved, given[0]), found.intrinsics, found.image_size)
    return _Fit(Setup(cameras, fit.setup.radial, fit.setup.group), fit.solved, fit.reasons)


def _double(cameras: Cameras, group: list[int]) -> Setup:
    double = Cameras(cameras.extrinsics.double(), cameras.intrinsics.double(), cameras.image_size)
    return Setup(double, torch.zeros(len(cameras), dtype=torch.float64), tuple(group))


def _square_pixels(setup: Setup) -> Setup:
    """The same with one focal length for both axes, their geometric mean: so are sensors made."""
    intrinsics = setup.cameras.intrinsics.clone()
    focal = (intrinsics[:, 0, 0] * intrinsics[:, 1, 1]).sqrt()
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    cameras = Cameras(setup.cameras.extrinsics, intrinsics, setup.cameras.image_size)
    return Setup(cameras, setup.radial, setup.group)


def _words(score: Score) -> str:
    return (
        f"{100 * score.share:.1f} % of {score.observations} held-out observations "
        f"within {CLOSE:g} px, median {score.median:.2f} px"
    )


def _medians(error: Tensor, setup: Setup, tracks: Tracks) -> list[float]:
    """[S] median error of each image's observations, pixels of the photo; NaN without any."""
    frame, scale = tracks.frame.long(), pixel_scale(setup.cameras)
    return [
        float(error[frame == i].quantile(0.5) * scale[i]) if bool((frame == i).any()) else math.nan
        for i in range(len(setup.group))
    ]


def _result(
    cameras: Cameras, predicted: Setup, fit: _Fit, tracks: Tracks, verdict: Verdict
) -> Refined:
    """What `fit` gives, with its points and the table of images."""
    first, last = triangulate(tracks, predicted, CLOSE), triangulate(tracks, fit.setup, CLOSE)
    good = last.good(tracks, CLOSE)
    frame = tracks.frame.long()
    rows = zip(
        torch.bincount(frame[good], minlength=len(cameras)).tolist(),
        torch.bincount(frame, minlength=len(cameras)).tolist(),
        _medians(first.error, predicted, tracks),
        _medians(last.error, fit.setup, tracks),
        strict=True,
    )
    images = []
    for i, (inliers, seen, before, after) in enumerate(rows):
        outcome: Outcome = "re-aligned" if i in fit.reasons else "kept"
        outcome = "predicted" if verdict.method == "none" else outcome
        reason = verdict.words if verdict.method == "none" else fit.reasons.get(i, "")
        images.append(ImageReport(outcome, inliers, seen, before, after, reason))
    refined = fit.setup.cameras
    extrinsics = refined.extrinsics.to(cameras.extrinsics)
    intrinsics = refined.intrinsics.to(cameras.intrinsics)
    kept = _problem(tracks, last, good)
    return Refined(
        Cameras(extrinsics, intrinsics, cameras.image_size),
        fit.setup.radial,
        Tracks(kept.xyz.float(), kept.point, kept.frame, kept.xy),
        tuple(images),
        verdict,
    )
