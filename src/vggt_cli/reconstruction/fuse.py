"""Depth maps into one cloud: one point for all pixels that agree, within a budget.

Works frame by frame, so that memory grows with the points that are kept and not with the frames.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.device import one_thread_each
from vggt_cli.formats import room
from vggt_cli.geometry import pixel_centers, surface_normals, unproject
from vggt_cli.reconstruction.trust import confident_pixels, marked
from vggt_cli.scene import ImageSet, PointCloud, Prediction, Tracks

log = logging.getLogger(__name__)
Found = TypeVar("Found")

AGREEMENT = 0.02  # of the point's depth: within it a pixel's own depth joins the point
SEEN_THROUGH = 0.10  # a pixel this much deeper than the point speaks against it
AHEAD = 8  # frames that threads work on before the next
IN_CACHE = 2**15  # points worked on at a time: they stay in the cache, of one thread of torch
BLOCK = 2**10  # points that a frame looks at, or not, together
CANDIDATES = 4  # pixels looked at for each point of the budget
COUNTED = 2**15  # voxels of a budget that are counted to find their edge; of fewer all
UNSURE = 2**24 - 1  # bits of a key, of confidence to 1 in 65,536: they order a voxel's seeds
FACTORS = torch.tensor(  # odd, without pattern
    [[0x9E3779B97F4A7C1], [0x2545F4914F6CDD1D], [0x5851F42D4C957F2D], [0x369DEA0F31A53F85]]
)


@dataclass(frozen=True)
class FuseOptions:
    """What becomes a point."""

    points: int = 200_000  # at most
    confidence: float = 20.0  # percent of the valid pixels, the least sure, that are dropped
    seed: int = 0  # which pixels are looked at where there are far more than points


def fuse(
    prediction: Prediction, images: ImageSet, options: FuseOptions, observe: bool = True
) -> PointCloud:
    """The points of `prediction` in its world, at most `options.points`.

    A point starts at a trusted pixel, one per voxel of about a pixel's footprint (more where the
    budget is small). With `observe`, every pixel that sees it joins it: at most one per frame, the
    one it projects to, where that pixel's own depth is within 2 % of the point's and its confidence
    suffices. The point is their mean, weighted by confidence, and they are its observations.
    Points that more frames look through than see are dropped.
    Raises GeometryError, with the distribution of confidence, if no pixel can be trusted.
    """
    marks = marked(prediction, confident_pixels(prediction, images, options.confidence))
    with one_thread_each() as pool:
        torch.set_num_threads(1)  # here too, in steps as small, until the pool's end
        seeds = _thin_out(_candidates(prediction, marks, options, pool), options.points, pool)
        cloud = _cloud(seeds, prediction, images, pool)
        return _observe(seeds, cloud, prediction, images, marks, pool) if observe else cloud


@dataclass(frozen=True, eq=False)
class _Seeds:
    """Points that start at one pixel each, in the order of frames and pixels."""

    xyz: Tensor  # [3, N] float32
    confidence: Tensor  # [N] float32
    footprint: Tensor  # [N] size of the pixel at the point, scene units
    frame: Tensor  # [N] int32
    pixel: Tensor  # [N] int64 flat index

    def __getitem__(self, chosen: Tensor) -> _Seeds:
        return _Seeds(*(values.index_select(-1, chosen) for values in vars(self).values()))


def _candidates(
    prediction: Prediction, marks: Tensor, options: FuseOptions, pool: ThreadPoolExecutor
) -> _Seeds:
    """Seeds at trusted pixels of all frames, at most about CANDIDATES for each point allowed."""
    trusted = sum(int((marks[some] == 2).sum()) for some in room.chunks(prediction))
    share = CANDIDATES * options.points / trusted

    def look(frame: int) -> _Seeds:
        random, pixel = torch.Generator(), _where(marks[frame] == 2)
        chance = torch.rand(len(pixel), generator=random.manual_seed(options.seed + frame))
        pixel = pixel.index_select(0, _where(chance < share))
        xyz, z = _places(prediction, frame, pixel)
        return _Seeds(
            xyz,
            prediction.confidence[frame].flatten().index_select(0, pixel).float(),
            z / prediction.cameras.intrinsics[frame, 0, 0],
            torch.full_like(pixel, frame, dtype=torch.int32),
            pixel,
        )

    parts = [vars(part).values() for part in _of_frames(pool, look, prediction)]
    return _Seeds(*(torch.cat(values, -1) for values in zip(*parts, strict=True)))


def _of_frames(
    pool: ThreadPoolExecutor, look: Callable[..., Found], prediction: Prediction, *of: Sequence[Any]
) -> Iterator[Found]:
    """`look` at each frame in order, called with its number and what `of` holds for it."""
    for some in room.chunks(prediction, AHEAD):
        yield from pool.map(look, range(some.start, some.stop), *(each[some] for each in of))


def _thin_out(seeds: _Seeds, budget: int, pool: ThreadPoolExecutor) -> _Seeds:
    """The surest seed of each voxel, with voxels just large enough to keep the budget.

    Their edge is found by counting some of them. The few percent that are over the budget then are
    dropped by their keys, which is as good as by chance.
    """
    every = max(1, budget // COUNTED)
    edge, slope = 1.0, -2.0  # in footprints; of the logarithm of the count: a surface's

    def over() -> float:
        some = key[key < 2**64 // every - 2**63 - 1] & ~UNSURE
        return math.log(max(1, len(some.unique())) * every / budget)

    key = _keys(seeds, edge, pool)
    excess = over()
    for _ in range(6 if excess > 0 else 0):
        step = -excess / slope
        edge *= math.exp(step)
        key, before = _keys(seeds, edge, pool), excess
        excess = over()
        if abs(excess) < 0.02:
            break
        slope = min(max((excess - before) / step, -3.0), -1.0)
    ordered, index = key.sort(stable=True)
    voxel, first = ordered & ~UNSURE, torch.ones(len(key), dtype=torch.bool)
    first[1:] = voxel[1:] != voxel[:-1]
    return seeds[index[first][:budget].sort().values]


def _keys(seeds: _Seeds, edge: float, pool: ThreadPoolExecutor) -> Tensor:
    """[N] int64: seeds in one voxel differ in the bits UNSURE alone, where the surest has least.

    edge: of voxels in footprints. It follows them in steps of two, so that near surfaces keep
    their detail and the background does not eat the budget.
    """
    key = torch.empty(len(seeds.pixel), dtype=torch.int64)

    def fill(start: int) -> None:
        some = slice(start, start + IN_CACHE)
        level = seeds.footprint[some].log2().round_()
        cells = (seeds.xyz[:, some] * torch.exp2(-level).div_(edge)).floor_()
        # Wrapping in 64 bits. Of millions of voxels one or two share the upper 40: a point is lost.
        voxel = (torch.cat([level[None], cells]).long() * FACTORS).sum(0)
        voxel = (voxel ^ (voxel >> 32)) * FACTORS[0]
        unsure = UNSURE - (seeds.confidence[some].view(torch.int32) >> 7)
        key[some] = (voxel & ~UNSURE) | unsure

    list(pool.map(fill, range(0, len(key), IN_CACHE)))
    return key


def _cloud(
    seeds: _Seeds, prediction: Prediction, images: ImageSet, pool: ThreadPoolExecutor
) -> PointCloud:
    """The seeds with what is known of their pixels."""

    def look(frame: int, own: Tensor) -> tuple[Tensor, Tensor]:
        cameras, depth = prediction.cameras, prediction.depth[frame].float()
        points = unproject(depth, cameras.intrinsics[frame], cameras.extrinsics[frame])
        normals = surface_normals(points, cameras.centers[frame]).flatten(0, 1)
        pixel = seeds.pixel.index_select(0, own)
        rgb = images.pixels[frame].flatten(1).index_select(1, pixel).T
        return normals.index_select(0, pixel), (rgb * 255).round().to(torch.uint8)

    parts = _of_frames(pool, look, prediction, _own(seeds, prediction))
    normals, rgb = map(torch.cat, zip(*parts, strict=True))
    return PointCloud(seeds.xyz.T.contiguous(), normals, rgb, seeds.confidence)


@dataclass(frozen=True, eq=False)
class _Sighting:
    """What one frame says about the points."""

    point: Tensor  # [M] int64 that pixels join
    pixel: Tensor  # [M] int64 flat index of the pixel that joins each
    place: Tensor  # [4, M] float64 x, y, z of these pixels times their confidence, and that
    against: Tensor  # int64 points that the frame looks through


def _observe(
    seeds: _Seeds,
    cloud: PointCloud,
    prediction: Prediction,
    images: ImageSet,
    marks: Tensor,
    pool: ThreadPoolExecutor,
) -> PointCloud:
    """The points moved to the mean of the pixels that see them, with these as observations."""
    n = len(cloud)
    look = partial(_sighting, _in_blocks(seeds.xyz), seeds, prediction, marks)
    joined: list[tuple[Tensor, Tensor]] = []  # per frame: points, and the pixel that joins each
    against, for_it = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int64)
    total = torch.zeros(4, n, dtype=torch.float64)
    for seen in _of_frames(pool, look, prediction, _own(seeds, prediction)):
        against[seen.against] += 1
        total.scatter_add_(1, seen.point.expand(4, -1), seen.place)
        joined.append((seen.point, seen.pixel))
    xyz = (total[:3] / total[3]).float()
    centers = pixel_centers(images.size, xyz).flatten(0, 1)
    check = partial(_agreeing, xyz, centers.T.contiguous(), prediction)
    for frame, agreed in enumerate(_of_frames(pool, check, prediction, joined)):
        joined[frame] = agreed
        for_it.scatter_add_(0, agreed[0], torch.ones_like(agreed[0]))
    kept = (for_it > 0) & (against <= for_it)
    if not kept.any():  # the frames contradict each other everywhere: rough points, not none
        kept = for_it > 0
    log.debug("points that other frames look through, dropped: %d of %d", int((~kept).sum()), n)
    tracks = _tracks(xyz.T[kept], joined, torch.where(kept, for_it, 0), images)
    normals, rgb, sure = (x[kept] for x in (cloud.normals, cloud.rgb, cloud.confidence))
    return PointCloud(tracks.xyz, normals, rgb, sure, tracks)


def _in_blocks(xyz: Tensor) -> tuple[Tensor, Tensor]:
    """Points [3, N] in blocks [3, b, BLOCK], filled up by NaN; corners [3, b, 8] of their boxes."""
    blocks = F.pad(xyz, (0, -xyz.shape[1] % BLOCK), value=torch.nan).view(3, -1, BLOCK)
    ends = blocks.nan_to_num(torch.inf).amin(-1), blocks.nan_to_num(-torch.inf).amax(-1)
    x, y, z = zip(*ends, strict=True)
    return blocks, torch.stack([torch.stack(ends) for ends in itertools.product(x, y, z)], -1)


def _sighting(
    blocks: tuple[Tensor, Tensor],
    seeds: _Seeds,
    prediction: Prediction,
    marks: Tensor,
    frame: int,
    own: Tensor,
) -> _Sighting:
    """`own`, seeds of the frame, are joined by their pixels: projected they may round beside."""
    point, pixel, z = _seen(blocks, prediction, frame)
    sure = torch.where(marks[frame] > 0, prediction.depth[frame].float(), torch.nan)
    relative = sure.flatten().index_select(0, pixel) / z - 1
    against = point[relative > SEEN_THROUGH]
    joins = _where((relative.abs() <= AGREEMENT) & (seeds.frame.index_select(0, point) != frame))
    point = torch.cat([point.index_select(0, joins), own])
    pixel = torch.cat([pixel.index_select(0, joins), seeds.pixel.index_select(0, own)])
    confidence = prediction.confidence[frame].flatten().index_select(0, pixel).float()[None]
    xyz, _ = _places(prediction, frame, pixel)
    place = torch.cat([xyz * confidence, confidence]).double()
    return _Sighting(point, pixel, place, against)


def _seen(
    blocks: tuple[Tensor, Tensor], prediction: Prediction, frame: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the points project into a frame, to which pixels, and their z-depth."""
    H, W = prediction.depth.shape[1:]
    u, v, z = _pinhole(blocks[1], prediction, frame)
    # A box is out of the frame if its corners are all beyond one side, here a pixel further out.
    sides = torch.stack([z, u + z, v + z, (W + 1) * z - u, (H + 1) * z - v])
    near = _where((sides > 0).any(-1).all(0))
    found = []
    for some in near.split(IN_CACHE // BLOCK):  # of no block one empty part
        u, v, z = _pinhole(blocks[0].index_select(1, some), prediction, frame).flatten(1)
        x, y = u / z, v / z
        inside = _where((z > 0) & (x >= 0) & (y >= 0) & (x < W) & (y < H))
        x, y, z = (values.index_select(0, inside) for values in (x, y, z))
        point = (some[:, None] * BLOCK + torch.arange(BLOCK)).flatten().index_select(0, inside)
        found.append([point, y.long() * W + x.long(), z])
    point, pixel, z = map(torch.cat, zip(*found, strict=True))
    return point, pixel, z


def _pinhole(xyz: Tensor, prediction: Prediction, frame: int) -> Tensor:
    """[3, ...] x z, y z and z of the pixels (x, y) and z-depth of points [3, ...]."""
    matrix = _matrix(prediction, frame).float()
    return torch.addmm(matrix[:, 3:], matrix[:, :3], xyz.flatten(1)).view(xyz.shape)


def _agreeing(
    xyz: Tensor, centers: Tensor, prediction: Prediction, frame: int, joined: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Those of the joined points and pixels (`centers` [2, H W]) that agree with `xyz` [3, N]."""
    point, pixel = joined
    u, v, z = _pinhole(xyz.index_select(1, point), prediction, frame)
    x, y = centers.index_select(1, pixel)
    relative = prediction.depth[frame].flatten().index_select(0, pixel) / z - 1
    near = ((u / z - x).abs() <= 1) & ((v / z - y).abs() <= 1)
    agrees = _where(near & (relative.abs() <= AGREEMENT))
    return point.index_select(0, agrees), pixel.index_select(0, agrees)


def _tracks(
    xyz: Tensor, joined: list[tuple[Tensor, Tensor]], lengths: Tensor, images: ImageSet
) -> Tracks:
    """Tracks of the points `xyz` [n, 3], those of all whose `lengths` [N] are not 0."""
    free = lengths.cumsum(0) - lengths  # [N] where the next observation of each point goes
    centers = pixel_centers(images.size, xyz).double().flatten(0, 1)
    frames = torch.empty(int(lengths.sum()), dtype=torch.int32)
    xy = torch.empty(len(frames), 2)
    for frame, (point, pixel) in enumerate(joined):
        left = _where(lengths.index_select(0, point) > 0)
        point, pixel = point.index_select(0, left), pixel.index_select(0, left)
        to_source = images.source_from_network[frame]
        scale, shift = torch.diagonal(to_source)[:2], to_source[:2, 2]
        source = (centers * scale + shift).float().index_select(0, pixel)
        place = free.index_select(0, point)
        frames.index_fill_(0, place, frame)
        # Complex, as one number a pixel goes to its place ten times as fast as a row of two.
        torch.view_as_complex(xy).scatter_(0, place, torch.view_as_complex(source))
        free.scatter_(0, point, place + 1)  # a frame has but one pixel for a point
    point = torch.repeat_interleave(torch.arange(len(xyz)), lengths[lengths > 0])
    return Tracks(xyz, point, frames, xy)


def _own(seeds: _Seeds, prediction: Prediction) -> tuple[Tensor, ...]:
    """The numbers of each frame's seeds."""
    counts = torch.bincount(seeds.frame, minlength=len(prediction)).tolist()
    return torch.split(torch.arange(len(seeds.frame)), counts)


def _places(prediction: Prediction, frame: int, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """World points [3, n] of pixels [n] of a frame, and their z-depth [n]."""
    z = prediction.depth[frame].flatten().index_select(0, pixel).float()
    W = prediction.depth.shape[2]
    x, y = pixel % W + 0.5, pixel // W + 0.5
    turn, shift = _matrix(prediction, frame).split([3, 1], 1)
    back = turn.inverse()
    return torch.addmm((-back @ shift).float(), back.float(), torch.stack([x * z, y * z, z])), z


def _matrix(prediction: Prediction, frame: int) -> Tensor:
    """[3, 4] float64 x z, y z, z of pixels (x, y) and z-depth from world points."""
    cameras = prediction.cameras
    return cameras.intrinsics[frame].double() @ cameras.extrinsics[frame].double()


def _where(mask: Tensor) -> Tensor:
    """[n] int64 flat indices where `mask` is true; NumPy's take a fifth of the time of torch's."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
