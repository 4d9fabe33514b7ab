"""Finished scenes from their folders, so that work on them needs no network."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap_read, points, writers
from vggt_cli.formats.colmap import Model
from vggt_cli.formats.images import Loaded, frame_of, load, load_sized
from vggt_cli.formats.masks import matching
from vggt_cli.geometry import keep_points, resize
from vggt_cli.scene import (
    Cameras,
    Finding,
    Frame,
    ImageSet,
    Prediction,
    Provenance,
    Scene,
    Shaping,
    Tracks,
)

log = logging.getLogger(__name__)

SHAPING = Shaping("balanced", 512, 16)  # of photos that no network sees: enough for masks, colours
NO_NETWORK = Provenance("none", "", "no network was used", True, "cpu", "float32", {})


def is_ours(folder: Path) -> bool:
    """Whether `folder` is a scene that this tool wrote."""
    return (folder / "report.json").is_file() and (folder / "depth").is_dir()


def content(folder: Path) -> str | None:
    """`Provenance.content` of the scene in `folder`; None where there is none of ours."""
    try:
        return str(_report(folder / "report.json").get("content", ""))
    except InputError:
        return None


def formats(folder: Path) -> list[str]:
    """The further formats that a scene of ours holds, by their names for `export.write`."""
    return writers.held(folder)


def read(folder: Path) -> Scene:
    """The scene that this tool wrote into `folder`; its maps have the precision of float16.

    Raises InputError for files that are missing, malformed or do not fit together.
    """
    report = _report(folder / "report.json")
    with _well_formed(folder / "report.json"):
        rows = report["images"]
        files = [Path(row["file"]).name for row in rows]
        names = [str(row["name"]) for row in rows]
        frames = [_frame(row) for row in rows]
        made = {**report, **report["model"], "peak_memory": report["peak_memory_bytes"]}
        made_by = Provenance(**{field.name: made[field.name] for field in fields(Provenance)})
        left_out = tuple((row["name"], row["reason"]) for row in report["left_out"])
        findings = tuple(Finding(**row) for row in report.get("findings", []))
        said = tuple(report["warnings"]), report["scale"], report["tracks"]
    model = colmap_read.read(folder / "sparse" / "0")
    if list(model.names) != files:
        raise InputError(f"report.json and sparse/0 have different images: {folder}")
    depth, confidence = (
        [colmap_read.read_map(folder / kind / f"{file}.npy") for file in files]
        for kind in ("depth", "confidence")
    )
    for file, one, other in zip(files, depth, confidence, strict=True):
        if one.shape != other.shape:
            raise InputError(f"depth and confidence differ in size: {folder}: {file}")
    loaded = load_sized(
        [folder / "images" / file for file in files],
        names,
        [(one.shape[0], one.shape[1]) for one in depth],
        [mask if (mask := folder / "masks" / f"{file}.png").is_file() else None for file in files],
    )
    photos = tuple(
        replace(photo, frame=frame) for photo, frame in zip(loaded.photos, frames, strict=True)
    )
    depths, confidences = (_padded(one, loaded.images) for one in (depth, confidence))
    return Scene(
        photos,
        loaded.images,
        Prediction(_cameras(model, loaded), depths, confidences, *_tokens(folder / "tokens.npz")),
        model.camera_of_image,
        model.tracks,
        torch.from_numpy(model.rgb),
        points.read_cloud(folder / "points.ply"),
        made_by,
        left_out,
        *said,
        priors=report.get("priors", {}),
        windows=report.get("windows") or {},
        findings=findings,
    )


@contextlib.contextmanager
def _well_formed(path: Path) -> Iterator[None]:
    """What a report lacks, or holds of another kind, is an InputError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        words = f"{type(error).__name__}: {error}"
        raise InputError(f"no report of a scene: {path} ({words})") from error


def read_foreign(folder: Path, photos: Path | None) -> Scene:
    """A COLMAP model, whoever made it, with its photos; nobody knows its depth.

    photos: where they are; None: in images/ of `folder`. Masks in masks/ beside them count.

    Images whose photos cannot be read are left out, with a warning.
    Raises InputError for a model of distorted or of no such photos.
    """
    model = colmap_read.read(colmap_read.locate(folder))
    bent = [n for n, lens in zip(model.names, model.lenses, strict=True) if lens.distorted]
    if bent:
        raise InputError(f"{bent[0]} is distorted in the model: {folder}", colmap_read.UNDISTORT)
    photos = photos or folder / "images"
    if not photos.is_dir():
        raise InputError(f"no such folder of photos: {photos}", "give --images")
    masks = _masks(photos.parent / "masks", model.names)
    loaded = load(photos, [photos / name for name in model.names], SHAPING, masks=masks)
    missing = {name for name, _ in loaded.unreadable}
    model = _only(model, [i for i, name in enumerate(model.names) if name not in missing])
    H, W = loaded.images.size
    nothing = torch.zeros(len(loaded.photos), H, W)
    return Scene(
        loaded.photos,
        loaded.images,
        Prediction(_cameras(model, loaded), nothing, nothing + 1),
        model.camera_of_image,
        model.tracks,
        torch.from_numpy(model.rgb),
        None,
        NO_NETWORK,
        loaded.unreadable,
        seen_in="image",
    )


def _masks(folder: Path, names: Sequence[str]) -> Sequence[Path | None]:
    """See `masks.matching`; a folder of something else is no error, since nobody named it."""
    if not folder.is_dir():
        return ()
    try:
        return matching(folder, names)
    except InputError as error:
        log.warning("left out: %s (%s)", error, error.hint)
        return ()


def _frame(row: dict[str, Any]) -> Frame | None:
    video = row.get("video")
    return video and Frame(video["file"], video["frame"], video["seconds"])


def _report(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"no report of a scene: {path} ({error})") from error
    if schema != 1:
        raise InputError(f"a report of schema {schema}, and this version knows 1: {path}")
    return content


def _cameras(model: Model, loaded: Loaded) -> Cameras:
    """Those of the model in the network's pixels. Raises InputError for photos of another size."""
    images = loaded.images
    wrong = (images.source_size != model.cameras.image_size).any(-1).nonzero()[:, 0].tolist()
    if wrong:
        (h, w), (H, W) = (
            x[wrong[0]].tolist() for x in (images.source_size, model.cameras.image_size)
        )
        raise InputError(f"{images.names[wrong[0]]} is {w} x {h}, its camera {W} x {H}")
    size = torch.tensor([images.size]).expand(len(images), 2)
    found = resize(model.cameras, torch.linalg.inv(images.source_from_network), size)
    return Cameras(found.extrinsics.float(), found.intrinsics.float(), size)


def _padded(maps: list[Tensor], images: ImageSet) -> Tensor:
    """[S, H, W] of maps without padding; 1 there."""
    result = torch.ones(images.valid.shape)
    for frame, one in enumerate(maps):
        result[frame][frame_of(images, frame)] = one
    return result


def _tokens(path: Path) -> tuple[Tensor | None, Tensor | None]:
    if not path.is_file():
        return None, None
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            text = torch.from_numpy(arrays["text"]) if "text" in arrays else None
            return torch.from_numpy(arrays["tokens"]), text
    except (OSError, ValueError, TypeError, LookupError, EOFError, BadZipFile) as error:
        raise InputError(f"no tokens can be read: {path} ({error})") from error


def _only(model: Model, frames: list[int]) -> Model:
    """The model with these images alone, and the points that two of them see."""
    if len(frames) == len(model.names):
        return model
    number = torch.full((len(model.names),), -1)
    number[frames] = torch.arange(len(frames))
    tracks = model.tracks
    rows = number[tracks.frame.long()] >= 0
    point, frame = tracks.point[rows], number[tracks.frame.long()][rows].int()
    seen = torch.bincount(point, minlength=len(tracks.xyz)) > 1
    left = keep_points(Tracks(tracks.xyz, point, frame, tracks.xy[rows]), seen)
    groups = [model.camera_of_image[i] for i in frames]
    order = {g: n for n, g in enumerate(dict.fromkeys(groups))}
    return Model(
        tuple(model.names[i] for i in frames),
        model.cameras[frames],
        tuple(order[g] for g in groups),
        left,
        model.rgb[seen.numpy()],
        tuple(model.lenses[i] for i in frames),
    )
