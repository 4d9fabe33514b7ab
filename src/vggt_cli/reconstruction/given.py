"""What the user knows, on its way through a run: read, begun with, brought to metres."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vggt_cli.errors import InputError
from vggt_cli.formats.priors import Lenses, Poses, read_intrinsics, read_poses
from vggt_cli.geometry import move, move_prediction, resize
from vggt_cli.reconstruction import scale
from vggt_cli.reconstruction.improve import Improved
from vggt_cli.reconstruction.priors import Placed, know, misread, place
from vggt_cli.scene import Cameras, ImageSet, Photo, Prediction, Tracks

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Given:
    """What is given, read."""

    lenses: Lenses | None
    poses: Poses | None
    scale: scale.Distance | Literal["poses", "gps"] | None


@dataclass(frozen=True, eq=False)
class Start:
    """What the work begins with."""

    prediction: Prediction  # the network's, with given intrinsics
    group: list[int]  # [S] frames with equal numbers share a lens
    fixed_intrinsics: bool
    placed: Placed | None  # None: no poses, or tracks have to say first what they mean
    warnings: tuple[str, ...]


def read(
    intrinsics: str | None,
    poses: str | None,
    keep_poses: bool,
    scale_from: str | None,
    photos: Sequence[Photo],
) -> Given:
    """What the options of `settings.Options` say, read.

    Raises InputError for files and words that cannot be, and for options that contradict.
    """
    if keep_poses and not poses:
        raise InputError("--keep-poses without --poses", "give the poses that are to be kept")
    if scale_from == "poses" and not poses:
        raise InputError("--scale-from poses without --poses", "give poses in metres")
    lenses = read_intrinsics(intrinsics) if intrinsics else None
    found = read_poses(Path(poses)) if poses else None
    if scale_from == "gps":
        scale.places(photos)  # says before all work that there are too few
    if scale_from is None:
        return Given(lenses, found, None)
    if scale_from in ("poses", "gps"):
        return Given(lenses, found, "poses" if scale_from == "poses" else "gps")
    distance = scale.known_distance(scale_from, [photo.name for photo in photos])
    return Given(lenses, found, distance)


def begin(given: Given, prediction: Prediction, group: list[int], images: ImageSet) -> Start:
    """The prediction with the given intrinsics, and the given poses in its world.

    Raises InputError as `priors.know` and `priors.place` do.
    """
    fixed = False
    warnings: tuple[str, ...] = ()
    if given.lenses is not None:
        predicted = _in_source_pixels(prediction, images)
        known = know(given.lenses, images.names, images.source_size, predicted.intrinsics)
        prediction = exchange(prediction, replace(predicted, intrinsics=known.intrinsics), images)
        group, fixed, warnings = list(known.group), known.fixed, known.warnings
    start = Start(prediction, group, fixed, None, warnings)
    if given.poses is None or misread(
        given.poses, images.names, _in_source_pixels(prediction, images).extrinsics
    ):
        return start
    return with_poses(given, start, images, None)


def with_poses(given: Given, start: Start, images: ImageSet, tracks: Tracks | None) -> Start:
    """The start with the given poses, where there are some and they are not placed yet."""
    if given.poses is None or start.placed is not None:
        return start
    predicted = _in_source_pixels(start.prediction, images)
    placed = place(given.poses, images.names, predicted, tracks)
    log.info("%s", placed.words)
    return replace(start, placed=placed, warnings=(*start.warnings, *placed.warnings))


def geometry(start: Start, images: ImageSet) -> Prediction:
    """The prediction with the given poses, where there are some."""
    if start.placed is None:
        return start.prediction
    return exchange(start.prediction, start.placed.cameras, images)


def exchange(prediction: Prediction, cameras: Cameras, images: ImageSet) -> Prediction:
    """The prediction with other cameras, which are in source pixels."""
    network_from_source = torch.linalg.inv(images.source_from_network.double())
    like = prediction.cameras
    moved = resize(cameras, network_from_source, like.image_size)
    moved = replace(moved, intrinsics=moved.intrinsics.to(like.intrinsics))
    return replace(prediction, cameras=moved)


def _in_source_pixels(prediction: Prediction, images: ImageSet) -> Cameras:
    return resize(prediction.cameras, images.source_from_network, images.source_size)


def in_metres(
    given: Given, start: Start, improved: Improved, photos: Sequence[Photo]
) -> tuple[Improved, scale.Metric | None]:
    """Cameras, depth and points in metres, where the user says how long something is."""
    cameras = improved.prediction.cameras
    if given.scale is None:
        return improved, None
    if given.scale == "gps":
        metric = scale.from_gps(cameras, photos)
    elif given.scale == "poses":
        assert start.placed is not None, "read() wants --poses, and with_poses() places them"
        metric = scale.from_poses(cameras, start.placed.original)
    else:
        metric = scale.from_distance(cameras, given.scale)
    log.info("%s", metric.words)
    similarity, done = metric.similarity, improved.refinement
    tracks = improved.tracks and replace(improved.tracks, xyz=similarity(improved.tracks.xyz))
    said = (*improved.warnings, metric.warning) if metric.warning else improved.warnings
    return replace(
        improved,
        prediction=move_prediction(improved.prediction, similarity),
        tracks=tracks,
        refinement=done
        and replace(
            done,
            predicted=move(done.predicted, similarity),
            lens=replace(done.lens, cameras=move(done.lens.cameras, similarity)),
        ),
        warnings=said,
    ), metric


def report(given: Given, start: Start, metric: scale.Metric | None) -> dict[str, Any]:
    """What was given and how far it is from the prediction, in plain types; empty: nothing."""
    found: dict[str, Any] = {}
    if given.lenses is not None:
        found["intrinsics"] = {"from": given.lenses.source, "fixed": start.fixed_intrinsics}
    if given.poses is not None and start.placed is not None:
        rows = zip(start.placed.rotation.tolist(), start.placed.shift.tolist(), strict=True)
        found["poses"] = {
            "from": str(given.poses.path),
            "from_prediction": [
                None if turn != turn else {"degrees": turn, "share_of_extent": shift}
                for turn, shift in rows
            ],
        }
    if metric is not None:
        known = metric.unsure == metric.unsure
        found["scale"] = {
            "from": metric.source,
            "metres_per_unit": metric.factor,
            "photos": metric.photos,
            "residual_metres": metric.residual,
            "standard_error": metric.unsure if known else None,
        }
    return found
