"""What users know about their cameras, as other tools write it: poses and intrinsics.

Sources: COLMAP's documentation, "Output Format"; nerfstudio's, "Data conventions", whose
transforms.json is instant-ngp's too. Both put the centre of the top-left pixel at (0.5, 0.5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap_read
from vggt_cli.formats.colmap import Lens
from vggt_cli.formats.colmap_read import UNDISTORT

STRAIGHT = 0.01  # of a length: what axes of a pose may be off being a rotation's
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
NOT_PINHOLE = ("FISHEYE", "FOV", "EQUIRECTANGULAR", "SPHERICAL", "ORTHO")
INTRINSICS = "a COLMAP model, a transforms.json, or text: fx fy cx cy or lines NAME fx fy cx cy"


@dataclass(frozen=True, eq=False)
class Poses:
    """Poses of photos as a file has them, and what its format means by them."""

    path: Path
    names: tuple[str, ...]  # [P]
    matrices: Tensor  # [P, 3, 4] float64; orthogonal, not always proper
    camera_to_world: bool  # else world-to-camera
    opengl: bool  # the cameras' axes: x right, y up, z back; else OpenCV's

    @property
    def extrinsics(self) -> Tensor:
        """[P, 3, 4] world-to-camera with OpenCV axes, if the file keeps to its format."""
        found = self.matrices
        if self.camera_to_world:
            rotation = found[:, :, :3].mT
            found = torch.cat([rotation, -rotation @ found[:, :, 3:]], -1)
        flip = torch.tensor([1.0, -1, -1] if self.opengl else [1.0, 1, 1], dtype=found.dtype)
        return flip[:, None] * found


@dataclass(frozen=True, eq=False)
class Lenses:
    """Intrinsics as the user has them, of photos by name or, without names, of every photo."""

    source: str  # where they are from, for words
    names: tuple[str, ...]  # [P], or empty: the one row is that of every photo
    intrinsics: Tensor  # [P, 3, 3] float64, pixel centres at +0.5
    size: Tensor  # [P, 2] (height, width) of the images they belong to; 0: not said
    distorted: bool = False  # their distortion is not here


def read_poses(path: Path) -> Poses:
    """The poses in a COLMAP model's or scene's folder, or in a transforms.json.

    transforms.json: camera-to-world with OpenGL axes; positions are divided by applied_scale.
    Raises InputError for what is missing or malformed.
    """
    if path.is_dir():
        model = colmap_read.read_cameras(colmap_read.locate(path))
        return Poses(path, model.names, model.cameras.extrinsics, False, False)
    content = _transforms(path)
    names, matrices = [], []
    for number, frame in enumerate(content["frames"]):
        names.append(_name(frame, number, path))
        matrices.append(_matrix(frame.get("transform_matrix"), names[-1], path))
    stacked = torch.stack(matrices)
    stacked[:, :, 3] /= _positive(content.get("applied_scale", 1.0), "applied_scale", path)
    return Poses(path, tuple(names), stacked, True, True)


def _transforms(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"no such file or folder: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "poses are a COLMAP model's folder or a transforms.json"
        raise InputError(f"no JSON: {path} ({error})", hint) from error
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(f, dict) for f in frames):
        raise InputError(f"no list of frames in: {path}", "see nerfstudio's data conventions")
    return dict(content)


def _name(frame: Mapping[str, Any], number: int, path: Path) -> str:
    name = frame.get("file_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"no file_path in frame {number}: {path}")
    return name


def _matrix(rows: Any, name: str, path: Path) -> Tensor:
    """[3, 4] with axes made orthogonal."""
    try:
        matrix = torch.tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        matrix = torch.empty(0)
    if matrix.shape not in ((3, 4), (4, 4)) or not matrix.isfinite().all():
        raise InputError(f"no transform_matrix of 4 x 4 numbers for {name}: {path}")
    last = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    if len(matrix) == 4 and not torch.allclose(matrix[3], last, atol=1e-6):
        turned = torch.allclose(matrix[:, 3], last, atol=1e-6)
        what = "is transposed" if turned else "does not end with the row 0 0 0 1"
        raise InputError(f"the transform_matrix of {name} {what}: {path}")
    axes = matrix[:3, :3]
    if (axes.mT @ axes - torch.eye(3, dtype=axes.dtype)).abs().max() > STRAIGHT:
        raise InputError(
            f"the transform_matrix of {name} is no rotation and shift: {path}",
            "its first three columns must have length 1 and stand at right angles",
        )
    u, _, vh = torch.linalg.svd(axes)
    return torch.cat([u @ vh, matrix[:3, 3:]], -1)


def _positive(value: Any, what: str, path: Path | str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{what} is no positive number but {value}: {path}")
    return float(value)


def read_intrinsics(text: str) -> Lenses:
    """The intrinsics that `text` means: four numbers fx,fy,cx,cy in pixels, or a file of them.

    Files: a COLMAP model's folder or cameras file; transforms.json; text with four numbers, with
    the three rows of a matrix, or with lines NAME fx fy cx cy.
    Raises InputError.
    """
    numbers = _numbers(text.split(","))
    if len(numbers) == 4:
        return _every_photo(text, numbers)
    path = Path(text)
    if not path.exists():
        raise InputError(f"neither fx,fy,cx,cy nor a file: {text}", f"a file is {INTRINSICS}")
    if path.is_dir():
        return _of_model(colmap_read.locate(path))
    if path.stem == "cameras" and path.suffix in (".bin", ".txt"):
        return _of_model(path.parent)
    return _of_transforms(path) if path.suffix.lower() == ".json" else _of_text(path)


def _numbers(words: list[str]) -> list[float]:
    """The finite numbers that all `words` are; empty where one is none."""
    try:
        found = [float(word) for word in words]
    except ValueError:
        return []
    return found if all(map(math.isfinite, found)) else []


def _pinhole(values: list[float], source: str) -> Tensor:
    """[3, 3] of fx, fy, cx, cy."""
    fx, fy, cx, cy = values
    for value, what in ((fx, "fx"), (fy, "fy")):
        _positive(value, what, source)
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)


def _every_photo(source: str, values: list[float]) -> Lenses:
    return Lenses(source, (), _pinhole(values, source)[None], torch.zeros(1, 2).long())


def _of_model(folder: Path) -> Lenses:
    """By photo, or one for all where the model has one camera."""
    lenses = colmap_read.read_lenses(folder)
    names: tuple[str, ...] = ()
    rows: list[Lens] = list(lenses.values())
    if len(lenses) > 1:
        model = colmap_read.read_cameras(folder)
        names, rows = model.names, list(model.lenses)
    if not rows:
        raise InputError(f"a COLMAP model without cameras: {folder}")
    for lens in rows:
        _refuse_wide(lens.model, folder)
    return Lenses(
        str(folder),
        names,
        torch.stack([colmap_read.pinhole(lens) for lens in rows]),
        torch.tensor([lens.size for lens in rows]),
        any(lens.distorted for lens in rows),
    )


def _refuse_wide(model: str, path: Path) -> None:
    if any(word in model.upper() for word in NOT_PINHOLE):
        raise InputError(f"a lens of model {model}, which is no pinhole: {path}", UNDISTORT)


def _of_transforms(path: Path) -> Lenses:
    """By photo; one for all where no frame has intrinsics of its own."""
    content = _transforms(path)
    own = ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x")
    frames = content["frames"]
    names: tuple[str, ...] = ()
    if any(key in frame for frame in frames for key in own):
        names = tuple(_name(frame, i, path) for i, frame in enumerate(frames))
    read = [_of_frame({**content, **frame}, path) for frame in (frames if names else frames[:1])]
    size = torch.tensor([size for _, size, _ in read])
    distorted = any(bent for _, _, bent in read)
    return Lenses(str(path), names, torch.stack([k for k, _, _ in read]), size, distorted)


def _of_frame(values: Mapping[str, Any], path: Path) -> tuple[Tensor, tuple[int, int], bool]:
    """Intrinsics [3, 3], size or zeros, and whether there is distortion, of one photo."""
    _refuse_wide(str(values.get("camera_model", "")), path)
    said = "w" in values and "h" in values
    w, h = (_positive(values[key], key, path) if said else 0.0 for key in ("w", "h"))
    focal = [values.get(key) for key in ("fl_x", "fl_y")]
    for axis, (angle, side) in enumerate((("camera_angle_x", w), ("camera_angle_y", h))):
        if focal[axis] is None and angle in values and side:
            half = _positive(values[angle], angle, path) / 2
            focal[axis] = side / 2 / math.tan(min(half, 1.57))
    fx = focal[0] if focal[0] is not None else focal[1]
    if fx is None:
        raise InputError(f"no fl_x, and no camera_angle_x with w and h, in: {path}")
    fy = focal[1] if focal[1] is not None else fx
    center = [values.get("cx", w / 2 or None), values.get("cy", h / 2 or None)]
    if None in center:
        raise InputError(f"neither cx and cy nor w and h in: {path}")
    given = [_positive(v, "an intrinsic number", path) for v in (fx, fy, *center)]
    bent = any(values.get(key) for key in DISTORTION)
    return _pinhole(given, str(path)), (round(h), round(w)), bent


def _of_text(path: Path) -> Lenses:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"no intrinsics: {path} ({error})", f"a file is {INTRINSICS}") from error
    rows = [line.replace(",", " ").split() for line in lines if not line.lstrip().startswith("#")]
    rows = [row for row in rows if row]
    alone = _numbers([word for row in rows for word in row])
    if len(alone) == 4:
        return _every_photo(str(path), alone)
    if [len(row) for row in rows] == [3, 3, 3] and alone:
        return _of_matrix(path, alone)
    values = [_numbers(row[-4:]) if len(row) > 4 else [] for row in rows]
    for row, found in zip(rows, values, strict=True):
        if not found:
            words = f"no intrinsics, at the line {' '.join(row)[:60]!r}: {path}"
            raise InputError(words, f"a file is {INTRINSICS}")
    if not rows:
        raise InputError(f"no intrinsics, an empty file: {path}", f"a file is {INTRINSICS}")
    names = tuple(" ".join(row[:-4]) for row in rows)
    intrinsics = torch.stack([_pinhole(found, str(path)) for found in values])
    return Lenses(str(path), names, intrinsics, torch.zeros(len(rows), 2).long())


def _of_matrix(path: Path, values: list[float]) -> Lenses:
    fx, skew, cx, *rest = values
    if rest[0] != 0 or rest[3:] != [0, 0, 1] or abs(skew) > STRAIGHT * fx:
        raise InputError(f"no matrix of intrinsics without skew, fx 0 cx, 0 fy cy, 0 0 1: {path}")
    return _every_photo(str(path), [fx, rest[1], cx, rest[2]])
