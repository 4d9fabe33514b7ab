"""A COLMAP sparse model from its files, binary or text, and depth maps of COLMAP and of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap_rows
from vggt_cli.formats.colmap import Lens, Model
from vggt_cli.formats.colmap_rows import MODELS, NO_POINT
from vggt_cli.geometry import rotation_from_quaternion
from vggt_cli.scene import Cameras, Tracks

LENSES = MODELS[:11]  # those that every reader knows
PLACES = ("sparse/0", "sparse", "reference")  # where a scene has its model
# What NumPy raises at .npy files that are cut or damaged: their header is Python.
MALFORMED = (OSError, ValueError, EOFError, SyntaxError, TokenError, TypeError, OverflowError)
UNDISTORT = "undistort the scene first: colmap image_undistorter"


def locate(folder: Path, places: Sequence[str] = PLACES) -> Path:
    """The folder of the model of the scene in `folder`, or `folder` itself where it is one.

    places: in it, the first that holds a model. Raises InputError if there is none.
    """
    for found in (*(folder / name for name in places), folder):
        if any((found / f"cameras.{kind}").is_file() for kind in ("bin", "txt")):
            return found
    raise InputError(f"no COLMAP model in {', '.join(places)}: {folder}")


def read(folder: Path) -> Model:
    """The model in `folder`, images and points in the order of their ids; poses are float64.

    Binary files go before text. Focal lengths and principal points of distorted cameras are in
    `cameras`, the rest in `lenses`.
    Raises InputError for files that are missing, cut short or malformed, and camera models beyond
    COLMAP's first eleven.
    """
    kind, found = colmap_rows.kind_of(folder), read_cameras(folder)
    points = colmap_rows.points(folder)
    ascending = np.argsort(points.number, kind="stable")
    return Model(
        found.names,
        found.cameras,
        found.camera_of_image,
        _tracks(found.images, points, ascending, folder / f"images.{kind}"),
        points.rgb[ascending],
        found.lenses,
    )


class Posed(NamedTuple):
    """A model without its points; see `Model`."""

    names: tuple[str, ...]
    cameras: Cameras
    camera_of_image: tuple[int, ...]
    lenses: tuple[Lens, ...]
    images: list[colmap_rows.Image]


def read_cameras(folder: Path) -> Posed:
    """What `read` gives without points, which need not be there. Raises InputError as it does."""
    path = folder / f"cameras.{colmap_rows.kind_of(folder)}"
    lenses = read_lenses(folder)
    images = sorted(colmap_rows.images(folder), key=lambda image: image.number)
    for image in images:
        if image.camera not in lenses:
            raise InputError(f"no camera {image.camera}, which {image.name} names: {path}")
    if not images:
        raise InputError(f"a COLMAP model without images: {folder}")
    order = {number: i for i, number in enumerate(sorted({image.camera for image in images}))}
    return Posed(
        tuple(image.name for image in images),
        _cameras(images, lenses),
        tuple(order[image.camera] for image in images),
        tuple(lenses[image.camera] for image in images),
        images,
    )


def read_lenses(folder: Path) -> dict[int, Lens]:
    """The cameras of the model in `folder`, by id. Raises InputError as `read` does."""
    path = folder / f"cameras.{colmap_rows.kind_of(folder)}"
    return {n: _lens(path, camera) for n, camera in colmap_rows.cameras(folder).items()}


def _lens(path: Path, camera: colmap_rows.Camera) -> Lens:
    model, size, parameters = camera
    known = {name: focals for name, focals, _ in LENSES}
    if model not in known:
        raise InputError(f"a camera of model {model}, which is not read: {path}", UNDISTORT)
    return Lens(model, size, parameters, any(parameters[known[model] + 2 :]))


def pinhole(lens: Lens) -> Tensor:
    """[3, 3] float64 focal lengths and principal point of `lens`, without its distortion."""
    focals = next(focals for name, focals, _ in LENSES if name == lens.model)
    k = torch.eye(3, dtype=torch.float64)
    k[0, 0], k[1, 1] = lens.parameters[0], lens.parameters[focals - 1]
    k[:2, 2] = torch.tensor(lens.parameters[focals : focals + 2])
    return k


def _cameras(images: list[colmap_rows.Image], lenses: dict[int, Lens]) -> Cameras:
    poses = torch.tensor([image.pose for image in images], dtype=torch.float64)
    rotation = rotation_from_quaternion(poses[:, :4].roll(-1, 1))
    intrinsics = torch.stack([pinhole(lenses[image.camera]) for image in images])
    size = torch.tensor([lenses[image.camera].size for image in images])
    return Cameras(torch.cat([rotation, poses[:, 4:, None]], -1), intrinsics, size)


def _tracks(
    images: list[colmap_rows.Image],
    points: colmap_rows.Points,
    ascending: colmap_rows.Array,
    path: Path,
) -> Tracks:
    """Observations by point and frame; 2D points without a 3D point are left out.

    ascending: [N] order of the points by their ids, in which they are returned.
    """
    number, xyz = points.number[ascending], points.xyz[ascending]
    seen = np.concatenate([image.seen for image in images])
    frame = np.repeat(np.arange(len(images)), [len(image.seen) for image in images])
    frame, seen = frame[seen["point"] != NO_POINT], seen[seen["point"] != NO_POINT]
    if not np.isin(seen["point"], number).all():
        raise InputError(f"images see points that points3D lacks: {path}")
    point = np.searchsorted(number, seen["point"])
    order = np.lexsort((frame, point))
    with np.errstate(over="ignore"):  # what no float32 holds is infinite
        places, xy = xyz.astype(np.float32), seen["xy"][order].astype(np.float32)
    return Tracks(
        torch.from_numpy(places),
        torch.from_numpy(point[order]),
        torch.from_numpy(frame[order].astype(np.int32)),
        torch.from_numpy(xy),
    )


def read_map(path: Path) -> Tensor:
    """The map [h, w] float32 of z-depth or confidence in `path`, .bin or .npy; 0: unknown.

    COLMAP's .bin has a header, width&height&channels& in digits, then float32 values row by row.
    Raises InputError if the file is no such map.
    """
    try:
        if path.suffix == ".npy":
            # Mapped, because a header may ask for any amount of memory.
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            data = path.read_bytes()
            header = re.match(rb"(\d+)&(\d+)&1&", data)
            w, h = (int(n) for n in header.groups()) if header else (0, 0)
            found = np.frombuffer(data, "<f4", offset=header.end() if header else 0).reshape(h, w)
    except MALFORMED as error:
        raise InputError(f"not a map of one number a pixel: {path} ({error})") from error
    if found.ndim != 2 or found.dtype.kind != "f" or not found.size:
        raise InputError(
            f"not a map of one number a pixel: {path} ({found.dtype} of shape {found.shape})"
        )
    known = np.isfinite(found) & (found > 0)
    return torch.from_numpy(np.where(known, found, 0).astype(np.float32))
