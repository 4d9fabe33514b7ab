"""CO3Dv2, RealEstate10K, DTU and ETH3D in their own layouts, frames chosen as the papers say.

The papers draw frames at random, and their lists are not public or bound to their own order of
files. Ours are drawn by a rule that needs no list: frames in the order of a hash of their names.
Source: spec vggt section 13, vggt_omega section 15.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import rq
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats.colmap import Lens, Model, pycolmap
from vggt_cli.formats.colmap_read import read
from vggt_cli.formats.decode import size_of
from vggt_cli.geometry import pixel_centers
from vggt_cli.learning.clouds import DtuScan, Score, of_pixels
from vggt_cli.learning.datasets import PhotoScene, nearest
from vggt_cli.scene import Cameras, Tracks

log = logging.getLogger(__name__)

SEED = 0
FRAMES = 10  # of a sequence
# VGGT's evaluation of CO3Dv2: categories it was trained on, whose test sequences are held out.
CO3D_CATEGORIES = (
    "apple backpack banana baseballbat baseballglove bench bicycle bottle bowl broccoli cake car "
    "carrot cellphone chair cup donut hairdryer handbag hydrant keyboard laptop microwave "
    "motorcycle mouse orange parkingmeter pizza plant stopsign teddybear toaster toilet toybus "
    "toyplane toytrain toytruck tv umbrella vase wineglass"
)
CO3D_LEAST_QUALITY = 0.5  # of a sequence's cameras, by the data set's own score
CO3D_LEAST_FRAMES = 50
CO3D_FARTHEST = 1e5  # x + y + z of a translation: cameras beyond are broken
DTU_SCANS = (1, 4, 9, 10, 11, 12, 13, 15, 23, 24, 29, 32, 33, 34, 48, 49, 62, 75, 77, 110, 114, 118)
DTU_VIEWS = 49
DTU_LIGHT = 3  # all lamps on


class Trial(NamedTuple):
    """Photos with their truth; figures are averaged over a group first, then over groups."""

    group: str
    scene: PhotoScene
    score: Score | None = None  # of points


def co3d(root: Path, limit: int | None = None) -> Iterator[Trial]:
    """CO3Dv2: ten frames of each test sequence of the 41 categories, a category a group.

    limit: most sequences of a category.
    """
    found = [
        name
        for name in CO3D_CATEGORIES.split()
        if (root / name / "frame_annotations.jgz").is_file()
    ]
    _require(found, root, "CATEGORY/frame_annotations.jgz")
    for category in found:
        folder = root / category
        good = {
            entry["sequence_name"]
            for entry in _jgz(folder / "sequence_annotations.jgz")
            if (entry.get("viewpoint_quality_score") or 0) > CO3D_LEAST_QUALITY
        }
        listed = json.loads((folder / "set_lists/set_lists_fewview_dev.json").read_text("utf-8"))
        test = {(sequence, frame) for sequence, frame, _ in listed["test"] if sequence in good}
        frames: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in _jgz(folder / "frame_annotations.jgz"):
            if (entry["sequence_name"], entry["frame_number"]) in test:
                frames[entry["sequence_name"]].append(entry)
        usable = [name for name, entries in frames.items() if _sound(entries)]
        for sequence in drawn(usable, limit):
            by_name = {entry["image"]["path"]: entry for entry in frames[sequence]}
            names = drawn(list(by_name), FRAMES)
            cameras = _cameras([_of_pytorch3d(by_name[name]) for name in names])
            yield Trial(category, _scene(root, names, cameras))


def real_estate(root: Path, limit: int | None = None) -> Iterator[Trial]:
    """RealEstate10K: ten frames of each sequence test/SEQUENCE.txt whose frames lie beside it.

    The data set holds no pictures; they are looked for at test/SEQUENCE/TIMESTAMP.jpg or .png.
    """
    lists = {path.stem: path for path in (root / "test").glob("*.txt")}
    _require(lists, root, "test/SEQUENCE.txt")
    there = [name for name in sorted(lists) if (root / "test" / name).is_dir()]
    _require(there, root, "test/SEQUENCE/TIMESTAMP.jpg or .png, the frames of test/SEQUENCE.txt")
    for sequence in drawn(there, limit):
        folder = root / "test" / sequence
        rows = [line.split() for line in lists[sequence].read_text("utf-8").splitlines()[1:]]
        poses = {row[0]: [float(x) for x in row[1:]] for row in rows if len(row) == 19}
        files = {p.stem: p.name for p in folder.iterdir() if p.suffix in (".jpg", ".png")}
        stamps = drawn([stamp for stamp in files if stamp in poses], FRAMES)
        if len(stamps) < FRAMES:
            log.warning("left out, fewer than %d frames with cameras: %s", FRAMES, folder)
            continue
        names = [files[stamp] for stamp in stamps]
        h, w = size_of(folder / names[0])
        found = []
        for stamp in stamps:
            fx, fy, cx, cy, _, _, *pose = poses[stamp]  # in widths and heights
            k = [[fx * w, 0, cx * w], [0, fy * h, cy * h], [0, 0, 1]]
            found.append((torch.tensor(pose).double().reshape(3, 4), torch.tensor(k), (h, w)))
        yield Trial("RealEstate10K", _scene(folder, names, _cameras(found)))


def dtu(root: Path, limit: int | None = None) -> Iterator[Trial]:
    """DTU: all 49 views of each of the 22 scans, a scan a group; points in millimetres.

    Rectified/scanN/rect_001_3_r5000.png, Calibration/cal18/pos_001.txt, Points/stl, ObsMask.
    """
    scans = [n for n in DTU_SCANS if (root / f"Rectified/scan{n}").is_dir()]
    _require(scans, root, "Rectified/scanN of the 22 scans")
    for scan in scans[:limit]:
        folder = root / f"Rectified/scan{scan}"
        views = range(1, DTU_VIEWS + 1)
        names = [f"rect_{view:03d}_{DTU_LIGHT}_r5000.png" for view in views]
        size = size_of(folder / names[0])
        maps = [np.loadtxt(root / f"Calibration/cal18/pos_{view:03d}.txt") for view in views]
        cameras = _cameras([(*_of_projection(projection), size) for projection in maps])
        yield Trial(f"scan{scan}", _scene(folder, names, cameras), DtuScan(root, scan))


def eth3d(root: Path, limit: int | None = None) -> Iterator[Trial]:
    """ETH3D's training scenes: ten frames of each, a scene a group; depth and points in metres.

    SCENE/dslr_calibration_undistorted, SCENE/images/dslr_images_undistorted; depth where
    SCENE/ground_truth_depth and SCENE/dslr_calibration_jpg are too.
    """
    found = sorted(p.parent for p in root.glob("*/dslr_calibration_undistorted"))
    _require(found, root, "SCENE/dslr_calibration_undistorted")
    for folder in found[:limit]:
        model = read(folder / "dslr_calibration_undistorted")
        frames = [model.names.index(name) for name in drawn(model.names, FRAMES)]
        names, lenses = [model.names[i] for i in frames], [model.lenses[i] for i in frames]
        originals, depths = _originals(folder, [Path(name).name for name in names])
        scene = _Eth3dScene(
            folder, _model(names, model.cameras[frames], lenses), depths, (None,) * len(names),
            originals=originals,
        )  # fmt: skip
        yield Trial(folder.name, scene, of_pixels)


# By the name on the command line.
DATA_SETS: dict[str, Callable[[Path, int | None], Iterator[Trial]]] = {
    "co3d": co3d,
    "re10k": real_estate,
    "dtu": dtu,
    "eth3d": eth3d,
}


def drawn(names: Sequence[str], count: int | None) -> list[str]:
    """`count` of the names, the same in every order of them and on every machine."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{SEED}/{name}".encode()).digest())[
        :count
    ]


@dataclass(frozen=True, eq=False)
class _Eth3dScene(PhotoScene):
    """Undistorted photos whose depth is known in pixels of the distorted ones.

    Both have one optical centre and axis, so a point has the same z in both.
    """

    originals: tuple[Lens | None, ...] = ()  # [S]

    def depth(
        self, frame: int, source_from_pixel: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        path, lens = self.depths[frame], self.originals[frame]
        if path is None or lens is None:
            return torch.zeros(size), torch.zeros(size, dtype=torch.bool)
        try:
            values = torch.from_numpy(np.fromfile(path, "<f4").reshape(lens.size))
        except ValueError as error:
            raise InputError(f"not float32 values of {lens.size}: {path}") from error
        xy1 = torch.nn.functional.pad(pixel_centers(size, source_from_pixel), (0, 1), value=1.0)
        rays = xy1 @ (self.model.cameras.intrinsics[frame].inverse() @ source_from_pixel).mT
        module = pycolmap()
        camera = module.Camera.create_from_model_name(
            1, lens.model, 1.0, lens.size[1], lens.size[0]
        )
        camera.params = list(lens.parameters)
        xy = torch.from_numpy(camera.img_from_cam(rays.reshape(-1, 3).numpy())).reshape(*size, 2)
        known = torch.where(values.isfinite(), values, 0)  # infinite where unknown
        depth = nearest(known, xy.nan_to_num(-1), torch.tensor(lens.size))
        return depth, depth > 0


def _originals(
    folder: Path, names: Sequence[str]
) -> tuple[tuple[Lens | None, ...], tuple[Path | None, ...]]:
    """The distorted cameras and the depth files of photos, by their names without folders."""
    if not (folder / "dslr_calibration_jpg/cameras.txt").is_file():
        log.warning("no depth, for lack of dslr_calibration_jpg: %s", folder)
        return (None,) * len(names), (None,) * len(names)
    model = read(folder / "dslr_calibration_jpg")
    lenses = {Path(n).name: lens for n, lens in zip(model.names, model.lenses, strict=True)}
    paths = [folder / "ground_truth_depth/dslr_images" / name for name in names]
    return tuple(map(lenses.get, names)), tuple(p if p.is_file() else None for p in paths)


def _of_pytorch3d(entry: dict[str, Any]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Extrinsics, intrinsics and size of a frame of CO3D.

    PyTorch3D: row vectors, x left, y up; its image plane runs from the centre, in halves of the
    shorter side ("ndc_isotropic", CO3Dv2) or of each side.
    """
    h, w = entry["image"]["size"]
    view = entry["viewpoint"]
    half = torch.tensor([w, h]).double() / 2
    unit = half.min() if view["intrinsics_format"] == "ndc_isotropic" else half
    flip = torch.tensor([-1.0, -1, 1]).double()
    rotation = flip[:, None] * torch.tensor(view["R"]).double().mT
    translation = flip * torch.tensor(view["T"]).double()
    intrinsics = torch.eye(3).double()
    intrinsics[[0, 1], [0, 1]] = torch.tensor(view["focal_length"]).double() * unit
    intrinsics[:2, 2] = half - torch.tensor(view["principal_point"]).double() * unit
    return torch.cat([rotation, translation[:, None]], -1), intrinsics, (h, w)


def _of_projection(projection: Any) -> tuple[Tensor, Tensor]:
    """Extrinsics [3, 4] and intrinsics [3, 3] of a map [3, 4] to pixels with whole centres."""
    k, rotation = rq(projection[:, :3])
    sign = np.sign(np.diag(k))
    k, rotation = k * sign, sign[:, None] * rotation  # focal lengths and scale are positive
    if np.linalg.det(rotation) < 0:  # P is known up to its sign
        rotation, projection = -rotation, -projection
    translation = np.linalg.solve(k, projection[:, 3])
    k = k / k[2, 2]
    k[0, 1], k[:2, 2] = 0, k[:2, 2] + 0.5
    pose = np.concatenate([rotation, translation[:, None]], 1)
    return torch.from_numpy(pose), torch.from_numpy(k)


def _sound(entries: Sequence[dict[str, Any]]) -> bool:
    """Whether a sequence of CO3D is long enough and no camera is broken."""
    far = (sum(entry["viewpoint"]["T"]) for entry in entries)
    return len(entries) >= CO3D_LEAST_FRAMES and all(
        math.isfinite(total) and total <= CO3D_FARTHEST for total in far
    )


def _cameras(found: Sequence[tuple[Tensor, Tensor, tuple[int, int]]]) -> Cameras:
    extrinsics, intrinsics, sizes = zip(*found, strict=True)
    stacked = torch.stack(extrinsics).double(), torch.stack(intrinsics).double()
    return Cameras(*stacked, torch.tensor(sizes))


def _model(names: Sequence[str], cameras: Cameras, lenses: Sequence[Lens]) -> Model:
    no_tracks = Tracks(
        torch.zeros(0, 3), torch.zeros(0).long(), torch.zeros(0).int(), torch.zeros(0, 2)
    )
    rgb = np.zeros((0, 3), np.uint8)
    return Model(tuple(names), cameras, tuple(range(len(names))), no_tracks, rgb, tuple(lenses))


def _scene(folder: Path, names: Sequence[str], cameras: Cameras) -> PhotoScene:
    """Photos in `folder` with cameras and without depth."""
    k = cameras.intrinsics
    parameters = torch.stack([k[:, 0, 0], k[:, 1, 1], k[:, 0, 2], k[:, 1, 2]], -1).tolist()
    lenses = [
        Lens("PINHOLE", (h, w), tuple(values))
        for (h, w), values in zip(cameras.image_size.tolist(), parameters, strict=True)
    ]
    none = (None,) * len(names)
    return PhotoScene(folder, _model(names, cameras, lenses), none, none, photos=".")


def _jgz(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found: list[dict[str, Any]] = json.load(file)
            return found
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"no annotations of CO3D can be read: {path} ({error})") from error


def _require(found: object, root: Path, layout: str) -> None:
    if not found:
        raise InputError(f"nothing of this data set in: {root}", f"expected {layout}")
