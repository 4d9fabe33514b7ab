"""scene.glb: points and cameras for viewers of glTF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vggt_cli.errors import OutputError
from vggt_cli.formats.colmap import Array, Model
from vggt_cli.geometry import invert
from vggt_cli.scene import Cameras, Scene

POINTS = 1_000_000  # at most, of 16 bytes each; of more, that many at random
FRUSTUM = 0.05  # depth of the drawn cameras, of the radius within which most points lie
EDGES = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1)]  # 0: the optical centre


def write(scene: Scene, model: Model, folder: Path) -> None:
    """scene.glb in `folder`: the densest cloud, and a frustum for each camera, by its file's name.

    glTF's axes are x right, y up, z back: the first camera looks along -z. Its vertex colours are
    linear, so those of the photos are converted. Raises OutputError for a scene without points.
    Source: glTF 2.0, sections 3.4 and 3.7.2.1.
    """
    import trimesh as module

    trimesh: Any = module  # half of it has types
    xyz, rgb = (
        (scene.tracks.xyz, scene.rgb) if scene.dense is None else (scene.dense.xyz, scene.dense.rgb)
    )
    finite = xyz.isfinite().all(-1)
    xyz, rgb = xyz[finite], rgb[finite]
    if not len(xyz):
        raise OutputError("no points in this scene")
    center = xyz.median(0).values
    radius = float(np.quantile((xyz - center).norm(dim=-1).numpy(), 0.9))
    if len(xyz) > POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(len(xyz), POINTS, replace=False))
        xyz, rgb = xyz[chosen], rgb[chosen]
    whole = trimesh.Scene()
    cloud = trimesh.PointCloud(_axes(xyz), linear(rgb.numpy()))
    whole.add_geometry(cloud, node_name="points", geom_name="points")
    for name, corners in zip(model.names, frusta(model.cameras, FRUSTUM * radius), strict=True):
        frustum = trimesh.load_path(_axes(corners)[np.array(EDGES)])
        whole.add_geometry(frustum, node_name=name, geom_name=name)
    (folder / "scene.glb").write_bytes(whole.export(file_type="glb"))


def frusta(cameras: Cameras, depth: float) -> Tensor:
    """[S, 5, 3]: the optical centre, and the image's corners at `depth`, clockwise from the top
    left one; in the world."""
    h, w = cameras.image_size.double().unbind(-1)
    zero, one = torch.zeros_like(w), torch.ones_like(w)
    corners = [(zero, zero), (w, zero), (w, h), (zero, h)]
    pixels = torch.stack([torch.stack([*xy, one], -1) for xy in corners], 1)  # [S, 4, 3]
    rays = pixels @ torch.linalg.inv(cameras.intrinsics.double()).mT * depth
    world = invert(cameras.extrinsics.double())
    moved = rays @ world[:, :, :3].mT + world[:, None, :, 3]
    return torch.cat([world[:, None, :, 3], moved], 1)


def linear(rgb: Array) -> Array:
    """uint8 linear light of uint8 sRGB; the darkest shades become one. Source: IEC 61966-2-1."""
    value = rgb / 255
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.asarray(np.round(light * 255).astype(np.uint8))


def _axes(xyz: Tensor) -> Array:
    """From OpenCV's axes (y down, z forward) to glTF's."""
    return (xyz.double() * torch.tensor([1.0, -1.0, -1.0])).numpy()
