"""transforms.json: cameras as nerfstudio's default dataparser reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vggt_cli.formats.colmap import Model
from vggt_cli.geometry import invert
from vggt_cli.scene import Scene

OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))  # y up, z back
SAME_WORLD = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]


def write(scene: Scene, model: Model, folder: Path) -> None:
    """transforms.json in `folder`, with depth maps where depths/ is there already, and masks."""
    depths = (folder / "depths").is_dir()
    masks = any(photo.mask or photo.transparent for photo in scene.photos)
    found = content(model, scene.dense is not None, depths, masks)
    text = json.dumps(found, indent=1) + "\n"
    (folder / "transforms.json").write_text(text, encoding="utf-8")


def content(model: Model, cloud: bool, depths: bool, masks: bool = False) -> dict[str, Any]:
    """What transforms.json says: camera-to-world with OpenGL axes, pixels of the files.

    The world is that of the COLMAP model and of points.ply: the parser applies
    `applied_transform`, here the identity, to points alone. One lens stands at the top, several
    in their frames. cloud, depths, masks: whether points.ply, depths/ and masks/ are there.
    Source: nerfstudio's data conventions; data/dataparsers/nerfstudio_dataparser.py.
    """
    bottom = torch.tensor([[0.0, 0, 0, 1]], dtype=torch.float64)
    lenses = [_lens(model, i) for i in range(len(model.names))]
    shared = len(set(model.camera_of_image)) == 1
    frames = []
    for i, name in enumerate(model.names):
        world_from_camera = torch.cat([invert(model.cameras.extrinsics[i].double()), bottom])
        frame: dict[str, Any] = {"file_path": f"images/{name}"}
        if depths:
            frame["depth_file_path"] = f"depths/{Path(name).stem}.png"
        if masks:
            frame["mask_path"] = f"masks/{Path(name).stem}.png"
        frame |= {} if shared else lenses[i]
        frames.append(frame | {"transform_matrix": (world_from_camera @ OPENGL).tolist()})
    return {
        "camera_model": "OPENCV",
        **(lenses[0] if shared else {}),
        **({"ply_file_path": "points.ply"} if cloud else {}),
        "applied_transform": SAME_WORLD,
        "frames": frames,
    }


def _lens(model: Model, image: int) -> dict[str, float | int]:
    k = model.cameras.intrinsics[image].double()
    h, w = model.cameras.image_size[image].tolist()
    focal = {"fl_x": float(k[0, 0]), "fl_y": float(k[1, 1])}
    return focal | {"cx": float(k[0, 2]), "cy": float(k[1, 2]), "w": w, "h": h}
