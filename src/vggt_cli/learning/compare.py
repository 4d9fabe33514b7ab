"""Two models of the same photos against each other: cameras, focal lengths, points."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vggt_cli.errors import GeometryError, InputError
from vggt_cli.formats.colmap import Model
from vggt_cli.formats.names import few, pair
from vggt_cli.geometry import align_cameras, move
from vggt_cli.learning import metrics
from vggt_cli.scene import Cameras, Similarity

log = logging.getLogger(__name__)

DEGREES = (3, 5, 10, 30)


@dataclass(frozen=True)
class PointFigures:
    """Distances between two clouds after the cameras' alignment, in units of the reference."""

    accuracy: float  # mean distance of a point to the nearest of the reference
    accuracy_median: float
    completeness: float  # mean distance of the reference's points to the nearest
    completeness_median: float
    chamfer: float  # mean of accuracy and completeness


@dataclass(frozen=True)
class CenterFigures:
    """Errors of optical centres after a similarity, in units of the reference."""

    scale: float  # units of the reference in one of the other
    ate: float  # rms distance of centres
    extent: float  # rms distance of the reference's centres from their mean
    worst: float  # largest distance of centres
    worst_photo: str  # of the reference


@dataclass(frozen=True)
class Comparison:
    """How far a model is from a reference; angles in degrees."""

    photos: tuple[int, int, int]  # of the model, of the reference, of both
    rotation: float  # medians over all pairs of photos in both
    direction: float
    auc: dict[int, float]  # percent, by degrees; none of a single pair
    focal: float  # median relative error
    centers: CenterFigures | None  # None where the cameras fix no scale
    points: PointFigures | None  # None without points or without centers


def compare(model: Model, reference: Model) -> Comparison:
    """Figures of `model` against `reference` on the photos that both have.

    Raises InputError for fewer than two of them; warns of photos that only one has.
    """
    rows, partners = pair_photos(model.names, reference.names)
    cameras, true = model.cameras[rows], reference.cameras[partners]
    rotation, direction = metrics.relative_pose_errors(cameras.extrinsics, true.extrinsics)
    auc = {k: metrics.auc(rotation, direction, k) for k in DEGREES if len(rotation) > 1}
    centers = points = None
    try:
        similarity = align_cameras(cameras, true)
    except GeometryError as error:
        log.warning("no ATE and no distances of points: %s", error)
    else:
        names = [reference.names[i] for i in partners]
        centers = _of_centers(cameras, true, similarity, names)
        points = _of_points(model, reference, similarity)
    return Comparison(
        (len(model.names), len(reference.names), len(rows)),
        float(rotation.quantile(0.5)),
        float(direction.quantile(0.5)),
        auc,
        float(metrics.focal_errors(_per_width(cameras), _per_width(true)).quantile(0.5)),
        centers,
        points,
    )


def pair_photos(first: Sequence[str], second: Sequence[str]) -> tuple[list[int], list[int]]:
    """Places in `first` and in `second` of the photos that both name, in the order of `first`.

    Raises InputError for fewer than two; see `names.pair`.
    """
    partner = pair(first, second)
    _say_what_differs(first, second, partner)
    return list(partner), list(partner.values())


def _say_what_differs(first: Sequence[str], second: Sequence[str], partner: dict[int, int]) -> None:
    both = f"{len(partner)} photos are in both models, of {len(first)} and {len(second)}"
    if len(partner) < 2:
        only = f"the first has {few(first)}, the second {few(second)}"
        raise InputError(f"{both}: {only}", "compare models of the same photos, by file name")
    renamed = sum(first[i] != second[j] for i, j in partner.items())
    if renamed:
        log.warning("%d photos have other names in the second model; paired all the same", renamed)
    left = [first[i] for i in range(len(first)) if i not in partner]
    left_there = [second[j] for j in range(len(second)) if j not in partner.values()]
    if left or left_there:
        words = [f"only the first has {few(left)}"] if left else []
        words += [f"only the second has {few(left_there)}"] if left_there else []
        log.warning("%s: %s", both, "; ".join(words))


def _per_width(cameras: Cameras) -> torch.Tensor:
    """Intrinsics [S, 3, 3] in widths of the photos, as models may know them at other sizes."""
    return cameras.intrinsics.double() / cameras.image_size[:, 1, None, None]


def _of_centers(
    cameras: Cameras, true: Cameras, similarity: Similarity, names: Sequence[str]
) -> CenterFigures:
    distance = (move(cameras, similarity).centers - true.centers).norm(dim=-1)
    worst = int(distance.argmax())
    return CenterFigures(
        similarity.scale,
        metrics.rms(distance),
        metrics.extent(true.centers),
        float(distance[worst]),
        names[worst],
    )


def _of_points(model: Model, reference: Model, similarity: Similarity) -> PointFigures | None:
    if not len(model.tracks.xyz) or not len(reference.tracks.xyz):
        log.warning("no distances of points: a model has none")
        return None
    ours, theirs = similarity(model.tracks.xyz.double()), reference.tracks.xyz.double()
    there, back = metrics.nearest_distances(ours, theirs), metrics.nearest_distances(theirs, ours)
    accuracy, completeness = float(there.mean()), float(back.mean())
    chamfer = (accuracy + completeness) / 2
    medians = float(there.quantile(0.5)), float(back.quantile(0.5))
    return PointFigures(accuracy, medians[0], completeness, medians[1], chamfer)
