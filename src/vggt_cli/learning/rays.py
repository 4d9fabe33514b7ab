"""Rays against the shapes of a world.

Coordinates come first here, [3, N], because arithmetic on whole rows is several times as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vggt_cli.learning.world import BALL, BOX, CYLINDER, TORUS, World

FAR = 1e4  # no surface
ROOM, HILLS = TORUS + 1, TORUS + 2  # what else than a shape a ray can meet


class Hit(NamedTuple):
    """Where rays meet the world."""

    distance: Tensor  # [N] in lengths of the ray's direction; FAR if nowhere
    surface: Tensor  # [N] int64 index of shape; P + side for the room, P + 3 for hills
    normal: Tensor  # [3, N] towards the ray's origin
    place: Tensor  # [2, N] metres on the surface


def nearest(
    world: World, origin: Tensor, direction: Tensor, near: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Distance [N] and surface [N], as in Hit, of the first that each ray meets.

    origin, direction: [3, N]. near: [P, N] bool, False where a ray certainly misses a shape.
    """
    P = len(world.kind)
    inverse = 1 / _nonzero(direction)
    walls = (torch.where(inverse > 0, world.room[:, None], -world.room[:, None]) - origin) * inverse
    distance = walls.amin(0)
    side = (direction > 0).long() + torch.tensor([[0], [2], [4]]).to(direction.device)
    surface = P + torch.where(
        walls[1] == distance, side[1], torch.where(walls[0] == distance, side[0], side[2])
    )
    if world.roofless:
        ground = (surface == P + 3) & (len(world.hills) == 0)
        distance = torch.where(ground, distance, FAR)
    every = torch.arange(len(distance), device=distance.device)
    for i, kind in enumerate(world.kind.tolist()):
        ray = every if near is None else near[i].nonzero()[:, 0]
        o = world.axes[i] @ (origin.index_select(1, ray) - world.center[i][:, None])
        d = world.axes[i] @ direction.index_select(1, ray)
        met, before = DISTANCES[kind](o, d, world.half[i][:, None]), distance[ray]
        surface[ray] = torch.where(met < before, i, surface[ray])
        distance[ray] = torch.minimum(met, before)
    if len(world.hills):
        met = _hills(world, origin, direction, torch.minimum(walls[::2].amin(0), distance))
        surface = torch.where(met < distance, P + 3, surface)
        distance = torch.minimum(met, distance)
    return distance, surface


def cast(world: World, origin: Tensor, direction: Tensor, near: Tensor | None = None) -> Hit:
    """The first surface that rays meet; arguments as of `nearest`."""
    distance, surface = nearest(world, origin, direction, near)
    point = origin + distance * direction
    sides = torch.full((6,), ROOM, device=point.device)
    if len(world.hills):
        sides[3] = HILLS
    kind = torch.cat([world.kind, sides])[surface]
    normal, place = torch.zeros_like(point), torch.zeros_like(point[:2])
    for k in range(HILLS + 1):
        ray = (kind == k).nonzero()[:, 0]
        if not len(ray):
            continue
        p = point.index_select(1, ray)
        if k == ROOM:
            at, found = _on_box(p, world.room[:, None])
            normal[:, ray], place[:, ray] = -at, found
        elif k == HILLS:
            x, z = world.slope(p[0], p[2])  # upwards, which is against the second axis
            up = torch.stack([-x, -torch.ones_like(x), -z])
            normal[:, ray], place[:, ray] = unit(up), p[[0, 2]]
        else:
            shape = surface.index_select(0, ray)
            center, half = world.center.T[:, shape], world.half.T[:, shape]
            axes = world.axes.permute(1, 2, 0)[..., shape]  # [3, 3, n]
            at, found = PLACES[k]((axes * (p - center)).sum(1), half)
            normal[:, ray], place[:, ray] = (axes * at[:, None]).sum(0), found
    return Hit(distance, surface, normal, place)


def unit(x: Tensor) -> Tensor:
    """x [3, N] at length 1. F.normalize takes sixty times as long along the first axis."""
    return x * (x * x).sum(0).clamp(min=1e-18).rsqrt()


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1e-9, 1e-9, x)


def _slabs(o: Tensor, d: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave the slabs |x| < half [n, 1], per axis [n, N]."""
    inverse = 1 / _nonzero(d)
    a, b = (-half - o) * inverse, (half - o) * inverse
    return torch.minimum(a, b), torch.maximum(a, b)


def _between(enter: Tensor, leave: Tensor) -> Tensor:
    return torch.where((enter < leave) & (enter > 0), enter, FAR)


def _to_box(o: Tensor, d: Tensor, half: Tensor) -> Tensor:
    """[N] distance along rays o + t d [3, N] in a shape's axes to its surface; FAR for none."""
    enter, leave = _slabs(o, d, half)
    return _between(enter.amax(0), leave.amin(0))


def _to_ball(o: Tensor, d: Tensor, half: Tensor) -> Tensor:
    return _between(*_roots((d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - half[0] ** 2))


def _to_cylinder(o: Tensor, d: Tensor, half: Tensor) -> Tensor:
    a, b = d[0] ** 2 + d[2] ** 2, o[0] * d[0] + o[2] * d[2]
    enter, leave = _roots(a, b, o[0] ** 2 + o[2] ** 2 - half[0] ** 2)
    top, bottom = _slabs(o[1:2], d[1:2], half[1:2])
    return _between(torch.maximum(enter, top[0]), torch.minimum(leave, bottom[0]))


def _roots(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The two solutions of a t^2 + 2 b t + c = 0, FAR and -FAR where there is none."""
    a = a.clamp(min=1e-9)  # rays along a cylinder's axis have none
    square = b * b - a * c
    root = square.clamp(min=0).sqrt()
    none = square <= 0
    return torch.where(none, FAR, (-b - root) / a), torch.where(none, -FAR, (-b + root) / a)


def _to_torus(o: Tensor, d: Tensor, half: Tensor) -> Tensor:
    """By steps as long as the surface is away, then Newton's."""
    sides = _slabs(o, d, half)
    enter, leave = sides[0].amax(0), sides[1].amin(0)
    ray = ((enter < leave) & (enter > 0)).nonzero()[:, 0]
    o, d, t = o.index_select(1, ray), d.index_select(1, ray), enter[ray]
    speed = (d * d).sum(0).sqrt()
    for _ in range(24):
        t = t + _torus_gap(o + t * d, half) / speed
    for _ in range(3):
        p = o + t * d
        slope = (_on_torus(p, half)[0] * d).sum(0)
        t = t - _torus_gap(p, half) / torch.minimum(slope, -0.02 * speed)
    met = (_torus_gap(o + t * d, half).abs() < 2e-5) & (t < leave[ray])
    return torch.full_like(enter, FAR).index_copy_(0, ray, torch.where(met, t, FAR))


def _torus_gap(p: Tensor, half: Tensor) -> Tensor:
    """[N] distance of points p [3, N] to a ring about the second axis, negative inside."""
    tube = half[1]
    return torch.hypot(torch.hypot(p[0], p[2]) - (half[0] - tube), p[1]) - tube


def _hills(world: World, origin: Tensor, direction: Tensor, limit: Tensor) -> Tensor:
    """[N] distance to the hills, FAR if they are not met before `limit` [N].

    In growing steps to the first point below ground, then by bisection and Newton's steps.
    """
    swing = world.hills[:, 0].sum()
    y, dy = origin[1], _nonzero(direction[1])
    to_top, to_bottom = (world.room[1] - swing - y) / dy, (world.room[1] + swing - y) / dy
    start = torch.minimum(to_top, to_bottom).clamp(min=0)
    end = torch.minimum(torch.maximum(to_top, to_bottom), limit)
    ray = (start < end).nonzero()[:, 0]
    o, d = origin.index_select(1, ray), direction.index_select(1, ray)

    def gap(t: Tensor) -> Tensor:
        return world.ground(o[0] + t * d[0], o[2] + t * d[2]) - o[1] - t * d[1]

    low, end = start[ray], end[ray]
    length, high = end - low, torch.full_like(end, FAR)
    start = low
    for part in torch.linspace(0, 1, 33)[1:].square().tolist():
        t = start + part * length
        searching = high == FAR
        below = searching & (gap(t) < 0)
        high = torch.where(below, t, high)
        low = torch.where(searching & ~below, t, low)
    found = (high < FAR).nonzero()[:, 0]
    ray, o, d = ray[found], o.index_select(1, found), d.index_select(1, found)
    low, high = low[found], high[found]
    for _ in range(8):
        t = (low + high) / 2
        below = gap(t) < 0
        low, high = torch.where(below, low, t), torch.where(below, t, high)
    t = (low + high) / 2
    for _ in range(3):
        x, z = world.slope(o[0] + t * d[0], o[2] + t * d[2])
        slope = -x * d[0] - z * d[2] - d[1]
        t = (t - gap(t) / _nonzero(slope)).clamp(low, high)
    return torch.full_like(limit, FAR).index_copy_(0, ray, t)


def _on_box(p: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Outward normals [3, N] and places [2, N] in metres of surface points p [3, N]."""
    part = (p / half).abs()
    most = part.amax(0)
    x, y = part[0] == most, part[1] == most
    side = torch.stack([x, y & ~x, ~(x | y)])
    return side * p.sign(), torch.stack(
        [torch.where(x, p[1], p[0]), torch.where(x | y, p[2], p[1])]
    )


def _on_ball(p: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    return unit(p), torch.stack([torch.atan2(p[0], p[2]) * half[0], p[1]])


def _on_cylinder(p: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    capped = p[1].abs() > 0.9999 * half[1]
    none = torch.zeros_like(p[1])
    normal = torch.where(
        capped, torch.stack([none, p[1].sign(), none]), torch.stack([p[0], none, p[2]]) / half[0]
    )
    rolled = torch.stack([torch.atan2(p[0], p[2]) * half[0], p[1]])
    return normal, torch.where(capped, p[[0, 2]], rolled)


def _on_torus(p: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    ring, around = half[0] - half[1], torch.hypot(p[0], p[2])
    out = around - ring
    across = out / around.clamp(min=1e-9)
    normal = unit(torch.stack([p[0] * across, p[1], p[2] * across]))
    turn, roll = torch.atan2(p[0], p[2]), torch.atan2(p[1], out)
    return normal, torch.stack([turn * ring, roll * half[1]])


DISTANCES: dict[int, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    BOX: _to_box,
    BALL: _to_ball,
    CYLINDER: _to_cylinder,
    TORUS: _to_torus,
}
PLACES: dict[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    BOX: _on_box,
    BALL: _on_ball,
    CYLINDER: _on_cylinder,
    TORUS: _on_torus,
}
