"""A COLMAP sparse model from its files, binary or text, and the depth maps of COLMAP and of ours.

With NumPy alone: pycolmap 4.2 does not come back from a points3D.bin that is cut short, and takes
a cut cameras.bin for a camera of focal length 0. Files of rigs and frames are not needed, since
images hold their poses in any case.
Source: COLMAP's documentation, "Output Format".
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats.colmap import Array, Lens, Model
from vggt_cli.geometry import rotation_from_quaternion
from vggt_cli.scene import Cameras, Tracks

# By COLMAP's number: name, focal lengths, coefficients of distortion.
LENSES = (
    ("SIMPLE_PINHOLE", 1, 0),
    ("PINHOLE", 2, 0),
    ("SIMPLE_RADIAL", 1, 1),
    ("RADIAL", 1, 2),
    ("OPENCV", 2, 4),
    ("OPENCV_FISHEYE", 2, 4),
    ("FULL_OPENCV", 2, 8),
    ("FOV", 2, 1),
    ("SIMPLE_RADIAL_FISHEYE", 1, 1),
    ("RADIAL_FISHEYE", 1, 2),
    ("THIN_PRISM_FISHEYE", 2, 8),
)
MODELS = ("reference", "sparse/0", "sparse")  # where a scene has its model
UNDISTORT = "undistort the scene first: colmap image_undistorter"
NO_POINT = 2**64 - 1
OBSERVATION = np.dtype([("xy", "<f8", 2), ("point", "<u8")])


class _Image(NamedTuple):
    """A row of images.bin or images.txt."""

    number: int
    pose: tuple[float, ...]  # quaternion wxyz, translation
    camera: int
    name: str
    seen: Array  # [n] OBSERVATION


class _Points(NamedTuple):
    """points3D without its tracks, which the images hold too."""

    number: Array  # [N] uint64, ascending
    xyz: Array  # [N, 3]
    rgb: Array  # [N, 3] uint8


def locate(folder: Path) -> Path:
    """The folder of the model of the scene in `folder`, or `folder` itself where it is one.

    Raises InputError if there is none.
    """
    for found in (*(folder / name for name in MODELS), folder):
        if any((found / f"cameras.{kind}").is_file() for kind in ("bin", "txt")):
            return found
    raise InputError(f"no COLMAP model in {', '.join(MODELS)}: {folder}")


def read(folder: Path) -> Model:
    """The model in `folder`, images and points in the order of their ids; poses are float64.

    Binary files go before text. Focal lengths and principal points of distorted cameras are in
    `cameras`, the rest in `lenses`.
    Raises InputError for files that are missing, cut short or malformed, and camera models beyond
    COLMAP's first eleven.
    """
    kind = "bin" if (folder / "cameras.bin").is_file() else "txt"
    paths = [folder / f"{part}.{kind}" for part in ("cameras", "images", "points3D")]
    for path in paths:
        if not path.is_file():
            hint = "a model is cameras, images and points3D, all .bin or all .txt"
            raise InputError(f"no COLMAP model, {path.name} is missing: {folder}", hint)
    lenses = (_lenses if kind == "bin" else _lenses_text)(paths[0])
    found = (_images if kind == "bin" else _images_text)(paths[1])
    images = sorted(found, key=lambda image: image.number)
    points = (_points if kind == "bin" else _points_text)(paths[2])
    for image in images:
        if image.camera not in lenses:
            raise InputError(f"no camera {image.camera}, which {image.name} names: {paths[0]}")
    if not images:
        raise InputError(f"a COLMAP model without images: {folder}")
    order = {number: i for i, number in enumerate(sorted({image.camera for image in images}))}
    return Model(
        tuple(image.name for image in images),
        _cameras(images, lenses),
        tuple(order[image.camera] for image in images),
        _tracks(images, points, paths[1]),
        points.rgb,
        tuple(lenses[image.camera] for image in images),
    )


def _cameras(images: list[_Image], lenses: dict[int, Lens]) -> Cameras:
    poses = torch.tensor([image.pose for image in images], dtype=torch.float64)
    rotation = rotation_from_quaternion(poses[:, :4].roll(-1, 1))
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(len(images), 1, 1)
    for k, image in zip(intrinsics, images, strict=True):
        lens = lenses[image.camera]
        focals = next(focals for name, focals, _ in LENSES if name == lens.model)
        k[0, 0], k[1, 1] = lens.parameters[0], lens.parameters[focals - 1]
        k[:2, 2] = torch.tensor(lens.parameters[focals : focals + 2])
    size = torch.tensor([lenses[image.camera].size for image in images])
    return Cameras(torch.cat([rotation, poses[:, 4:, None]], -1), intrinsics, size)


def _tracks(images: list[_Image], points: _Points, path: Path) -> Tracks:
    """Observations by point and frame; 2D points without a 3D point are left out."""
    seen = np.concatenate([image.seen for image in images])
    frame = np.repeat(np.arange(len(images)), [len(image.seen) for image in images])
    frame, seen = frame[seen["point"] != NO_POINT], seen[seen["point"] != NO_POINT]
    if not np.isin(seen["point"], points.number).all():
        raise InputError(f"images see points that points3D lacks: {path}")
    point = np.searchsorted(points.number, seen["point"])
    order = np.lexsort((frame, point))
    return Tracks(
        torch.from_numpy(points.xyz.astype(np.float32)),
        torch.from_numpy(point[order]),
        torch.from_numpy(frame[order].astype(np.int32)),
        torch.from_numpy(seen["xy"][order].astype(np.float32)),
    )


def _lens(path: Path, model: str, size: tuple[int, int], parameters: tuple[float, ...]) -> Lens:
    known = {name: (focals, extra) for name, focals, extra in LENSES}
    if model not in known:
        raise InputError(f"a camera of model {model}, which is not read: {path}", UNDISTORT)
    focals, extra = known[model]
    if len(parameters) != focals + 2 + extra or min(*size, *parameters[:focals]) <= 0:
        raise InputError(f"a {model} camera of {size[1]} x {size[0]} with {parameters}: {path}")
    return Lens(model, size, parameters, any(parameters[focals + 2 :]))


class _Bytes:
    """A binary file, read from its start; InputError where it ends too soon."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def skip(self, length: int) -> int:
        """Where the next `length` bytes start."""
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise InputError(f"the file is cut short: {self.path}", "copy or make it again")
        return start

    def take(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack_from("<" + layout, self.data, self.skip(struct.calcsize("<" + layout)))

    def count(self) -> range:
        return range(self.take("Q")[0])

    def name(self) -> str:
        end = self.data.find(b"\0", self.at)
        start = self.skip(max(end + 1, self.at + 1) - self.at)
        return self.data[start:end].decode(errors="replace")


def _lenses(path: Path) -> dict[int, Lens]:
    file, lenses = _Bytes(path), {}
    for _ in file.count():
        number, model, w, h = file.take("IiQQ")
        name, focals, extra = LENSES[model] if model in range(len(LENSES)) else (f"{model}", 0, 0)
        lenses[number] = _lens(path, name, (h, w), file.take(f"{focals + 2 + extra}d"))
    return lenses


def _images(path: Path) -> Iterator[_Image]:
    file = _Bytes(path)
    for _ in file.count():
        number, *pose, camera = file.take("I7dI")
        name, length = file.name(), file.take("Q")[0]
        seen = np.frombuffer(file.data, OBSERVATION, length, file.skip(length * 24))
        yield _Image(number, tuple(pose), camera, name, seen)


def _points(path: Path) -> _Points:
    file, rows = _Bytes(path), []
    for _ in file.count():
        *row, _, length = file.take("Q3d3BdQ")
        rows.append(row)
        file.skip(length * 8)
    return _as_points(rows)


def _as_points(rows: list[list[Any]]) -> _Points:
    rows.sort(key=lambda row: row[0])
    number = np.array([row[0] for row in rows], np.uint64)
    xyz = np.array([row[1:4] for row in rows], np.float64).reshape(-1, 3)
    rgb = np.array([row[4:7] for row in rows], np.uint8).reshape(-1, 3)
    return _Points(number, xyz, rgb)


@contextlib.contextmanager
def _rows(path: Path) -> Iterator[Iterator[list[str]]]:
    """The words of each line that is no comment; InputError where they cannot be understood."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        yield (line.split() for line in text.split("\n") if not line.startswith("#"))
    except (ValueError, IndexError, OverflowError, StopIteration) as error:
        raise InputError(f"a malformed line of a COLMAP model: {path} ({error})") from error


def _lenses_text(path: Path) -> dict[int, Lens]:
    lenses = {}
    with _rows(path) as rows:
        for number, model, w, h, *parameters in filter(None, rows):
            values = tuple(map(float, parameters))
            lenses[int(number)] = _lens(path, model, (int(h), int(w)), values)
    return lenses


def _images_text(path: Path) -> list[_Image]:
    images = []
    with _rows(path) as rows:
        for words in rows:  # two lines an image; the second may be empty
            if not words:
                continue
            number, *pose, camera = words[:9]
            values = np.array(next(rows), np.float64).reshape(-1, 3)
            seen = np.empty(len(values), OBSERVATION)
            seen["xy"] = values[:, :2]
            seen["point"] = np.where(values[:, 2] < 0, NO_POINT, values[:, 2].astype(np.int64))
            name = " ".join(words[9:])
            images.append(_Image(int(number), tuple(map(float, pose)), int(camera), name, seen))
    return images


def _points_text(path: Path) -> _Points:
    with _rows(path) as rows:
        return _as_points([[int(n), *map(float, row[:6])] for n, *row in filter(None, rows)])


def read_map(path: Path) -> Tensor:
    """The map [h, w] float32 of z-depth or confidence in `path`, .bin or .npy; 0: unknown.

    COLMAP's .bin has a header, width&height&channels& in digits, then float32 values row by row.
    Raises InputError if the file is no such map.
    """
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            data = path.read_bytes()
            header = re.match(rb"(\d+)&(\d+)&1&", data)
            w, h = (int(n) for n in header.groups()) if header else (0, 0)
            found = np.frombuffer(data, "<f4", offset=header.end() if header else 0).reshape(h, w)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"not a map of one number a pixel: {path} ({error})") from error
    if found.ndim != 2 or found.dtype.kind != "f" or not found.size:
        raise InputError(
            f"not a map of one number a pixel: {path} ({found.dtype} of shape {found.shape})"
        )
    known = np.isfinite(found) & (found > 0)
    return torch.from_numpy(np.where(known, found, 0).astype(np.float32))
