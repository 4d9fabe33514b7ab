"""The files of a COLMAP sparse model, binary or text, as they stand: rows, not yet a model.

With NumPy alone: pycolmap 4.2 does not come back from a points3D.bin that is cut short, and takes
a cut cameras.bin for a camera of focal length 0. Without torch, so that looking at a model need
not wait for it. Files of rigs and frames are not needed: images hold their poses in any case.
Source: COLMAP's documentation, "Output Format".
"""

from __future__ import annotations

import contextlib
import itertools
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vggt_cli.errors import InputError

Array = npt.NDArray[Any]
PARTS = ("cameras", "images", "points3D")
# By COLMAP's number: name, focal lengths, coefficients of distortion. Numbers from 11 on came with
# COLMAP 4; readers with a fixed table know the first eleven.
MODELS = (
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
    ("RAD_TAN_THIN_PRISM_FISHEYE", 2, 12),
    ("SIMPLE_DIVISION", 1, 1),
    ("DIVISION", 2, 1),
    ("SIMPLE_FISHEYE", 1, 0),
    ("FISHEYE", 2, 0),
    ("EUCM", 2, 2),
    ("EQUIRECTANGULAR", 0, 0),
)
NO_POINT = 2**64 - 1
OBSERVATION = np.dtype([("xy", "<f8", 2), ("point", "<u8")])
POINT = np.dtype(  # 51 bytes; its track follows
    [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8")]
)
ELEMENT = np.dtype([("image", "<u4"), ("index", "<u4")])


class Camera(NamedTuple):
    """A row of cameras.bin or cameras.txt."""

    model: str  # COLMAP's name
    size: tuple[int, int]  # (height, width)
    parameters: tuple[float, ...]  # focal lengths, principal point, distortion

    def focals(self) -> int:
        """How many of the parameters are focal lengths; models beyond COLMAP 4.1: 1."""
        return next((focals for name, focals, _ in MODELS if name == self.model), 1)

    def principal_point(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        x, y = self.parameters[self.focals() : self.focals() + 2]
        return x, y


class Image(NamedTuple):
    """A row of images.bin or images.txt."""

    number: int
    pose: tuple[float, ...]  # quaternion wxyz, translation: world-to-camera
    camera: int
    name: str
    seen: Array  # [n] OBSERVATION


class Points(NamedTuple):
    """points3D, in the order of the file."""

    number: Array  # [N] uint64
    xyz: Array  # [N, 3] float64
    rgb: Array  # [N, 3] uint8
    length: Array  # [N] int64, of the tracks
    track: Array  # [sum of lengths] ELEMENT, point after point


NO_POINTS = Points(
    np.empty(0, "u8"),
    np.empty((0, 3)),
    np.empty((0, 3), "u1"),
    np.empty(0, "i8"),
    np.empty(0, ELEMENT),
)


def kind_of(folder: Path) -> str:
    """Which files count, "bin" or "txt": the whole set, binary before text; else what is there."""
    there = {k: [(folder / f"{part}.{k}").is_file() for part in PARTS] for k in ("bin", "txt")}
    whole, some = ([k for k in there if test(there[k])] for test in (all, any))
    return [*whole, *some, "bin"][0]


def cameras(folder: Path) -> dict[int, Camera]:
    """The cameras by id. Raises InputError for a file that is missing, cut short or malformed."""
    path = _existing(folder, "cameras")
    return (_cameras if path.suffix == ".bin" else _cameras_text)(path)


def images(folder: Path) -> list[Image]:
    """The images in the order of the file; raises InputError as `cameras` does."""
    path = _existing(folder, "images")
    return list((_images if path.suffix == ".bin" else _images_text)(path))


def points(folder: Path) -> Points:
    """The points; raises InputError as `cameras` does."""
    path = _existing(folder, "points3D")
    return (_points if path.suffix == ".bin" else _points_text)(path)


def _existing(folder: Path, part: str) -> Path:
    path = folder / f"{part}.{kind_of(folder)}"
    if not path.is_file():
        hint = "a model is cameras, images and points3D, all .bin or all .txt"
        raise InputError(f"no COLMAP model, {path.name} is missing: {folder}", hint)
    return path


def _camera(path: Path, model: str, size: tuple[int, int], values: tuple[float, ...]) -> Camera:
    known = {name: (focals, focals + 2 + extra) for name, focals, extra in MODELS}
    focals, count = known.get(model, (0, len(values)))
    positive = all(value > 0 for value in (*size, *values[:focals]))
    if (
        len(values) != count
        or not positive
        or max(size) >= 2**31
        or not all(map(math.isfinite, values))
    ):
        raise InputError(f"a {model} camera of {size[1]} x {size[0]} with {values}: {path}")
    return Camera(model, size, values)


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

    def records(self, starts: Array, layout: np.dtype[Any]) -> Array:
        """[n] of `layout`, which need not be aligned, at the bytes `starts` [n]."""
        if not len(starts):
            return np.empty(0, layout)
        size = layout.itemsize
        windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(self.data, "u1"), size)
        return windows[starts].reshape(-1).view(layout)


def _cameras(path: Path) -> dict[int, Camera]:
    file, found = _Bytes(path), {}
    for _ in file.count():
        number, model, w, h = file.take("IiQQ")
        if model not in range(len(MODELS)):
            raise InputError(f"a camera of model {model}, which is not known: {path}")
        name, focals, extra = MODELS[model]
        found[number] = _camera(path, name, (h, w), file.take(f"{focals + 2 + extra}d"))
    return found


def _images(path: Path) -> Iterator[Image]:
    file = _Bytes(path)
    for _ in file.count():
        number, *pose, camera = file.take("I7dI")
        name, length = file.name(), file.take("Q")[0]
        start = file.skip(length * OBSERVATION.itemsize)
        seen = np.frombuffer(file.data, OBSERVATION, length, start)
        yield Image(number, tuple(pose), camera, name, seen)


def _points(path: Path) -> Points:
    file, starts = _Bytes(path), []
    length_at, length = POINT.itemsize - 8, struct.Struct("<Q")
    for _ in file.count():  # the one loop over points: the length of a track says where the next is
        start = file.skip(POINT.itemsize)
        starts.append(start)
        file.skip(8 * length.unpack_from(file.data, start + length_at)[0])
    at = np.array(starts, np.int64)
    rows = file.records(at, POINT)
    lengths = rows["length"].astype(np.int64)
    before = np.repeat(np.cumsum(lengths) - lengths, lengths)  # elements of the points before
    within = np.arange(lengths.sum()) - before
    track = file.records(np.repeat(at + POINT.itemsize, lengths) + 8 * within, ELEMENT)
    return Points(rows["id"], rows["xyz"], rows["rgb"], lengths, track)


@contextlib.contextmanager
def _rows(path: Path) -> Iterator[Iterator[list[str]]]:
    """The words of each line that is no comment; InputError where they cannot be understood."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        yield (line.split() for line in text.split("\n") if not line.startswith("#"))
    except (ValueError, IndexError, OverflowError, StopIteration) as error:
        raise InputError(f"a malformed line of a COLMAP model: {path} ({error})") from error


def _cameras_text(path: Path) -> dict[int, Camera]:
    found = {}
    with _rows(path) as rows:
        for number, model, w, h, *values in filter(None, rows):
            size = int(h), int(w)
            found[int(number)] = _camera(path, model, size, tuple(map(float, values)))
    return found


def _images_text(path: Path) -> list[Image]:
    found = []
    with _rows(path) as rows:
        for words in rows:  # two lines an image; the second may be empty
            if not words:
                continue
            number, *pose, camera = words[:9]
            values = np.array(next(rows), np.float64).reshape(-1, 3)
            seen = np.empty(len(values), OBSERVATION)
            seen["xy"] = values[:, :2]
            if not (np.abs(values[:, 2]) < 2**63).all():
                raise ValueError("a point whose id is no number")
            seen["point"] = np.where(values[:, 2] < 0, NO_POINT, values[:, 2].astype(np.int64))
            name = " ".join(words[9:])
            ids = [int(np.uint32(int(word))) for word in (number, camera)]
            found.append(Image(ids[0], tuple(map(float, pose)), ids[1], name, seen))
    return found


def _points_text(path: Path) -> Points:
    with _rows(path) as rows:
        lines = list(filter(None, rows))
        number = np.array([int(words[0]) for words in lines], np.uint64)
        values = np.array([list(map(float, words[1:7])) for words in lines]).reshape(-1, 6)
        tracks = [list(map(int, words[8:])) for words in lines]
        length = np.array([len(track) // 2 for track in tracks], np.int64)
        pairs = np.fromiter(itertools.chain.from_iterable(tracks), np.uint32).reshape(-1, 2)
    track = np.ascontiguousarray(pairs).view(ELEMENT)[:, 0] if len(pairs) else NO_POINTS.track
    rgb = np.nan_to_num(values[:, 3:]).clip(0, 255).astype(np.uint8)
    return Points(number, values[:, :3], rgb, length, track)
