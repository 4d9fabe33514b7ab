"""Where cameras stand: paths through a world on which every camera shares its view with another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from vggt_cli.geometry import pixel_centers, project
from vggt_cli.learning.places import uniform
from vggt_cli.learning.rays import FAR, nearest
from vggt_cli.learning.world import World
from vggt_cli.scene import Cameras

CLEAR = 0.25  # metres between a camera and any surface, at least
SHARED = 0.15  # of its view that a camera has in common with another, at least, on a coarse grid
ATTEMPTS = 4  # to find such cameras; then the best there are
COARSE = 12  # rows or columns of that grid along the shorter side


@dataclass(frozen=True)
class Path:
    """How cameras move; `spread` from 0 (nearly still) to 1 (wide baselines)."""

    frames: int = 8
    size: tuple[int, int] = (128, 128)
    spread: float = 1.0
    field_of_view: tuple[float, float] = (30.0, 100.0)  # degrees along the longer side


def cameras(random: Generator, world: World, path: Path) -> Cameras:
    """Cameras on an orbit, passing by, going forward, turning in place, or anywhere.

    More are drawn than wanted: those inside of things are left out, and each that is taken shares
    its view with one taken before, if any does.
    """
    H, W = path.size
    degrees = uniform(random, 1, low=path.field_of_view[0], high=path.field_of_view[1])
    focal = float(max(H, W) / 2 / torch.tan(torch.deg2rad(degrees) / 2))
    k = torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]])
    extrinsics = torch.empty(0, 3, 4)
    for _ in range(ATTEMPTS):
        while len(extrinsics) < path.frames:
            extrinsics = torch.cat([extrinsics, _draw(random, world, path)])
        K = len(extrinsics)
        drawn = Cameras(extrinsics, k.repeat(K, 1, 1), torch.tensor([[H, W]]).repeat(K, 1))
        taken, weakest = _chosen(shared(world, drawn), path.frames)
        if weakest >= SHARED:
            break
        extrinsics = torch.cat([extrinsics[taken], _draw(random, world, path)])
    return Cameras(drawn.extrinsics[taken], drawn.intrinsics[taken], drawn.image_size[taken])


def _draw(random: Generator, world: World, path: Path) -> Tensor:
    """Extrinsics [n, 3, 4] on one path, more than wanted but for those that touch something."""
    spread, count = path.spread, 2 * path.frames + 12
    way = int(torch.randint(0, 5, (), generator=random))
    low, high = world.reach.tolist()
    heading = uniform(random, 1, high=2 * math.pi)
    distance = uniform(random, 1, low=low, high=high)
    rise = uniform(random, 1, low=float(world.rise[0]), high=float(world.rise[1]))
    along = uniform(random, count, low=-spread, high=spread)  # position on the way
    none = torch.zeros(count)
    angle = heading + (1.5 * along if way == 0 else none)
    if way == 4:
        angle = heading + 2.5 * along
        distance = distance + along.roll(1) * (high - low) / 2
        rise = rise + along.roll(2) * 0.3
    stage = world.stage + 0.25 * low * torch.randn(3, generator=random)
    out = torch.stack([angle.sin() * rise.cos(), -rise.sin() + none, -angle.cos() * rise.cos()], -1)
    aim = 0.08 if way == 2 else 0.2
    target = stage + spread * aim * distance.mean() * torch.randn(count, 3, generator=random)
    center = stage + out * distance[:, None]
    ahead = F.normalize(stage - center, dim=-1)
    side = torch.stack([angle.cos() + none, none, angle.sin() + none], -1)
    if way == 1:  # sideways
        center = center + along[:, None] * 0.6 * distance[:, None] * side
    if way == 2:  # forward, along the optical axis
        step = along[:, None] * 0.45 * distance[:, None] * ahead
        center, target = center + step, target + step + ahead * high
    if way == 3:  # in place
        turned = ahead + 0.9 * along[:, None] * side
        target = center + turned * distance[:, None] + (target - stage)
        center = center.mean(0).expand(count, -1)
    center = center + 0.05 * spread * distance.mean() * torch.randn(count, 3, generator=random)
    limit = world.room - 1.5 * CLEAR
    center = torch.maximum(torch.minimum(center, limit), -10 * limit if world.roofless else -limit)
    ground = world.ground(center[:, 0], center[:, 2]) - 1.5 * CLEAR
    center[:, 1] = torch.minimum(center[:, 1], ground)
    free = world.clearance(center) > CLEAR
    roll = 0.1 * spread * torch.randn(count, generator=random)
    return look_at(center, target, roll)[free]


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


def rays(cameras: Cameras, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Origins and directions [3, S N] with z = 1 of the pixels xy [N, 2] of each camera."""
    k, rotation = cameras.intrinsics, cameras.extrinsics[:, :, :3]
    focal = torch.stack([k[:, 0, 0], k[:, 1, 1]], -1)[:, None]
    seen = F.pad((xy - k[:, None, :2, 2]) / focal, (0, 1), value=1.0)  # [S, N, 3]
    direction = rotation.mT @ seen.mT  # [S, 3, N]
    origin = cameras.centers[:, :, None].expand_as(direction)
    return origin.transpose(0, 1).flatten(1), direction.transpose(0, 1).flatten(1)


def shared(world: World, cameras: Cameras) -> Tensor:
    """[S, S] share of the first camera's view that the second has too, on a coarse grid.

    Only what is seen counts: of a view with half of it sky at most half is shared. It is 0 where
    half of the first camera's view is nearer than twice CLEAR.
    """
    S = len(cameras)
    H, W = (int(n) for n in cameras.image_size[0])
    cell = min(H, W) / COARSE
    rows, columns = round(H / cell), round(W / cell)
    xy = pixel_centers((rows, columns), cameras.intrinsics).flatten(0, 1) * cell
    origin, direction = rays(cameras, xy)
    z = nearest(world, origin, direction)[0]
    points = (origin + z * direction).T.reshape(S, -1, 3)
    z = z.view(S, -1)  # [S, R]
    # [S to, S from, R]
    at, depth = project(points[None], cameras.intrinsics, cameras.extrinsics)
    column, row = (at / cell).floor().unbind(-1)
    inside = (depth > 0) & (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    cells = (row * columns + column).where(inside, 0).long()
    first = z.gather(1, cells.flatten(1)).view_as(depth)
    common = inside & (depth < first * 1.25) & (z < FAR)
    far_enough = z.median(-1).values > 2 * CLEAR
    share: Tensor = common.float().mean(-1).T
    return share * far_enough[:, None]


def _chosen(share: Tensor, count: int) -> tuple[Tensor, float]:
    """Indices [count] such that each shares its view with one before, and the least it shares.

    The first that shares SHARED is taken, which keeps baselines wide; else the one that has most.
    """
    mutual = torch.minimum(share, share.T).fill_diagonal_(0)
    taken, weakest = [int(mutual.amax(-1).argmax())], 1.0
    while len(taken) < count:
        best = mutual[:, taken].amax(-1).index_fill_(0, torch.tensor(taken), -1)
        enough = (best >= SHARED).nonzero()[:, 0]
        taken.append(int(enough[0] if len(enough) else best.argmax()))
        weakest = min(weakest, float(best[taken[-1]]))
    return torch.tensor(taken), weakest
