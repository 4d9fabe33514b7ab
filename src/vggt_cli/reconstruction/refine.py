"""Cameras that feature tracks confirm: bundle adjustment, structure from motion, or neither.

The prediction is kept unless tracks that were held out say that other cameras are better.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vggt_cli.errors import GeometryError
from vggt_cli.formats import adjust
from vggt_cli.geometry import keep_points
from vggt_cli.reconstruction.bundle import ENOUGH_TRACKS, Fit, fit_tracks, select, settle
from vggt_cli.reconstruction.judge import CLOSE, Score, hold_out, objection, score
from vggt_cli.reconstruction.triangulate import pixel_scale, triangulate
from vggt_cli.scene import Cameras, Setup, Tracks

Method = Literal["ba", "sfm"]
Outcome = Literal["kept", "re-aligned", "predicted", "given"]

log = logging.getLogger(__name__)

RADIAL_IMAGES = 5  # that share a lens before its radial term is tried
RADIAL_GAIN = 0.98  # of the held-out error without it: what it must come below
TRUSTED = 0.2  # of the held-out observations explained: below it, other cameras are chance
GOOD = 0.9  # of the held-out observations explained: structure from motion is not tried


@dataclass(frozen=True)
class RefineOptions:
    """What `refine` may do."""

    method: Literal["auto"] | Method = "auto"  # auto: ba, then sfm if that is not good
    seed: int = 0  # which tracks are held out, and what pycolmap draws
    fixed_intrinsics: bool = False  # they are known; focal length and lens stay as they are
    fixed_poses: bool = False  # they are known: lenses alone are adjusted, by "ba"


@dataclass(frozen=True)
class ImageReport:
    """What became of one image.

    Its refined pose was kept, or its predicted pose was moved with the others, or all poses are
    those predicted, or those given as known.
    """

    outcome: Outcome
    inliers: int  # observations within CLOSE of their points
    tracks: int  # observations
    before: float  # median error in pixels of the photo, predicted cameras; NaN without tracks
    after: float
    reason: str  # in words, for an image whose pose the tracks do not confirm


@dataclass(frozen=True)
class Verdict:
    """Which cameras were chosen, by what, and why."""

    method: Literal["none"] | Method  # none: the prediction
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
    unchanged = Fit(predicted, torch.zeros(len(group), dtype=torch.bool))
    tracks = keep_points(tracks, torch.bincount(tracks.point, minlength=len(tracks.xyz)) > 1)
    held, rest = hold_out(tracks, options.seed)
    verdict = Verdict("none", None, None, f"too few feature tracks: {len(tracks.xyz)}")
    if problem := objection(predicted, predicted):
        verdict = Verdict("none", None, None, f"the prediction cannot be refined: {problem}")
        return _result(cameras, predicted, unchanged, tracks, verdict, options)
    if len(rest.xyz) < ENOUGH_TRACKS or len(held.xyz) == 0:
        return _result(cameras, predicted, unchanged, tracks, verdict, options)
    before, seen = score(predicted, held), torch.bincount(tracks.frame, minlength=len(group))
    best, chosen = before, unchanged
    method: Literal["none"] | Method = "none"
    notes = [f"before: {_words(before)}"]
    start = predicted if options.fixed_intrinsics else _square_pixels(predicted)
    for name in _methods(options):
        try:
            fit = METHODS[name](start, rest, held, options)
        except GeometryError as error:
            notes.append(f"{name}: {error}")
            continue
        reached, against = score(fit.setup, held), objection(fit.setup, predicted, exif)
        notes.append(f"{name}: {against or _words(reached)}")
        if not against and reached.share >= TRUSTED and reached.beats(best):
            best, chosen, method = reached, fit, name
        hopeful = [i for i in chosen.reasons if seen[i] >= ENOUGH_TRACKS]
        if method != "none" and best.share >= GOOD and not hopeful:
            break
    verdict = Verdict(method, before, best, "; ".join(notes))
    return _result(cameras, predicted, chosen, tracks, verdict, options)


def _methods(options: RefineOptions) -> tuple[Method, ...]:
    if options.fixed_poses:
        return ("ba",)
    return ("ba", "sfm") if options.method == "auto" else (options.method,)


def ba(start: Setup, rest: Tracks, held: Tracks, options: RefineOptions) -> Fit:
    """Bundle adjustment from the cameras `start` on the tracks `rest`.

    One radial term is tried for lenses that five images share, and kept if the error on the tracks
    `held` falls. Raises GeometryError.
    """
    free, poses = not options.fixed_intrinsics, not options.fixed_poses
    fit = fit_tracks(start, rest, frozenset(), free, poses)
    sharing = [start.group[i] for i in fit.solved.nonzero()[:, 0].tolist()]
    several = frozenset(g for g in sharing if sharing.count(g) >= RADIAL_IMAGES)
    if free and several:
        try:
            bent = fit_tracks(fit.setup, rest, several, free, poses)
        except GeometryError as error:
            log.debug("no radial term: %s", error)
        else:
            with_it, without = score(bent.setup, held), score(fit.setup, held)
            log.debug("radial term: %s; without: %s", _words(with_it), _words(without))
            if with_it.median < RADIAL_GAIN * without.median and not without.beats(with_it):
                fit = bent
    return settle(fit, start) if poses else _at(fit, start)


def _at(fit: Fit, start: Setup) -> Fit:
    """The fit with the poses of `start`, which pycolmap returns but for rounding."""
    found = fit.setup.cameras
    cameras = Cameras(start.cameras.extrinsics, found.intrinsics, found.image_size)
    return Fit(Setup(cameras, fit.setup.radial, fit.setup.group), fit.solved, fit.reasons)


def sfm(start: Setup, rest: Tracks, held: Tracks, options: RefineOptions) -> Fit:
    """Cameras from the matches of the tracks `rest` alone, in the world of `start`, then `ba`.

    The better of two mappers by the tracks `held`; the second only if the first is not good.
    Raises GeometryError where neither finds a model.
    """
    best: tuple[Score, Fit] | None = None
    failed = ""
    for mapper in ("global", "incremental"):
        try:
            found, frames = _mapped(start, rest, mapper, options.seed)
            solved = torch.zeros(len(start.group), dtype=torch.bool)
            solved[frames] = True
            aligned = settle(Fit(found, solved), start).setup
            fit = settle(ba(aligned, rest, held, options), start)
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


METHODS: dict[Method, Callable[[Setup, Tracks, Tracks, RefineOptions], Fit]] = {
    "ba": ba,
    "sfm": sfm,
}


def _mapped(
    start: Setup, rest: Tracks, mapper: Literal["global", "incremental"], seed: int
) -> tuple[Setup, list[int]]:
    if len(start.group) == 2:
        return adjust.two_photos(start, rest, seed), [0, 1]
    found, frames = adjust.map_images(start, rest, mapper, seed)
    return Setup(found.cameras, start.radial, start.group), frames


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
        float(error[frame == i].median() * scale[i]) if bool((frame == i).any()) else math.nan
        for i in range(len(setup.group))
    ]


def _result(
    cameras: Cameras,
    predicted: Setup,
    fit: Fit,
    tracks: Tracks,
    verdict: Verdict,
    options: RefineOptions,
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
        outcome = "given" if options.fixed_poses else outcome
        reason = verdict.words if outcome == "predicted" else fit.reasons.get(i, "")
        images.append(ImageReport(outcome, inliers, seen, before, after, reason))
    refined = fit.setup.cameras
    extrinsics = refined.extrinsics.to(cameras.extrinsics)
    intrinsics = refined.intrinsics.to(cameras.intrinsics)
    kept = select(tracks, last, good)
    return Refined(
        Cameras(extrinsics, intrinsics, cameras.image_size),
        fit.setup.radial,
        Tracks(kept.xyz.float(), kept.point, kept.frame, kept.xy),
        tuple(images),
        verdict,
    )
