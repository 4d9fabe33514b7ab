"""Rendered scenes with exact depth, cameras and visibility: rooms and open ground with objects.

Rays are intersected with every shape at once; surfaces carry procedural textures that are looked
up at the level of detail of a pixel, so that a place looks alike from near and far. World axes are
those of OpenCV: x right, y down, z forward; the unit is about a metre. Plain torch: the same seed
gives the same scene on every run, on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from vggt_cli.geometry import pixel_centers
from vggt_cli.scene import Cameras

CPU = torch.device("cpu")
FAR = 1e4  # no surface
TEXTURES, LEVELS, TEXELS = 10, 6, 128
NEAREST = 0.25  # metres between a camera and any surface


@dataclass(frozen=True, eq=False)
class World:
    """P shapes inside a room: boxes, balls and upright cylinders, each with a texture."""

    room: Tensor  # [3] half extents around the origin; a camera is always inside
    roofless: bool  # open ground: walls and ceiling are sky
    kind: Tensor  # [P] int64: 0 box, 1 ball, 2 cylinder
    center: Tensor  # [P, 3]
    half: Tensor  # [P, 3] half extents; ball: radius, cylinder: radius, half height, radius
    turn: Tensor  # [P] radians about the vertical axis
    texture: Tensor  # [P + 6] int64, the last six are of the room's sides
    volume: Tensor  # [1, 3, TEXTURES * LEVELS, TEXELS, TEXELS] textures, each finest level first
    texels: Tensor  # [P + 6] texels a metre
    light: Tensor  # [3] unit direction towards the light

    def to(self, device: torch.device) -> World:
        """The same world on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if k != "roofless"}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Sample:
    """S frames with their truth."""

    pixels: Tensor  # [S, 3, H, W] float32 sRGB in [0, 1]
    cameras: Cameras
    depth: Tensor  # [S, H, W] z-depth; 1 where not valid
    valid: Tensor  # [S, H, W] bool, False in the sky


class Hit(NamedTuple):
    """Where rays meet the world."""

    distance: Tensor  # [...] in lengths of the ray's direction; FAR if nowhere
    shape: Tensor  # [...] int64 index of shape; P + side for the room
    normal: Tensor  # [..., 3] towards the ray's origin
    place: Tensor  # [..., 2] metres on the surface


def uniform(random: Generator, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform values in [low, high)."""
    return low + (high - low) * torch.rand(*size, generator=random)


def world(random: Generator, shapes: int = 9) -> World:
    """A random room or, one time in three, open ground."""
    roofless = bool(uniform(random, 1) < 1 / 3)
    room = torch.cat(
        [
            uniform(random, 1, low=2.2, high=4.5),
            uniform(random, 1, low=1.3, high=2.0),
            uniform(random, 1, low=2.2, high=4.5),
        ]
    )
    spread = room * torch.tensor([0.75, 1.0, 0.75])
    half = uniform(random, shapes, 3, low=0.12, high=0.55)
    kind = torch.randint(0, 3, (shapes,), generator=random)
    half = torch.where((kind == 1)[:, None], half[:, :1], half)
    half[:, 2] = torch.where(kind == 2, half[:, 0], half[:, 2])
    center = (2 * uniform(random, shapes, 3) - 1) * spread
    stands = uniform(random, shapes) < 0.7
    center[:, 1] = torch.where(stands, room[1] - half[:, 1], center[:, 1] * 0.6)
    if roofless:
        room = torch.tensor([40.0, float(room[1]), 40.0])
    return World(
        room,
        roofless,
        kind,
        center,
        half,
        uniform(random, shapes, high=math.pi),
        torch.randint(0, TEXTURES, (shapes + 6,), generator=random),
        textures(random),
        torch.cat([uniform(random, shapes, low=60, high=140), uniform(random, 6, low=25, high=60)]),
        F.normalize(torch.randn(3, generator=random) + torch.tensor([0.0, -2.0, 0.0]), dim=0),
    )


def textures(random: Generator) -> Tensor:
    """[1, 3, TEXTURES * LEVELS, TEXELS, TEXELS]: noise of several octaves, tiles and stripes."""
    octaves = torch.zeros(TEXTURES, 2, TEXELS, TEXELS)
    for cells in (4, 8, 16, 32, 64, 128):
        grid = torch.randn(TEXTURES, 2, cells, cells, generator=random)
        rough = uniform(random, TEXTURES, 2, 1, 1) * cells**-0.25
        octaves += rough * F.interpolate(grid, TEXELS, mode="bicubic", align_corners=False)
    sharp = uniform(random, TEXTURES, 2, 1, 1, low=1, high=8)
    mix = torch.sigmoid(octaves * sharp)  # [TEXTURES, 2, TEXELS, TEXELS]
    palette = uniform(random, TEXTURES, 3, 1, 1, 1) * 0.7 + 0.3 * uniform(
        random, TEXTURES, 3, 3, 1, 1
    )
    base = palette[:, 0] + (palette[:, 1] - palette[:, 0]) * mix[:, :1]
    base = base + (palette[:, 2] - base) * (mix[:, 1:] > 0.6).float()
    step = torch.randint(8, 33, (TEXTURES, 2), generator=random)
    rows, columns = torch.arange(TEXELS)[:, None], torch.arange(TEXELS)
    tiles = (rows // step[:, :1, None] + columns // step[:, 1:, None]) % 2
    tiled = (uniform(random, TEXTURES, 1, 1) < 0.5) * 0.5 * tiles
    finest = (base * (1 - tiled[:, None])).clamp(0, 1)
    levels = [finest]
    for level in range(1, LEVELS):
        small = F.avg_pool2d(finest, 2**level)
        levels.append(F.interpolate(small, TEXELS, mode="bilinear", align_corners=False))
    return torch.stack(levels, 1).flatten(0, 1).transpose(0, 1)[None].contiguous()


def cast(world: World, origin: Tensor, direction: Tensor) -> Hit:
    """The first surface that rays from `origin` [..., 3] along `direction` [..., 3] meet."""
    candidates = _shape_distances(world, origin, direction)  # [..., P]
    inverse = 1 / torch.where(direction.abs() < 1e-9, torch.full_like(direction, 1e-9), direction)
    to_sides = (torch.where(inverse > 0, world.room, -world.room) - origin) * inverse
    wall, axis = to_sides.min(-1)
    nearest, shape = torch.cat([candidates, wall[..., None]], -1).min(-1)
    P = len(world.kind)
    at_room = shape == P
    along = direction.gather(-1, axis[..., None])[..., 0]
    side = axis * 2 + (along > 0)
    place_in_world = origin + nearest[..., None] * direction
    normal = -F.one_hot(axis, 3).to(direction) * along.sign()[..., None]
    on_shape = _on_shape(world, shape.clamp(max=P - 1), place_in_world)
    normal = torch.where(at_room[..., None], normal, on_shape[0])
    place = torch.where(at_room[..., None], _other_two(place_in_world, axis), on_shape[1])
    sky = at_room & (side != 3) if world.roofless else torch.zeros_like(at_room)
    distance = torch.where(sky, torch.full_like(nearest, FAR), nearest)
    return Hit(distance, torch.where(at_room, P + side, shape), normal, place)


def _shape_distances(world: World, origin: Tensor, direction: Tensor) -> Tensor:
    """[..., P] distance to the first surface of each shape, FAR where a ray misses it."""
    distances = [_one_distance(world, i, origin, direction) for i in range(len(world.kind))]
    return torch.stack(distances, -1)


def _one_distance(world: World, i: int, origin: Tensor, direction: Tensor) -> Tensor:
    o, d = _turned(world, i, origin - world.center[i]), _turned(world, i, direction)
    half = world.half[i]
    inverse = 1 / torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    near, far = (-o - half * inverse.sign()) * inverse, (-o + half * inverse.sign()) * inverse
    if world.kind[i] == 1:
        c = o.square().sum(-1) - half[0] ** 2
        enter, leave = _roots(d.square().sum(-1), (o * d).sum(-1), c)
    elif world.kind[i] == 2:
        flat = (0, 2)
        a, b = d[..., flat].square().sum(-1), (o[..., flat] * d[..., flat]).sum(-1)
        enter, leave = _roots(a, b, o[..., flat].square().sum(-1) - half[0] ** 2)
        enter, leave = torch.maximum(enter, near[..., 1]), torch.minimum(leave, far[..., 1])
    else:
        enter, leave = near.amax(-1), far.amin(-1)
    return torch.where((enter < leave) & (enter > 0), enter, torch.full_like(enter, FAR))


def _roots(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The two solutions of a t^2 + 2 b t + c = 0, FAR and -FAR where there is none."""
    a = a.clamp(min=1e-9)  # upright rays have none across a cylinder
    square = b * b - a * c
    root = square.clamp(min=0).sqrt()
    return (
        torch.where(square > 0, (-b - root) / a, FAR),
        torch.where(square > 0, (-b + root) / a, -FAR),
    )


def _turned(world: World, i: int | Tensor, x: Tensor) -> Tensor:
    """x [..., 3] in the axes of shape i."""
    cos, sin = world.turn[i].cos(), world.turn[i].sin()
    return torch.stack(
        [cos * x[..., 0] - sin * x[..., 2], x[..., 1], sin * x[..., 0] + cos * x[..., 2]], -1
    )


def _on_shape(world: World, shape: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Outward normals [..., 3] and places [..., 2] in metres of points on their shapes."""
    local = _turned(world, shape, point - world.center[shape])
    half, kind = world.half[shape], world.kind[shape][..., None]
    relative = local / half
    axis = relative.abs().argmax(-1)
    of_box = F.one_hot(axis, 3).to(local) * local.sign()
    capped = (kind == 2) & (relative[..., 1:2].abs() > 0.9999)
    upright = local * torch.tensor([1.0, 0.0, 1.0]).to(local)
    normal = torch.where(kind == 1, local, torch.where((kind == 2) & ~capped, upright, of_box))
    normal = torch.where(capped, F.one_hot(torch.ones_like(axis), 3) * local.sign(), normal)
    around = torch.atan2(local[..., 0], local[..., 2]) * half[..., 0]
    rolled = torch.stack([around, local[..., 1]], -1)
    flat = torch.where(capped, _other_two(local, torch.ones_like(axis)), _other_two(local, axis))
    place = torch.where((kind == 1) | ((kind == 2) & ~capped), rolled, flat)
    back = _turned(replace(world, turn=-world.turn), shape, F.normalize(normal, dim=-1))
    return back, place


def _other_two(x: Tensor, axis: Tensor) -> Tensor:
    """The coordinates [..., 2] of x [..., 3] that are not along `axis` [...]."""
    pair = torch.tensor([[1, 2], [0, 2], [0, 1]], device=x.device)[axis]
    return x.gather(-1, pair)


def render(world: World, cameras: Cameras) -> Sample:
    """What cameras of one image size see in the world, without noise."""
    H, W = (int(n) for n in cameras.image_size[0])
    k, extrinsics = cameras.intrinsics, cameras.extrinsics
    xy = pixel_centers((H, W), k).flatten(0, 1)  # [H W, 2]
    focal = torch.stack([k[:, 0, 0], k[:, 1, 1]], -1)[:, None]
    rays = F.pad((xy - k[:, None, :2, 2]) / focal, (0, 1), value=1.0)  # [S, H W, 3], z = 1
    direction = rays @ extrinsics[:, :, :3]  # row vectors: d R equals R^T d
    hit = cast(world, cameras.centers[:, None].expand_as(direction), direction)
    color = _color(world, hit, direction, k[0, 0, 0])
    pixels = color.mT.unflatten(-1, (H, W))
    depth = hit.distance.unflatten(-1, (H, W))
    valid = depth < FAR
    return Sample(pixels, cameras, torch.where(valid, depth, 1.0), valid)


def _color(world: World, hit: Hit, direction: Tensor, focal: Tensor) -> Tensor:
    """[S, H W, 3] sRGB: texture at the pixel's level of detail under one light and the sky."""
    texels = world.texels[hit.shape]
    cosine = -(hit.normal * F.normalize(direction, dim=-1)).sum(-1)
    footprint = hit.distance.clamp(max=FAR) / focal * texels / cosine.abs().clamp(min=0.2)
    level = footprint.clamp(min=1).log2().clamp(max=LEVELS - 1)
    z = (world.texture[hit.shape] * LEVELS + level) / (TEXTURES * LEVELS - 1)
    uv = 2 * (hit.place * texels[..., None]) / TEXELS
    grid = torch.cat([uv, 2 * z[..., None] - 1], -1)[None, :, :, None]  # [1, S, H W, 1, 3]
    found = F.grid_sample(world.volume, grid, padding_mode="reflection", align_corners=True)
    surface = found[0, ..., 0].permute(1, 2, 0)
    shade = 0.55 + 0.45 * (hit.normal @ world.light).clamp(min=0)
    up = F.normalize(direction, dim=-1)[..., 1:2].neg().clamp(0, 1)
    sky = torch.tensor([0.75, 0.85, 0.95]).to(up) - up * torch.tensor([0.4, 0.25, 0.05]).to(up)
    return torch.where((hit.distance >= FAR)[..., None], sky, surface * shade[..., None])


def visible(world: World, points: Tensor, cameras: Cameras, tolerance: float = 0.01) -> Tensor:
    """[S, N] bool: which points [N, 3] on or near surfaces each camera's ray reaches unhindered.

    tolerance: of the distance, by which a surface may lie before the point. Frustum not tested.
    """
    origin = cameras.centers[:, None].expand(-1, len(points), -1)
    return cast(world, origin, points - origin).distance > 1 - tolerance


def look_at(center: Tensor, target: Tensor, roll: Tensor) -> Tensor:
    """Extrinsics [S, 3, 4] of cameras at `center` [S, 3] that look at `target` [S, 3].

    roll: [S] radians about the viewing axis.
    """
    z = F.normalize(target - center, dim=-1)
    x = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]).expand_as(z), z), dim=-1)
    y = torch.linalg.cross(z, x)
    cos, sin = roll.cos()[:, None], roll.sin()[:, None]
    rotation = torch.stack([cos * x + sin * y, cos * y - sin * x, z], -2)
    return torch.cat([rotation, -rotation @ center[..., None]], -1)


@dataclass(frozen=True)
class Path:
    """How cameras move; `spread` from 0 (nearly still) to 1 (wide baselines)."""

    frames: int = 8
    size: tuple[int, int] = (128, 128)
    spread: float = 1.0
    field_of_view: tuple[float, float] = (35.0, 90.0)  # degrees along the longer side


def cameras(random: Generator, world: World, path: Path) -> Cameras:
    """Cameras on an orbit, on a line, turning, or anywhere: all look at one part of the world."""
    S = path.frames
    reach = torch.minimum(world.room, torch.tensor([3.5, 9.0, 3.5]))
    way = int(torch.randint(0, 4, (1,), generator=random))
    target = (2 * uniform(random, 3) - 1) * reach * torch.tensor([0.35, 0.3, 0.35])
    target[1] = target[1].abs() + 0.4 if world.roofless else target[1]  # not into the sky
    heading = uniform(random, 1, high=2 * math.pi)
    radius = uniform(random, 1, low=0.45, high=0.95) * reach[[0, 2]].min()
    along = 2 * torch.rand(S, generator=random).sort().values - 1  # position on the way
    angle = heading + path.spread * (0.9 * along if way == 0 else 0.15 * along)
    center = torch.stack([angle.sin(), torch.zeros(S), -angle.cos()], -1) * radius
    if way == 1:  # sideways, or towards the target
        step = torch.randn(3, generator=random) * torch.tensor([1.0, 0.2, 1.0])
        center = center + path.spread * 0.8 * along[:, None] * F.normalize(step, dim=0)
    if way == 3:
        center = center + path.spread * 0.9 * torch.randn(S, 3, generator=random)
    center = center + path.spread * 0.15 * torch.randn(S, 3, generator=random)
    center[:, 1] = center[:, 1] + uniform(random, 1, low=-0.5, high=0.35) * reach[1]
    aim = 0.9 if way == 2 else 0.25
    targets = target + path.spread * aim * torch.randn(S, 3, generator=random)
    center = _free(world, center, reach)
    roll = 0.12 * path.spread * torch.randn(S, generator=random)
    extrinsics = look_at(center, targets, roll)
    H, W = path.size
    degrees = uniform(random, 1, low=path.field_of_view[0], high=path.field_of_view[1])
    focal = float(max(H, W) / 2 / torch.tan(torch.deg2rad(degrees) / 2))
    k = torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]])
    order = torch.randperm(S, generator=random)
    return Cameras(extrinsics[order], k.repeat(S, 1, 1), torch.tensor([[H, W]]).repeat(S, 1))


def _free(world: World, center: Tensor, reach: Tensor) -> Tensor:
    """The centres [S, 3], moved inside the room and out of the shapes."""
    limit = torch.minimum(world.room - NEAREST, reach + 1)
    center = torch.maximum(torch.minimum(center, limit), -limit)
    outer = world.half.amax(-1) * 1.5 + NEAREST  # [P]
    for _ in range(4):
        away = center[:, None] - world.center  # [S, P, 3]
        inside = (outer - away.norm(dim=-1)).clamp(min=0)
        push = (F.normalize(away, dim=-1, eps=1e-6) * inside[..., None]).sum(1)
        center = torch.maximum(torch.minimum(center + push, limit), -limit)
    return center


def sample(seed: int, path: Path, device: torch.device = CPU) -> Sample:
    """A random world seen along a random path; the same for the same seed, on any `device`."""
    random = torch.Generator().manual_seed(seed)
    made = world(random)
    seen = cameras(random, made, path)
    k, extrinsics = seen.intrinsics.to(device), seen.extrinsics.to(device)
    return render(made.to(device), Cameras(extrinsics, k, seen.image_size))


def photographed(random: Generator, pixels: Tensor) -> Tensor:
    """The frames [S, 3, H, W] as a camera records them: exposure, white balance, noise, 8 bits."""
    S = len(pixels)
    common = uniform(random, 1, 1, 1, 1, low=0.7, high=1.3)
    exposure = common * uniform(random, S, 1, 1, 1, low=0.9, high=1.1)
    balance = uniform(random, 1, 3, 1, 1, low=0.9, high=1.1)
    noise = uniform(random, 1, high=0.02) * torch.randn(pixels.shape, generator=random)
    seen = pixels * (exposure * balance).to(pixels) + noise.to(pixels)
    return (seen.clamp(0, 1) * 255).round() / 255
