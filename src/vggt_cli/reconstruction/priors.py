"""Poses and intrinsics that the user gives, brought to the photos and measured against them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats.names import few, pair
from vggt_cli.formats.priors import Lenses, Poses
from vggt_cli.geometry import move
from vggt_cli.reconstruction.align import fit_cameras, hold_first
from vggt_cli.reconstruction.judge import Score
from vggt_cli.reconstruction.readings import confirms, mistake, predicted_witness, track_witness
from vggt_cli.reconstruction.refine import GOOD, Refined, RefineOptions, refine
from vggt_cli.scene import Cameras, Tracks

FEW = 4  # photos: with fewer, no prediction alone says that poses are misread
FAR = (15.0, 0.25)  # degrees, share of the extent: a pose that is not where it is predicted
UNUSUAL = 3.0  # times the median of all
FOCAL_DIFFERS = 0.1  # of the predicted focal length
MIDDLE = (0.25, 0.75)  # of the photo: where a principal point belongs
SAME_ASPECT = 0.01
CLEARLY = (0.05, 0.8)  # more of the held-out observations, or so much of the median error


@dataclass(frozen=True, eq=False)
class Known:
    """Intrinsics of every photo, as given."""

    intrinsics: Tensor  # [S, 3, 3] float64, pixels of the upright source images
    group: tuple[int, ...]  # [S] frames with equal numbers share a lens
    fixed: bool  # False: they lack distortion, so they are where refinement starts
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Placed:
    """Given poses in the world of the prediction; frame 0 is [I | 0]."""

    cameras: Cameras  # those predicted where no pose is given; intrinsics as they were predicted
    original: Tensor  # [S, 3, 4] float64 world-to-camera in the file's world; NaN: not given
    rotation: Tensor  # [S] degrees from the predicted pose; NaN: not given
    shift: Tensor  # [S] distance from the predicted centre, as a share of the cameras' extent
    words: str  # how many there are, and how far they are from the prediction
    warnings: tuple[str, ...]


def know(lenses: Lenses, names: Sequence[str], size: Tensor, predicted: Tensor) -> Known:
    """The intrinsics that `lenses` give the photos, scaled to their size.

    size: [S, 2] of the upright photos; predicted: [S, 3, 3] intrinsics in their pixels.
    Raises InputError for photos without, or of another aspect than, their intrinsics.
    """
    rows = [0] * len(names)
    if lenses.names:
        partner = pair(names, lenses.names)
        if left := [name for i, name in enumerate(names) if i not in partner]:
            raise InputError(f"no intrinsics for {few(left)} in: {lenses.source}")
        rows = [partner[i] for i in range(len(names))]
    fitted = [
        _fitted(lenses.intrinsics[row], lenses.size[row].tolist(), of_photo.tolist(), name, lenses)
        for row, of_photo, name in zip(rows, size, names, strict=True)
    ]
    numbers: dict[tuple[object, ...], int] = {}
    keys = [(*k.flatten().tolist(), *s.tolist()) for k, s in zip(fitted, size, strict=True)]
    group = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
    intrinsics = torch.stack(fitted)
    warnings = []
    if lenses.distorted:
        warnings.append(
            "the given intrinsics come with distortion, which is not taken over: they are where "
            f"refinement starts (undistorted photos would keep them): {lenses.source}"
        )
    if differs := focal_differs(intrinsics, predicted, names):
        warnings.append(differs)
    return Known(intrinsics, group, not lenses.distorted, tuple(warnings))


def _fitted(
    intrinsics: Tensor, given: list[int], photo: list[int], name: str, lenses: Lenses
) -> Tensor:
    """Intrinsics [3, 3] for images of size `given` (0: not said) in pixels of the photo."""
    (h, w), (H, W) = given, photo
    this = f"the photo {name} is {W} x {H}"
    if not h:
        x, y = (intrinsics[:2, 2] / torch.tensor([W, H])).tolist()
        if not all(MIDDLE[0] < at < MIDDLE[1] for at in (x, y)):
            raise InputError(
                f"the principal point {intrinsics[0, 2]:.6g}, {intrinsics[1, 2]:.6g} is not near "
                f"the middle, {this}: {lenses.source}",
                "intrinsics are in pixels of the upright photo; a file with w and h is scaled",
            )
        return intrinsics.clone()
    if abs(W * h / (H * w) - 1) > SAME_ASPECT:
        sideways = abs(H * h / (W * w) - 1) <= SAME_ASPECT
        hint = "they are of the photo as stored, which EXIF turns upright" if sideways else ""
        words = f"the intrinsics are of images of {w} x {h}, {this}: {lenses.source}"
        raise InputError(words, hint or "give intrinsics of the photos as they are, not cropped")
    scale = torch.tensor([W / w, H / h, 1.0], dtype=torch.float64)
    return scale[:, None] * intrinsics


def focal_differs(given: Tensor, predicted: Tensor, names: Sequence[str]) -> str:
    """Which given focal lengths are far from those predicted, with figures; empty: none."""
    focal, guess = ((k[:, 0, 0] * k[:, 1, 1]).sqrt().double() for k in (given, predicted))
    off = (focal / guess).log().abs()
    far = (off > math.log(1 + FOCAL_DIFFERS)).nonzero()[:, 0].tolist()
    if not far:
        return ""
    worst = max(far, key=lambda i: float(off[i]))
    return (
        f"{len(far)} of {len(names)} given focal lengths differ from the prediction by more than "
        f"{FOCAL_DIFFERS:.0%}, most for {names[worst]}: {focal[worst]:.0f} px given, "
        f"{guess[worst]:.0f} px predicted; given ones are used"
    )


def misread(poses: Poses, names: Sequence[str], predicted: Tensor) -> bool:
    """The poses seem to be other than their format says; `place` decides, best with tracks.

    predicted: [S, 3, 4] extrinsics of all photos.
    """
    partner = pair(names, poses.names)
    witness = predicted_witness(predicted[[*partner]])
    return len(partner) > 1 and mistake(poses, [*partner.values()], witness) is not None


def place(
    poses: Poses, names: Sequence[str], predicted: Cameras, tracks: Tracks | None = None
) -> Placed:
    """The given poses, brought by a similarity as close to the predicted cameras as they come.

    predicted: in source pixels. tracks: feature tracks, which say whether poses are misread, or
    confirm that the prediction says so; without them the prediction of four photos will do.
    Raises InputError where fewer than two photos have a pose, and for poses that are clearly
    inverted, mirrored or of other axes than their format's: the error says which and how to mend
    it.
    """
    partner = pair(names, poses.names)
    rows, frames = list(partner.values()), list(partner)
    if len(rows) < 2:
        raise InputError(
            f"poses of {len(rows)} of {len(names)} photos: {poses.path} has {few(poses.names)}, "
            f"the photos are {few(names)}",
            "poses belong to photos by file name; two at least are needed",
        )
    warnings = []
    if left := [name for i, name in enumerate(names) if i not in partner]:
        warnings.append(f"no pose is given for {few(left)}: predicted ones, fitted to the rest")
    given = poses.extrinsics[rows]
    seen = tracks and track_witness(_of_frames(tracks, frames), predicted[frames])
    if seen and (found := mistake(poses, rows, seen)):
        raise InputError(found.words, found.hint)
    # A small thing seen from all around looks, but for perspective, as if run around backwards.
    if found := mistake(poses, rows, predicted_witness(predicted.extrinsics[frames])):
        if confirms(seen, found, poses, rows) if seen else len(rows) >= FEW:
            raise InputError(found.words, found.hint)
        warnings.append(f"{found.words} (not certain: used as the format says)")
    if bool((torch.linalg.det(given[:, :, :3]) < 0).any()):
        words = f"mirrored poses: matrices of determinant -1, left-handed axes: {poses.path}"
        raise InputError(words, "negate one column of each rotation, the one that the writer did")
    placed = _moved(given, frames, predicted)
    rotation, shift = _apart(placed, predicted, frames)
    words, far = _figures(rotation, shift, names, frames)
    if not found:
        warnings += far
    original = torch.full((len(names), 3, 4), torch.nan, dtype=torch.float64)
    original[frames] = given
    return Placed(placed, original, rotation, shift, words, tuple(warnings))


def _of_frames(tracks: Tracks, frames: list[int]) -> Tracks:
    """The observations in `frames`, which are numbered anew."""
    number = torch.full(
        (max(*frames, int(tracks.frame.max()) if len(tracks.frame) else 0) + 1,), -1
    )
    number[frames] = torch.arange(len(frames))
    kept = number[tracks.frame.long()] >= 0
    frame = number[tracks.frame.long()][kept].to(torch.int32)
    return Tracks(tracks.xyz, tracks.point[kept], frame, tracks.xy[kept])


def _moved(given: Tensor, frames: list[int], predicted: Cameras) -> Cameras:
    """The given extrinsics [P, 3, 4] of `frames` in the world of the prediction, frame 0 first."""
    similarity = fit_cameras(given, predicted.extrinsics[frames])
    extrinsics = predicted.extrinsics.double().clone()
    cameras = Cameras(given, predicted.intrinsics[frames], predicted.image_size[frames])
    extrinsics[frames] = move(cameras, similarity).extrinsics
    held = hold_first(extrinsics, torch.eye(3, 4, dtype=torch.float64))
    return dataclasses.replace(predicted, extrinsics=held.to(predicted.extrinsics))


def _apart(placed: Cameras, predicted: Cameras, frames: list[int]) -> tuple[Tensor, Tensor]:
    """[S] degrees and shares of the extent between given and predicted poses; NaN: not given."""
    similarity = fit_cameras(placed.extrinsics[frames], predicted.extrinsics[frames])
    moved = move(placed, similarity)
    a, b = (c.extrinsics[frames, :, :3].double() for c in (moved, predicted))
    cosine = (((a * b).sum((-2, -1)) - 1) / 2).clamp(-1, 1)
    centers = predicted.centers[frames].double()
    extent = (centers - centers.mean(0)).norm(dim=-1).square().mean().sqrt()
    distance = (moved.centers[frames].double() - centers).norm(dim=-1)
    rotation, shift = torch.full((2, len(predicted)), torch.nan, dtype=torch.float64)
    rotation[frames] = cosine.acos().rad2deg()
    shift[frames] = distance / extent.clamp(min=1e-30)
    return rotation, shift


def _figures(
    rotation: Tensor, shift: Tensor, names: Sequence[str], frames: list[int]
) -> tuple[str, list[str]]:
    """How far the poses are from the prediction, and warnings where they are far."""
    typical = [float(values.nanquantile(0.5)) for values in (rotation, shift)]
    words = (
        f"poses of {len(frames)} of {len(names)} photos, from the prediction in the median "
        f"{typical[0]:.1f} degrees, {typical[1]:.0%} of the cameras' extent"
    )
    if typical[0] > FAR[0] or typical[1] > FAR[1]:
        return words, [f"given poses and prediction disagree: {words}"]
    off = [
        (values[frames] > torch.tensor([limit, UNUSUAL * middle]).max())
        for values, limit, middle in zip((rotation, shift), FAR, typical, strict=True)
    ]
    rows = [i for i, far in zip(frames, (off[0] | off[1]).tolist(), strict=True) if far]
    rows.sort(key=lambda i: -float(rotation[i] / FAR[0] + shift[i] / FAR[1]))
    said = [f"{names[i]} ({rotation[i]:.0f} degrees, {shift[i]:.0%} of the extent)" for i in rows]
    return words, [f"given poses far from the prediction: {few(said)}"] if said else []


def refine_given(
    given: Cameras,
    predicted: Cameras,
    tracks: Tracks,
    group: list[int],
    options: RefineOptions,
    exif: Tensor | None = None,
) -> tuple[Refined, tuple[str, ...]]:
    """`refine` from the given poses, or from the predicted ones where that explains clearly more.

    Poses that are kept (options.fixed_poses) stay in any case. The words warn where photos and
    given poses disagree. The tracks held out are the same for both.
    """
    refined = refine(given, tracks, group, options, exif)
    reached = refined.verdict.after
    if reached is None or reached.share >= GOOD:
        return refined, ()
    free = dataclasses.replace(options, fixed_poses=False)
    other = refine(predicted, tracks, group, free, exif)
    if other.verdict.after is None or not _clearly(other.verdict.after, reached):
        return refined, ()
    words = (
        f"the photos disagree with the given poses: {_share(reached)} with them, "
        f"{_share(other.verdict.after)} without"
    )
    if options.fixed_poses:
        return refined, (f"{words}; they are kept all the same",)
    return other, (f"{words}; they are not used",)


def question_intrinsics(
    refined: Refined, tracks: Tracks, group: list[int], options: RefineOptions
) -> str:
    """A warning where other intrinsics than those given explain the photos clearly better.

    refined: with options.fixed_intrinsics. Empty: nothing against them.
    """
    reached = refined.verdict.after
    if reached is None or not options.fixed_intrinsics:
        return ""
    free = dataclasses.replace(options, method="ba", fixed_intrinsics=False)
    other = refine(refined.cameras, tracks, group, free)
    after = other.verdict.after
    if after is None or other.verdict.method == "none" or not _clearly(after, reached):
        return ""
    ours, theirs = (c.intrinsics[0, 0, 0].item() for c in (refined.cameras, other.cameras))
    return (
        f"the photos disagree with the given intrinsics: {_share(reached)} with them, "
        f"{_share(after)} if free (focal length of the first {theirs:.0f} px, "
        f"given {ours:.0f} px); they are kept all the same"
    )


def _clearly(better: Score, than: Score) -> bool:
    more = better.share >= than.share + CLEARLY[0]
    return more or (better.share >= than.share and better.median < CLEARLY[1] * than.median)


def _share(score: Score) -> str:
    return f"{score.share:.0%} of held-out observations agree (median {score.median:.2f} px)"
