"""The COLMAP sparse model: cameras, images and points3D, binary or text.

Written with NumPy alone, in the layout that every COLMAP since 3.0 and every fixed-table reader
knows (no rigs, no frames, PINHOLE only); `colmap_read` reads it. The one door to pycolmap.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from vggt_cli.geometry import project_tracks, quaternion_from_rotation
from vggt_cli.scene import Cameras, Tracks

Array = npt.NDArray[Any]
AT_ONCE = 2**16  # points that are made into lines of text together
PINHOLE = 1  # COLMAP's number of the camera model


@dataclass(frozen=True)
class Lens:
    """A camera of any of COLMAP's models, in pixels of images of `size`."""

    model: str  # COLMAP's name
    size: tuple[int, int]  # (height, width)
    parameters: tuple[float, ...]  # in COLMAP's order: focal lengths, principal point, distortion
    distorted: bool = False  # any coefficient of distortion is not 0


@dataclass(frozen=True, eq=False)
class Model:
    """What the three files hold; ids count from 1 in the order of the arrays."""

    names: tuple[str, ...]  # file of each image in images/
    cameras: Cameras  # [S], pixels of these files
    camera_of_image: tuple[int, ...]  # [S] frames with equal numbers share intrinsics
    tracks: Tracks
    rgb: Array  # [N, 3] uint8
    lenses: tuple[Lens, ...] = ()  # [S] of a model that was read; `cameras` lack their distortion

    def intrinsics_of_cameras(self) -> list[tuple[int, int, int, Array]]:
        """(id, width, height, [fx, fy, cx, cy]) of each camera."""
        assert not any(lens.distorted for lens in self.lenses), "distortion would be lost"
        first = {n: i for i, n in reversed(list(enumerate(self.camera_of_image)))}
        rows = []
        for number, i in sorted(first.items()):
            h, w = self.cameras.image_size[i].tolist()
            k = self.cameras.intrinsics[i].double().numpy()
            rows.append((number + 1, w, h, np.array([k[0, 0], k[1, 1], k[0, 2], k[1, 2]])))
        return rows

    def poses(self) -> tuple[Array, Array]:
        """Quaternions wxyz [S, 4], orthonormal by construction, and translations [S, 3]."""
        extrinsics = self.cameras.extrinsics.double()
        xyzw = quaternion_from_rotation(extrinsics[:, :, :3])
        wxyz = (xyzw / xyzw.norm(dim=-1, keepdim=True)).roll(1, -1)
        return wxyz.numpy(), extrinsics[:, :, 3].numpy()

    def point_errors(self) -> Array:
        """[N] mean distance in pixels from a point's observations to its projections."""
        return self._point_errors

    @cached_property
    def _point_errors(self) -> Array:  # files and the report ask for them
        tracks = self.tracks
        xy, _ = project_tracks(tracks, self.cameras)
        distance = (xy - tracks.xy.double()).norm(dim=-1).numpy()
        n = len(tracks.xyz)
        count = np.bincount(tracks.point.numpy(), minlength=n)
        total = np.bincount(tracks.point.numpy(), weights=distance, minlength=n)
        return total / np.maximum(count, 1)

    def observations_by_image(self) -> tuple[list[Array], Array]:
        """Each image's rows of the observations, and [K] the index of each within its image."""
        # Of 16 bits or fewer, as NumPy then counts instead of comparing.
        frame = self.tracks.frame.numpy().astype(np.min_scalar_type(len(self.names)))
        order = np.argsort(frame, kind="stable")
        ends = np.searchsorted(frame[order], np.arange(len(self.names) + 1))
        rows = [order[a:b] for a, b in itertools.pairwise(ends)]
        index = np.empty(len(frame), np.uint32)
        for in_image in rows:
            index[in_image] = np.arange(len(in_image))
        return rows, index


def write(model: Model, folder: Path) -> None:
    """cameras.bin, images.bin and points3D.bin in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_cameras(model, folder / "cameras.bin")
    _write_images(model, folder / "images.bin")
    _write_points(model, folder / "points3D.bin")


def write_text(model: Model, folder: Path) -> None:
    """The same model as cameras.txt, images.txt and points3D.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_cameras_text(model, folder / "cameras.txt")
    _write_images_text(model, folder / "images.txt")
    _write_points_text(model, folder / "points3D.txt")


def _write_cameras(model: Model, path: Path) -> None:
    with path.open("wb") as file:
        cameras = model.intrinsics_of_cameras()
        file.write(struct.pack("<Q", len(cameras)))
        for number, w, h, parameters in cameras:
            file.write(struct.pack("<IiQQ4d", number, PINHOLE, w, h, *parameters))


def _write_images(model: Model, path: Path) -> None:
    quaternions, translations = model.poses()
    rows_of_image, _ = model.observations_by_image()
    xy, point = model.tracks.xy.numpy(), model.tracks.point.numpy()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(model.names)))
        for i, (name, rows) in enumerate(zip(model.names, rows_of_image, strict=True)):
            camera = model.camera_of_image[i] + 1
            file.write(struct.pack("<I7dI", i + 1, *quaternions[i], *translations[i], camera))
            file.write(name.encode() + b"\0")
            points2d = np.empty(len(rows), [("xy", "<f8", 2), ("point3d_id", "<u8")])
            points2d["xy"], points2d["point3d_id"] = xy[rows], point[rows] + 1
            file.write(struct.pack("<Q", len(rows)) + points2d.tobytes())


def _write_points(model: Model, path: Path) -> None:
    """Points are grouped by the length of their track: each group is one structured array."""
    tracks, errors = model.tracks, model.point_errors()
    _, index = model.observations_by_image()
    xyz, frame = tracks.xyz.numpy(), tracks.frame.numpy()
    starts = np.searchsorted(tracks.point.numpy(), np.arange(len(xyz) + 1))
    lengths = np.diff(starts)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(xyz)))
        for length in np.unique(lengths):
            chosen = np.flatnonzero(lengths == length)
            layout = [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8")]
            record = np.empty(
                len(chosen), [*layout, ("length", "<u8"), ("track", "<u4", (int(length), 2))]
            )
            record["id"], record["xyz"], record["rgb"] = chosen + 1, xyz[chosen], model.rgb[chosen]
            record["error"], record["length"] = errors[chosen], length
            rows = starts[chosen][:, None] + np.arange(length)
            record["track"][..., 0], record["track"][..., 1] = frame[rows] + 1, index[rows]
            file.write(record.tobytes())


def _write_cameras_text(model: Model, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n")
        for number, w, h, parameters in model.intrinsics_of_cameras():
            file.write(f"{number} PINHOLE {w} {h} {' '.join(map(repr, parameters.tolist()))}\n")


def _write_images_text(model: Model, path: Path) -> None:
    quaternions, translations = model.poses()
    rows_of_image, _ = model.observations_by_image()
    xy, point = model.tracks.xy.numpy(), model.tracks.point.numpy()
    with path.open("w", encoding="utf-8", newline="\n") as file:
        # Two comment lines: some readers want an even number of lines.
        file.write("# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n")
        file.write("# POINTS2D[] as (X, Y, POINT3D_ID)\n")
        for i, (name, rows) in enumerate(zip(model.names, rows_of_image, strict=True)):
            pose = " ".join(repr(x) for x in [*quaternions[i].tolist(), *translations[i].tolist()])
            file.write(f"{i + 1} {pose} {model.camera_of_image[i] + 1} {name}\n")
            seen = np.empty((len(rows), 3), object)
            seen[:, :2], seen[:, 2] = xy[rows], point[rows] + 1
            # One pattern for all: twice as fast as a string for each.
            file.write(" ".join(["%.9g %.9g %d"] * len(rows)) % tuple(seen.ravel()) + "\n")


def _write_points_text(model: Model, path: Path) -> None:
    tracks, errors = model.tracks, model.point_errors()
    _, index = model.observations_by_image()
    starts = np.searchsorted(tracks.point.numpy(), np.arange(len(tracks.xyz) + 1))
    lengths = np.diff(starts)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)\n")
        for first in range(0, len(lengths), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            seen = slice(starts[first], starts[min(first + AT_ONCE, len(lengths))])
            columns = [np.arange(first, len(lengths))[:AT_ONCE] + 1, *tracks.xyz[some].numpy().T]
            columns += [*model.rgb[some].T, errors[some]]
            elements = tracks.frame[seen].numpy() + 1, index[seen]
            file.write(_lines_of_points(columns, elements, lengths[some]))


def _lines_of_points(columns: list[Array], elements: tuple[Array, Array], lengths: Array) -> str:
    """A line each of eight `columns` [n] and of as many `elements` [m] as `lengths` [n] says."""
    starts = np.cumsum(8 + 2 * lengths) - (8 + 2 * lengths)  # of the lines, in values
    values = np.empty(int((8 + 2 * lengths).sum()), object)
    for k, column in enumerate(columns):
        values[starts + k] = column
    at = np.repeat(starts + 8 - 2 * (np.cumsum(lengths) - lengths), lengths)
    at += 2 * np.arange(len(at))
    values[at], values[at + 1] = elements
    pattern = {n: " ".join(["%d %d"] * n) for n in np.unique(lengths).tolist()}
    head = "%d %.9g %.9g %.9g %d %d %d %.9g "
    return "".join([f"{head}{pattern[n]}\n" for n in lengths.tolist()]) % tuple(values)


def pycolmap() -> ModuleType:
    """The pycolmap module, imported safely and with its log kept to errors."""
    import zlib  # noqa: F401  pycolmap brings its own zlib: if that is first, Pillow's PNGs abort

    import pycolmap as module

    module.logging.minloglevel = 2
    return module
