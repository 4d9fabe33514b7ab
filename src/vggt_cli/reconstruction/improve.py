"""A prediction made better by what the photos show at full size, where they show enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vggt_cli.formats.images import Loaded
from vggt_cli.geometry import keep_points, resize
from vggt_cli.reconstruction import depth
from vggt_cli.reconstruction.depth import DepthFit, network_pixels
from vggt_cli.reconstruction.priors import Placed, question_intrinsics, refine_given
from vggt_cli.reconstruction.refine import ImageReport, Refined, RefineOptions, refine
from vggt_cli.reconstruction.straighten import straightened
from vggt_cli.reconstruction.tracks import FeatureTracks, ImageRow
from vggt_cli.scene import ImageSet, Prediction, Refinement, Setup, Tracks


@dataclass(frozen=True, eq=False)
class Improved:
    """What the rest of the work goes on with."""

    images: ImageSet
    prediction: Prediction
    tracks: Tracks | None  # measured, in source pixels; None: the predicted cameras were kept
    refinement: Refinement | None = None  # None: not asked for
    found: FeatureTracks | None = None
    warnings: tuple[str, ...] = ()  # where what is given and the photos disagree


def improve(
    loaded: Loaded,
    prediction: Prediction,
    group: list[int],
    found: FeatureTracks,
    options: RefineOptions,
    placed: Placed | None = None,
) -> Improved:
    """Cameras that the tracks `found` confirm, and depth that follows; or the prediction as it is.

    group: frame i shares its lens with those of equal group[i]. placed: given poses to begin with.
    """
    images = loaded.images
    predicted = resize(prediction.cameras, images.source_from_network, images.source_size)
    exif = torch.tensor([photo.focal_pixels for photo in loaded.photos], dtype=torch.float64)
    said: tuple[str, ...] = ()
    if placed is None:
        refined = refine(predicted, found.tracks, group, options, exif)
    else:
        cameras = placed.cameras
        refined, said = refine_given(cameras, predicted, found.tracks, group, options, exif)
    lens = Setup(refined.cameras, refined.radial, tuple(group))
    unmoved = torch.equal(refined.cameras.extrinsics, predicted.extrinsics)
    if refined.verdict.method == "none" and unmoved:
        report, rows = _report(found, refined, [None] * len(images))
        kept = Refinement("none", predicted, lens, report, rows)
        return Improved(images, prediction, None, kept, found, said)
    if questions := question_intrinsics(refined, found.tracks, group, options):
        said = (*said, questions)
    followed, fits = depth.follow(
        prediction.depth, refined.tracks, refined.cameras, images.source_from_network
    )
    network_from_source = torch.linalg.inv(images.source_from_network)
    cameras = resize(refined.cameras, network_from_source, prediction.cameras.image_size)
    moved = replace(prediction, cameras=cameras, depth=followed)
    images, moved, tracks, _ = straightened(images, moved, refined.tracks, lens)
    report, rows = _report(found, refined, fits)
    refinement = Refinement(refined.verdict.method, predicted, lens, report, rows)
    return Improved(images, moved, tracks, refinement, found, said)


def _report(
    found: FeatureTracks, refined: Refined, fits: Sequence[DepthFit | None]
) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    """What refinement did, for all and for each image."""
    verdict = refined.verdict
    scores = {"before": verdict.before, "after": verdict.after}
    report = {
        "method": verdict.method,
        "reason": verdict.words,
        "held_out": {k: score and dataclasses.asdict(score) for k, score in scores.items()},
        "feature_tracks": len(found.tracks.xyz),
        "pairs": len(found.pairs),
    }
    lenses = [
        {"fx": fx, "fy": fy, "cx": cx, "cy": cy, "k": k} if k else None
        for ((fx, _, cx), (_, fy, cy), _), k in zip(
            refined.cameras.intrinsics.tolist(), refined.radial.tolist(), strict=True
        )
    ]
    rows = zip(found.images, refined.images, lenses, fits, strict=True)
    return report, tuple(_row(*row) for row in rows)


def _row(
    found: ImageRow, image: ImageReport, lens: dict[str, float] | None, fit: DepthFit | None
) -> dict[str, Any]:
    """A line of the table of images, in plain types; None where there is no such figure."""
    return {
        "pose": image.outcome,
        "reason": image.reason,
        "keypoints": found.keypoints,
        "matched": found.matched,
        "verified": found.verified,
        "partners": found.partners,
        "sources": list(found.sources),
        "observations": image.tracks,
        "inliers": image.inliers,
        "error_before_pixels": _number(image.before),
        "error_after_pixels": _number(image.after),
        "lens": lens,
        "depth_scale": fit and fit.scale,
        "depth_shift": fit and fit.shift,
        "depth_error": fit and _number(fit.error),
        "depth_disagrees": fit and fit.disagrees,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def colored(tracks: Tracks, images: ImageSet, points: int) -> tuple[Tracks, Tensor]:
    """The tracks, at most so many, those that most frames see, and their points' rgb [N, 3] uint8.

    A colour is the mean over the network's pixels that see the point.
    """
    length = torch.bincount(tracks.point, minlength=len(tracks.xyz))
    longest = length.argsort(descending=True, stable=True)[:points]
    kept = torch.zeros(len(length), dtype=torch.bool)
    kept[longest] = True
    tracks = keep_points(tracks, kept)
    frame, row, column = network_pixels(tracks, images.source_from_network, images.size)
    seen = images.pixels[frame, :, row, column]
    total = torch.zeros(len(tracks.xyz), 3).index_add_(0, tracks.point, seen)
    mean = total / torch.bincount(tracks.point, minlength=len(tracks.xyz))[:, None]
    return tracks, (mean * 255).round().to(torch.uint8)
