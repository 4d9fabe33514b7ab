"""Points in files: PLY, ours and other people's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.scene import PointCloud

VERTEX = np.dtype(
    [("xyz", "<f4", 3), ("normals", "<f4", 3), ("rgb", "u1", 3), ("confidence", "<f4")]
)
BEGINNING = """ply
format binary_little_endian 1.0
comment OpenCV axes of the first camera: x right, y down, z forward
element vertex {}
property float x
property float y
property float z
property float nx
property float ny
property float nz
property uchar red
property uchar green
property uchar blue
"""
HEADER = f"{BEGINNING}property float confidence\nend_header\n"


def write_cloud(cloud: PointCloud, path: Path) -> None:
    """Binary little-endian: x y z nx ny nz float32, red green blue uint8, confidence float32."""
    vertices = np.empty(len(cloud), VERTEX)
    for name in VERTEX.names or ():
        vertices[name] = getattr(cloud, name).numpy()
    path.write_bytes(HEADER.format(len(vertices)).encode("ascii") + vertices.tobytes())


def read_cloud(path: Path) -> PointCloud:
    """What `write_cloud` wrote. Raises InputError for any other file."""
    try:
        header, _, content = path.read_bytes().partition(b"end_header\n")
    except OSError as error:
        raise InputError(f"cannot be read: {path} ({error.strerror})") from error
    count, left = divmod(len(content), VERTEX.itemsize)
    if left or header + b"end_header\n" != HEADER.format(count).encode("ascii"):
        raise InputError(f"not a cloud that this tool wrote, or cut short: {path}")
    vertices = np.frombuffer(content, VERTEX)
    xyz, normals, rgb, confidence = (
        torch.from_numpy(vertices[name].copy()) for name in VERTEX.names or ()
    )
    return PointCloud(xyz, normals, rgb, confidence)


def read_ply(path: Path) -> Tensor:
    """The vertices [N, 3] float64 of a PLY file, binary or ASCII.

    Raises InputError if there is no such file, or it is no PLY or holds no vertices.
    """
    import trimesh

    try:
        loaded: Any = trimesh.load(path, process=False)
        vertices = np.asarray(loaded.vertices, np.float64)
    except (OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"no points can be read: {path} ({error})") from error
    if not len(vertices):
        raise InputError(f"a PLY file without points: {path}")
    return torch.from_numpy(vertices)
