"""Rendered scenes with exact depth, cameras and visibility.

Rays are intersected with the shapes of a random place whose surfaces carry textures, looked up at
the level of detail of a pixel, so that a place looks alike from near and far. Plain torch: the same
seed gives the same scene on every run, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cli.geometry import pixel_centers, project
from vggt_cli.learning.paths import Path, cameras, rays
from vggt_cli.learning.photographs import photographed
from vggt_cli.learning.places import world
from vggt_cli.learning.rays import FAR, Hit, cast, nearest, unit
from vggt_cli.learning.textures import TEXELS, look_up
from vggt_cli.learning.world import World
from vggt_cli.scene import Cameras

__all__ = [
    "Path",
    "Sample",
    "World",
    "cameras",
    "photographed",
    "render",
    "sample",
    "visible",
    "world",
]

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Sample:
    """S frames with their truth."""

    pixels: Tensor  # [S, 3, H, W] float32 sRGB in [0, 1]
    cameras: Cameras
    depth: Tensor  # [S, H, W] z-depth; 1 where not valid
    valid: Tensor  # [S, H, W] bool, False in the sky


def sample(seed: int, path: Path, device: torch.device = CPU) -> Sample:
    """A random world seen along a random path; the same for the same seed, on any `device`."""
    random = torch.Generator().manual_seed(seed)
    made = world(random)
    seen = cameras(random, made, path)
    k, extrinsics = seen.intrinsics.to(device), seen.extrinsics.to(device)
    return render(made.to(device), Cameras(extrinsics, k, seen.image_size))


def render(world: World, cameras: Cameras) -> Sample:
    """What cameras of one image size see in the world, without noise."""
    size = int(cameras.image_size[0, 0]), int(cameras.image_size[0, 1])
    xy = pixel_centers(size, cameras.intrinsics).flatten(0, 1)  # [H W, 2]
    origin, direction = rays(cameras, xy)  # [3, S H W]
    hit = cast(world, origin, direction, _outlines(world, cameras, size))
    color = _color(world, hit, origin, direction, cameras.intrinsics[0, 0, 0])
    pixels = color.unflatten(1, (-1, *size)).transpose(0, 1).contiguous()
    depth = hit.distance.unflatten(0, (-1, *size))
    valid = depth < FAR
    return Sample(pixels, cameras, torch.where(valid, depth, 1.0), valid)


def _outlines(world: World, cameras: Cameras, size: tuple[int, int]) -> Tensor:
    """[P, S H W] bool: pixels of the rectangle that a shape's corners lie in."""
    H, W = size
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).to(world.half)  # [8, 3]
    corners = world.center[:, None] + (signs * world.half[:, None]) @ world.axes  # [P, 8, 3]
    at, depth = project(corners[None], cameras.intrinsics, cameras.extrinsics)
    low, high = at.amin(2), at.amax(2)  # [S, P, 2]
    # A shape that is half behind the camera may be anywhere, one that is all behind nowhere.
    behind = depth < 0.05
    low = low.where(~behind.any(-1)[..., None], -1e6)
    high = high.where(~behind.any(-1)[..., None], 1e6).where(~behind.all(-1)[..., None], -1e6)
    x, y = (torch.arange(n).to(at) + 0.5 for n in (W, H))
    columns = (x >= low[..., :1]) & (x <= high[..., :1])  # [S, P, W]
    rows = (y >= low[..., 1:]) & (y <= high[..., 1:])
    both: Tensor = (rows[..., None] & columns[:, :, None]).transpose(0, 1).flatten(1)
    return both


def _color(world: World, hit: Hit, origin: Tensor, direction: Tensor, focal: Tensor) -> Tensor:
    """[3, S H W] sRGB: texture at the pixel's level of detail under one light and the sky."""
    view = unit(direction)
    point = origin + hit.distance * direction
    along, across, *offset = (x.index_select(0, hit.surface) for x in world.mapping.unbind(-1))
    u = along * hit.place[0] - across * hit.place[1] + offset[0]
    v = across * hit.place[0] + along * hit.place[1] + offset[1]
    slant = (hit.normal * view).sum(0).abs().clamp(min=0.2)
    scale = torch.hypot(along, across)  # textures a metre
    texels = hit.distance / focal * scale * TEXELS / slant
    texture = world.texture.index_select(0, hit.surface)
    channels = look_up(texture, torch.stack([u, v]), texels)
    palette = world.palette.permute(1, 2, 0).flatten(0, 1).index_select(1, hit.surface)
    surface = (palette.unflatten(0, (3, 3)) * channels[:, None]).sum(0)
    to_light = unit(world.light[:, None] - point)
    lit = (hit.normal * to_light).sum(0).clamp(min=0)
    shade = world.ambient + (1 - world.ambient) * lit
    color: Tensor = surface * shade
    if not world.roofless:
        return color
    horizon, zenith = world.sky[..., None]
    sky = horizon + view[1].neg().clamp(0, 1) * (zenith - horizon)
    return torch.where(hit.distance >= FAR, sky, color)


def visible(world: World, points: Tensor, cameras: Cameras, tolerance: float = 0.01) -> Tensor:
    """[S, N] bool: which points [N, 3] on or near surfaces each camera's ray reaches unhindered.

    tolerance: of the distance, by which a surface may lie before the point. Frustum not tested.
    """
    seen = []
    for center in cameras.centers:
        direction = points.T - center[:, None]
        origin = center[:, None].expand_as(direction)
        seen.append(nearest(world, origin, direction)[0] > 1 - tolerance)
    return torch.stack(seen)
