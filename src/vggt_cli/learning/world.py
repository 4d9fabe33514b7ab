"""What a rendered scene consists of: shapes in a room or on open ground.

World axes are those of OpenCV: x right, y down, z forward; the unit is about a metre.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOX, BALL, CYLINDER, TORUS = range(4)


class Shapes(NamedTuple):
    """P shapes, each in axes of its own."""

    kind: Tensor  # [P] int64: BOX, BALL, CYLINDER and TORUS about the second axis
    center: Tensor  # [P, 3]
    half: Tensor  # [P, 3] half extents along the axes; a torus is 2 half[1] thick
    axes: Tensor  # [P, 3, 3] rows are the axes in the world


@dataclass(frozen=True, eq=False)
class World:
    """Shapes in a room or on open ground, with what covers them and where to look from.

    Surfaces are the P shapes and then the six sides of the room.
    """

    room: Tensor  # [3] half extents around the origin; a camera is always inside
    roofless: bool  # open ground: walls and ceiling are sky
    hills: Tensor  # [K, 4] waves of the ground: height, wave vector (x, z), phase; K = 0: flat
    kind: Tensor  # the fields of Shapes
    center: Tensor
    half: Tensor
    axes: Tensor
    texture: Tensor  # [P + 6] int64
    palette: Tensor  # [P + 6, 3, 3] sRGB of each channel of the texture
    mapping: Tensor  # [P + 6, 4] textures a metre along and across, offset of both
    light: Tensor  # [3] position of the lamp or the sun
    ambient: Tensor  # [] share of light that comes from everywhere
    sky: Tensor  # [2, 3] sRGB at the horizon and overhead
    stage: Tensor  # [3] what is worth looking at
    reach: Tensor  # [2] from and to which distance
    rise: Tensor  # [2] from and to which elevation above it, radians

    def to(self, device: torch.device) -> World:
        """The same world on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if k != "roofless"}
        return replace(self, **moved)

    def ground(self, x: Tensor, z: Tensor) -> Tensor:
        """y of the ground at x, z [N]."""
        height, kx, kz, phase = self.hills.T[..., None]  # [K, 1] each
        rise: Tensor = (height * torch.sin(kx * x + kz * z + phase)).sum(0)
        return self.room[1] - rise

    def slope(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """How steeply the ground rises along x and z, at x, z [N]."""
        height, kx, kz, phase = self.hills.T[..., None]
        wave = height * torch.cos(kx * x + kz * z + phase)
        return (kx * wave).sum(0), (kz * wave).sum(0)

    def clearance(self, point: Tensor) -> Tensor:
        """[N] no more than the distance of points [N, 3] to any surface; negative inside of one."""
        away = torch.einsum("pij,npj->npi", self.axes, point[:, None] - self.center)
        beyond = away.abs() - self.half  # [N, P, 3]
        shapes = beyond.clamp(min=0).norm(dim=-1) + beyond.amax(-1).clamp(max=0)
        # A slope of s brings the ground nearer than it is straight below.
        steep = (1 + (self.hills[:, 0] * self.hills[:, 1:3].norm(dim=-1)).sum() ** 2).sqrt()
        ground = (self.ground(point[:, 0], point[:, 2]) - point[:, 1]) / steep
        inside = (self.room - point.abs())[:, [0, 2] if self.roofless else [0, 1, 2]]
        return torch.cat([shapes, ground[:, None], inside], -1).amin(-1)


def upright(turn: Tensor) -> Tensor:
    """Axes [P, 3, 3] turned about the vertical by [P] radians."""
    cos, sin, none = turn.cos(), turn.sin(), torch.zeros_like(turn)
    rows = [cos, none, -sin, none, none + 1, none, sin, none, cos]
    return torch.stack(rows, -1).view(-1, 3, 3)


def tilted(tilt: Tensor) -> Tensor:
    """Axes [P, 3, 3] turned about the first by [P] radians."""
    cos, sin, none = tilt.cos(), tilt.sin(), torch.zeros_like(tilt)
    rows = [none + 1, none, none, none, cos, sin, none, -sin, cos]
    return torch.stack(rows, -1).view(-1, 3, 3)
