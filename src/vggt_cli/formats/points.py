"""Points from other people's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vggt_cli.errors import InputError


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
