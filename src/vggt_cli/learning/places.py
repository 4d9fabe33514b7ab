"""Random places: rooms, tables with things on them, open ground and hills.

Parts of a place are built standing at the origin on y = 0 and then moved to where they belong.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from vggt_cli.learning.textures import MADE, PHOTOS
from vggt_cli.learning.world import BALL, BOX, CYLINDER, TORUS, Shapes, World, tilted, upright


def uniform(random: Generator, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform values in [low, high)."""
    return low + (high - low) * torch.rand(*size, generator=random)


def chance(random: Generator, share: float) -> bool:
    """True in `share` of all cases."""
    return bool(torch.rand((), generator=random) < share)


def world(random: Generator) -> World:
    """A random room, table, open ground or hills."""
    place = PLACES[int(torch.randint(0, len(PLACES), (), generator=random))]
    return place(random)


def room(random: Generator) -> World:
    """Furniture, pictures on the walls, and a thing or two in the air."""
    half = uniform(random, 3, low=2.2, high=4.5)
    half[1] = 1.2 + 0.5 * (half[1] - 2.2) / 2.3
    parts = [_spread(random, things(random, 8, 0.12, 0.55), half, 0.75)]
    parts.append(pictures(random, half, 4))
    in_air = _spread(random, things(random, 2, 0.1, 0.3), half, 0.6)
    in_air.center[:, 1] = (uniform(random, 2) - 0.6) * half[1]
    parts.append(in_air)
    if chance(random, 0.6):
        parts.append(_put(random, table(random, 3), half, 0.5))
    if chance(random, 0.5):
        parts.append(_put(random, fence(random), half, 0.6))
    stage = torch.tensor([0.0, 0.3 * float(half[1]), 0.0]) + 0.3 * half * (uniform(random, 3) - 0.5)
    reach, rise = torch.tensor([1.6, 3.6]), torch.tensor([-0.1, 0.4])
    return _finished(random, parts, half, (stage, reach, rise))


def tabletop(random: Generator) -> World:
    """Many small things on a table, seen from close by, in a room."""
    half = torch.cat([uniform(random, 1, low=2, high=3.5), uniform(random, 2, low=1.3, high=3.5)])
    half[1] = 1.2 + 0.2 * half[1] / 3.5
    parts = [_put(random, table(random, 10), half, 0.0)]
    top = parts[0].center[:, 1].amin()
    parts.append(pictures(random, half, 3))
    parts.append(_spread(random, things(random, 3, 0.2, 0.5), half, 0.9))
    stage = torch.tensor([0.0, float(top) + 0.1, 0.0])
    reach, rise = torch.tensor([0.8, 1.7]), torch.tensor([0.15, 0.9])
    return _finished(random, parts, half, (stage, reach, rise))


def outdoors(random: Generator) -> World:
    """Open ground, flat or with hills, with things, poles and fences."""
    half = torch.tensor([30.0, 1.5, 30.0])
    hilly = chance(random, 0.5)
    waves = torch.empty(0, 4)
    if hilly:
        length, way = uniform(random, 4, low=6, high=14), uniform(random, 4, high=2 * math.pi)
        height = length * uniform(random, 4, low=0.005, high=0.022)
        vector = 2 * math.pi / length
        waves = torch.stack([height, vector * way.sin(), vector * way.cos(), way * 7], -1)
    area = torch.tensor([4.5, 1.5, 4.5])
    parts = [_spread(random, things(random, 9, 0.2, 0.8), area, 0.9)]
    parts += [_put(random, pole(random, 3.5), area, 0.9) for _ in range(3)]
    parts += [_put(random, fence(random), area, 0.7) for _ in range(1 + chance(random, 0.4))]
    stage = torch.tensor([0.0, 0.9, 0.0]) + (uniform(random, 3) - 0.5)
    reach, rise = torch.tensor([2.0, 5.5]), torch.tensor([0.0, 0.5])
    made = _finished(random, parts, half, (stage, reach, rise), hills=waves)
    lowered = made.ground(made.center[:, 0], made.center[:, 2]) - half[1]
    made.center[:, 1] += lowered + (0.1 if hilly else 0.0)  # a little into the slope
    return made


PLACES = (room, room, tabletop, outdoors, outdoors)


def _spread(random: Generator, part: Shapes, area: Tensor, share: float) -> Shapes:
    """Each shape of the part moved to a place of its own on the floor."""
    spots = (2 * uniform(random, len(part.kind), 3) - 1) * share * area
    spots[:, 1] = area[1]
    return part._replace(center=part.center + spots)


def _put(random: Generator, part: Shapes, area: Tensor, share: float) -> Shapes:
    """The part turned and moved as a whole to a place on the floor."""
    spot = (2 * uniform(random, 3) - 1) * share * area
    spot[1] = area[1]
    return moved(part, uniform(random, 1, high=2 * math.pi), spot)


def _finished(
    random: Generator,
    parts: list[Shapes],
    half: Tensor,
    view: tuple[Tensor, Tensor, Tensor],
    hills: Tensor | None = None,
) -> World:
    """A world of the parts, seen as in `view` (stage, reach, rise), with surfaces and light."""
    shapes = joined(parts)
    roofless = hills is not None
    P = len(shapes.kind)
    photo = uniform(random, P + 6) < 0.45
    texture = torch.randint(0, MADE, (P + 6,), generator=random)
    texture = torch.where(photo, MADE + texture % PHOTOS, texture)
    scale = torch.cat(
        [uniform(random, P, low=0.6, high=2.0), uniform(random, 6, low=0.35, high=1.0)]
    )
    # Small things have finer textures.
    scale[:P] /= shapes.half.amax(-1).clamp(0.15, 0.5) / 0.4
    turn = uniform(random, P + 6, high=2 * math.pi)
    mapping = torch.stack([scale * turn.cos(), scale * turn.sin()], -1)
    mapping = torch.cat([mapping, uniform(random, P + 6, 2, high=10)], -1)
    if roofless:
        toward = torch.randn(3, generator=random) + torch.tensor([0.0, -2.0, 0.0])
        light = 1000 * F.normalize(toward, dim=0)
    else:
        light = half * torch.tensor([1.0, 0, 1]) * (uniform(random, 3) - 0.5)
        light[1] = -0.9 * half[1]
    return World(
        half,
        roofless,
        torch.empty(0, 4) if hills is None else hills,
        *shapes,
        texture,
        _palettes(random, photo),
        mapping,
        light,
        uniform(random, 1, low=0.35, high=0.65)[0],
        torch.tensor([[0.8, 0.85, 0.9], [0.35, 0.55, 0.85]]) * uniform(random, 1, low=0.7, high=1.1)
        + 0.1 * torch.randn(2, 3, generator=random),
        *view,
    )


def _palettes(random: Generator, photo: Tensor) -> Tensor:
    """[n, 3, 3] three related colours for a texture of shares, a tint for a photographic one."""
    n = len(photo)
    colors = 0.6 * uniform(random, n, 1, 3) + 0.55 * uniform(random, n, 3, 3)
    gray = colors.mean(-1, keepdim=True)
    colors = gray + (colors - gray) * uniform(random, n, 1, 1, low=0.1, high=0.9)
    tint = torch.diag_embed(uniform(random, n, 3, low=0.7, high=1.4))
    return torch.where(photo[:, None, None], tint, colors)


def joined(parts: list[Shapes]) -> Shapes:
    """All shapes of several parts."""
    return Shapes(*(torch.cat(field) for field in zip(*parts, strict=True)))


def moved(part: Shapes, turn: Tensor, offset: Tensor) -> Shapes:
    """The part turned about the vertical by `turn` [1] radians, then moved by `offset` [3]."""
    axes = upright(turn)[0]
    return part._replace(center=part.center @ axes + offset, axes=part.axes @ axes)


def things(random: Generator, count: int, low: float, high: float) -> Shapes:
    """Shapes of half extents low to high, standing one in the other at the origin."""
    kind = torch.multinomial(torch.tensor([0.45, 0.15, 0.25, 0.15]), count, True, generator=random)
    half = low + (high - low) * torch.rand(count, 3, generator=random)
    half[:, 1] = torch.where(kind == BALL, half[:, 0], half[:, 1])
    half[:, 1] = torch.where(kind == TORUS, half[:, 0] * (0.15 + 0.25 * half[:, 1]), half[:, 1])
    half[:, 2] = torch.where(kind == BOX, half[:, 2], half[:, 0])
    tilt = uniform(random, count, high=math.pi / 2) * (uniform(random, count) < 0.3)
    axes = tilted(tilt) @ upright(uniform(random, count, high=math.pi))
    center = torch.zeros(count, 3)
    center[:, 1] = -torch.where(kind == BALL, half[:, 0], (axes[..., 1].abs() * half).sum(-1))
    return Shapes(kind, center, half, axes)


def table(random: Generator, count: int) -> Shapes:
    """A table with `count` things on it."""
    wide, deep = uniform(random, 2, low=0.4, high=0.8).tolist()
    high = float(uniform(random, 1, low=0.6, high=0.85))
    leg = float(uniform(random, 1, low=0.02, high=0.05))
    signs = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
    feet = signs * torch.tensor([wide - leg, deep - leg])
    center = torch.stack([feet[:, 0], torch.full((4,), -high / 2), feet[:, 1]], -1)
    kind = BOX if chance(random, 0.5) else CYLINDER
    frame = Shapes(
        torch.tensor([BOX, *[kind] * 4]),
        torch.cat([torch.tensor([[0, 0.03 - high, 0]]), center]),
        torch.tensor([[wide, 0.03, deep], *[[leg, high / 2 - 0.03, leg]] * 4]),
        torch.eye(3).repeat(5, 1, 1),
    )
    on_it = things(random, count, 0.04, 0.16)
    spots = (2 * uniform(random, count, 2) - 1) * torch.tensor([wide - 0.1, deep - 0.1])
    on_it.center[:, [0, 2]] = spots
    on_it.center[:, 1] -= high
    return joined([frame, on_it])


def fence(random: Generator) -> Shapes:
    """Slats or poles in a row between two rails."""
    count = int(torch.randint(4, 9, (), generator=random))
    apart = float(uniform(random, 1, low=0.12, high=0.35))
    thin, high = float(uniform(random, 1, low=0.015, high=0.04)), float(uniform(random, 1, low=0.4))
    place = (torch.arange(count) - (count - 1) / 2) * apart
    none = torch.zeros(count)
    rails = torch.tensor([[0, -1.6 * high, 0], [0, -0.4 * high, 0]])
    kind = BOX if chance(random, 0.6) else CYLINDER
    width = thin * (2 if kind == BOX else 1)
    return Shapes(
        torch.tensor([kind] * count + [BOX] * 2),
        torch.cat([torch.stack([place, none - high, none], -1), rails]),
        torch.cat(
            [
                torch.tensor([[width, high, thin]]).repeat(count, 1),
                torch.tensor([[count * apart / 2, thin, thin / 2]]).repeat(2, 1),
            ]
        ),
        torch.eye(3).repeat(count + 2, 1, 1),
    )


def pole(random: Generator, height: float) -> Shapes:
    """A thin upright pole of about that height."""
    half = torch.tensor([[1.0, 0, 1]]) * uniform(random, 1, low=0.02, high=0.07)
    half[:, 1] = height / 2 * uniform(random, 1, low=0.6, high=1.0)
    center = half * torch.tensor([0.0, -1, 0])
    return Shapes(torch.tensor([CYLINDER]), center, half, torch.eye(3)[None])


def pictures(random: Generator, room: Tensor, count: int) -> Shapes:
    """Thin boxes on the walls."""
    half = uniform(random, count, 3, low=0.2, high=0.6)
    half[:, 2] = 0.02
    wall = torch.randint(0, 4, (count,), generator=random) * (math.pi / 2)
    axes = upright(wall)
    across = (2 * uniform(random, count, 1) - 1) * 0.6 * room
    center = across * axes[:, 0].abs() + room * axes[:, 2].round()
    center[:, 1] = (uniform(random, count) - 0.7) * 0.8 * room[1]
    return Shapes(torch.full((count,), BOX), center, half, axes)
