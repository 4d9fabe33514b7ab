"""mesh.ply: the surface that the depth maps agree on, by open3d's TSDF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from vggt_cli.errors import OutputError
from vggt_cli.formats.colmap import Array, Model
from vggt_cli.formats.depth_maps import View, normals, views
from vggt_cli.formats.points import BEGINNING
from vggt_cli.geometry import unproject
from vggt_cli.scene import Scene

VOXEL = 1.5  # edge of a voxel, of the median size of a pixel at its point
TRUNCATION = 4.0  # voxels before and behind a surface that one depth map speaks of
BLOCK = 8  # voxels along a block's edge
BLOCKS = 30_000  # that surfaces pass through, at most: about three times as many take 2 GB
GRAZING = 0.15  # cosine between ray and normal below which a pixel lies between two surfaces
FAR = 1e9  # open3d leaves out what is beyond
HEADER = f"""{BEGINNING}element face {{}}
property list uchar int vertex_indices
end_header
"""
VERTEX = np.dtype([("xyz", "<f4", 3), ("normals", "<f4", 3), ("rgb", "u1", 3)])
FACE = np.dtype([("count", "u1"), ("corners", "<i4", 3)])


def open3d() -> ModuleType:
    """The open3d module. Raises OutputError, with what to install, where it cannot be loaded."""
    try:
        import open3d as module
    except (ImportError, OSError) as error:
        hint = (
            "pip install open3d; on a bare Debian also apt-get install libegl1 libgl1 libusb-1.0-0"
        )
        raise OutputError(f"a mesh needs open3d: {error}", hint) from error
    return module


def write(scene: Scene, model: Model, folder: Path) -> None:
    """mesh.ply in `folder`: triangles with normals and colours of the vertices, in the world.

    Raises OutputError without open3d, without depth, or where no surface comes of it.
    Source: Curless and Levoy 1996; open3d's VoxelBlockGrid (its older class gives no triangles).
    """
    module = open3d()
    seen = [_without_edges(view) for view in views(scene, model)]
    grid = _integrated(module, seen, voxel_size(seen))
    found = grid.extract_triangle_mesh(0.0)  # what one depth map is sure of is a surface
    faces = found.triangle.indices.numpy() if "indices" in found.triangle else np.empty((0, 3))
    if not len(faces):
        raise OutputError("no surface in this scene: its depth maps do not agree")
    vertices = np.empty(len(found.vertex.positions), VERTEX)
    vertices["xyz"] = found.vertex.positions.numpy()
    vertices["normals"] = found.vertex.normals.numpy()
    vertices["rgb"] = np.round(found.vertex.colors.numpy().clip(0, 1) * 255)
    _write_ply(vertices, faces, folder / "mesh.ply")


def _without_edges(view: View) -> tuple[View, Array]:
    """The view, and its depth map [h, w]: 0 where unsure, or where the surface is seen edge-on."""
    back = -unproject(torch.ones_like(view.depth), view.intrinsics, torch.eye(3, 4))
    cosine = (normals(view) * back).sum(-1) / back.norm(dim=-1)
    return view, view.depth.where(view.sure & (cosine > GRAZING), 0.0).numpy()


def voxel_size(seen: Sequence[tuple[View, Array]]) -> float:
    """Edge of a voxel in scene units: as fine as the pixels, and as memory allows."""
    depths = [torch.from_numpy(depth) for _, depth in seen]
    footprints = [
        depth[depth > 0] / view.intrinsics[0, 0]
        for (view, _), depth in zip(seen, depths, strict=True)
    ]
    every = torch.cat(footprints)
    if not len(every):
        raise OutputError("no pixel of this scene has a depth")
    voxel = VOXEL * float(every.median())
    while _blocks(seen, voxel) > BLOCKS:
        voxel *= 1.3
    return voxel


def _blocks(seen: Sequence[tuple[View, Array]], voxel: float) -> int:
    """How many blocks the surfaces pass through."""
    found = []
    for view, depth in seen:
        values = torch.from_numpy(depth)
        points = unproject(values, view.intrinsics, view.extrinsics)[values > 0]
        found.append((points / (BLOCK * voxel)).floor().unique(dim=0))
    return len(torch.cat(found).unique(dim=0))


def _integrated(module: ModuleType, seen: Sequence[tuple[View, Array]], voxel: float) -> Any:
    """The grid of all depth maps. open3d cuts pixels off to whole numbers: centres are at +0.5."""
    core, geometry = module.core, module.t.geometry
    kinds, channels = (core.float32,) * 3, ((1), (1), (3))
    names = ("tsdf", "weight", "color")
    grid = geometry.VoxelBlockGrid(names, kinds, channels, voxel, BLOCK, 3 * BLOCKS)
    for view, depth in seen:
        image = geometry.Image(core.Tensor(np.ascontiguousarray(depth[..., None])))
        pixels = np.ascontiguousarray(view.pixels.permute(1, 2, 0).numpy())
        intrinsics = core.Tensor(view.intrinsics.double().numpy())
        extrinsics = np.eye(4)
        extrinsics[:3] = view.extrinsics.double().numpy()
        camera = (intrinsics, core.Tensor(extrinsics), 1.0, FAR, TRUNCATION)
        blocks = grid.compute_unique_block_coordinates(image, *camera)
        grid.integrate(blocks, image, geometry.Image(core.Tensor(pixels)), *camera)
    return grid


def _write_ply(vertices: Array, corners: Array, path: Path) -> None:
    faces = np.empty(len(corners), FACE)
    faces["count"], faces["corners"] = 3, corners
    header = HEADER.format(len(vertices), len(faces)).encode("ascii")
    path.write_bytes(header + vertices.tobytes() + faces.tobytes())
