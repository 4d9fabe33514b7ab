"""Depth as its readers want it: COLMAP's dense stereo, 3DGS and nerfstudio.

    colmap_dense/           a dense workspace: images/, sparse/, stereo/
    inverse_depths/, sparse/0/depth_params.json
    depths/

All maps have the size of depth/NAME.npy, which is what the network knew: the readers scale them.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.device import one_thread_each
from vggt_cli.errors import OutputError
from vggt_cli.formats import colmap
from vggt_cli.formats.colmap import Array, Model
from vggt_cli.formats.copies import clone
from vggt_cli.formats.images import frame_of
from vggt_cli.geometry import surface_normals, unproject
from vggt_cli.scene import Scene

log = logging.getLogger(__name__)

UNSURE = 20.0  # percent, of scenes that do not say what --confidence made them
AT_ONCE = 16  # frames that are held for threads
STEPS = 65536  # what 3DGS divides the pixels of inverse depth by
COMPRESSION = 3  # of PNGs, of 9: 2 to 4 times as fast as Pillow's 6, files up to 4 % larger
MILLIMETRES = 1000.0  # in a scene unit, to nerfstudio


@dataclass(frozen=True, eq=False)
class View:
    """One frame without its padding."""

    stem: str  # of the file in images/
    depth: Tensor  # [h, w] float32 z-depth, scene units; 0: unknown
    sure: Tensor  # [h, w] bool: among the pixels that became points
    intrinsics: Tensor  # [3, 3] in the map's pixels, centres at +0.5
    extrinsics: Tensor  # [3, 4]
    pixels: Tensor  # [3, h, w] sRGB in [0, 1]


def views(scene: Scene, model: Model) -> Iterator[View]:
    """The frames with what is known of their depth, one at a time.

    Unknown is what is transparent or no depth. Sure is all of it but the least sure percent that
    made the scene (--confidence). Raises OutputError for a scene without depth.
    """
    if scene.dense is None:
        raise OutputError("no depth in this scene", hint="make it with vggt reconstruct")
    prediction, images = scene.prediction, scene.images
    known = images.valid & prediction.depth.isfinite() & (prediction.depth > 0)
    unsure = float(scene.made_by.options.get("confidence", UNSURE))
    of_known = prediction.confidence[known]
    rank = min(int(len(of_known) * unsure / 100), len(of_known) - 1)
    least = of_known.kthvalue(rank + 1).values if len(of_known) else torch.inf
    for i, name in enumerate(model.names):
        rows, columns = frame_of(images, i)
        there = known[i, rows, columns]
        intrinsics = prediction.cameras.intrinsics[i].clone()
        intrinsics[:2, 2] -= torch.tensor([columns.start, rows.start]).to(intrinsics)
        yield View(
            Path(name).stem,
            prediction.depth[i, rows, columns].float().where(there, 0.0),
            there & (prediction.confidence[i, rows, columns] >= least),
            intrinsics,
            prediction.cameras.extrinsics[i],
            images.pixels[i, :, rows, columns],
        )


def normals(view: View) -> Tensor:
    """[h, w, 3] unit normals in the camera's axes, towards it; the ray back where there is none."""
    points = unproject(view.depth, view.intrinsics, torch.eye(3, 4))
    found = surface_normals(points, torch.zeros(3))
    back = -unproject(torch.ones_like(view.depth), view.intrinsics, torch.eye(3, 4))
    return torch.where(view.depth[..., None] > 0, found, F.normalize(back, dim=-1))


def write(scene: Scene, model: Model, folder: Path) -> None:
    """All that this module's head lists, in `folder`. Raises OutputError without any depth."""
    nearest = _nearest(scene, model)
    stereo = folder / "colmap_dense" / "stereo"
    places = [stereo / "depth_maps", stereo / "normal_maps"]
    for place in (*places, folder / "inverse_depths", folder / "depths"):
        place.mkdir(parents=True)

    def write_one(view: View, name: str) -> int:  # how many pixels are too far for depths/
        depth = view.depth.where(view.sure, 0.0)
        _write_map(depth[None], stereo / "depth_maps" / f"{name}.geometric.bin")
        facing = normals(view).permute(2, 0, 1)
        _write_map(facing, stereo / "normal_maps" / f"{name}.geometric.bin")
        inverse = torch.where(view.depth > 0, 1 / view.depth, 0.0) / nearest * STEPS
        _write_png(inverse.clamp(max=STEPS - 1), folder / "inverse_depths" / f"{view.stem}.png")
        unit = depth * MILLIMETRES
        beyond = unit.round() >= STEPS
        _write_png(unit.masked_fill(beyond, 0), folder / "depths" / f"{view.stem}.png")
        return int(beyond.sum())

    far, named = 0, zip(views(scene, model), model.names, strict=True)
    with one_thread_each() as pool:
        while some := list(itertools.islice(named, AT_ONCE)):
            far += sum(pool.map(write_one, *zip(*some, strict=True)))
    if far:
        log.warning("depths/: %d pixels farther than 65.535 units count as unknown", far)
    parameters = {Path(name).stem: {"scale": nearest, "offset": 0.0} for name in model.names}
    (folder / "sparse" / "0").mkdir(parents=True, exist_ok=True)
    text = json.dumps(parameters, indent=1) + "\n"
    (folder / "sparse" / "0" / "depth_params.json").write_text(text, encoding="utf-8")
    _write_workspace(scene, model, folder)


def _nearest(scene: Scene, model: Model) -> float:
    """The largest inverse depth of a sure pixel. Raises OutputError where there is none."""
    sure = (view.depth[view.sure] for view in views(scene, model))
    found = [float((1 / depth).max()) for depth in sure if len(depth)]
    if not found:
        raise OutputError("no pixel of this scene has a depth")
    return max(found)


def _write_workspace(scene: Scene, model: Model, folder: Path) -> None:
    """The rest of colmap_dense/, as COLMAP's image_undistorter lays it out."""
    there = folder / "colmap_dense"
    (there / "images").mkdir()
    for photo, name in zip(scene.photos, model.names, strict=True):
        ours = folder / "images" / name  # of a scene that is being written; else the photo is it
        clone(ours if ours.is_file() else photo.path, there / "images" / name)
    colmap.write(model, there / "sparse")
    lines = [f"{name}\n__auto__, 20\n" for name in model.names]
    (there / "stereo" / "patch-match.cfg").write_text("".join(lines), encoding="utf-8")
    lines = [f"{name}\n" for name in model.names]
    (there / "stereo" / "fusion.cfg").write_text("".join(lines), encoding="utf-8")


def _write_map(channels: Tensor, path: Path) -> None:
    """COLMAP's map of [C, h, w] floats: width&height&channels& and the values, row by row."""
    C, h, w = channels.shape
    values: Array = channels.numpy().astype("<f4")
    path.write_bytes(f"{w}&{h}&{C}&".encode("ascii") + values.tobytes())


def _write_png(values: Tensor, path: Path) -> None:
    """[h, w] as 16-bit gray."""
    pixels = Image.fromarray(values.round().numpy().astype(np.uint16))
    pixels.save(path, compress_level=COMPRESSION)
