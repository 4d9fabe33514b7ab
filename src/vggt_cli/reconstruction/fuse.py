"""Depth maps into one cloud: one point for all pixels that agree, within a budget.

Works frame by frame, so that memory grows with the points that are kept and not with the frames.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vggt_cli.device import one_thread_each
from vggt_cli.formats import room
from vggt_cli.geometry import keep_points, project, surface_normals, unproject
from vggt_cli.reconstruction.trust import confident_pixels, marked
from vggt_cli.scene import ImageSet, PointCloud, Prediction, Tracks

log = logging.getLogger(__name__)

AGREEMENT = 0.02  # of the point's depth: within it a pixel's own depth joins the point
SEEN_THROUGH = 0.10  # a pixel this much deeper than the point speaks against it
AHEAD = 8  # frames that threads work on before the next
IN_CACHE = 2**15  # points worked on at a time: they stay in the cache, of one thread of torch
CANDIDATES = 4  # pixels looked at for each point of the budget


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
        seeds = _candidates(prediction, images, marks, options, pool)
        seeds = _thin_out(seeds, options.points, pool)
        return _observe(seeds, prediction, images, marks, pool) if observe else seeds.cloud


@dataclass(frozen=True, eq=False)
class _Seeds:
    """Points that start at one pixel each."""

    cloud: PointCloud
    footprint: Tensor  # [N] size of the pixel at the point, scene units
    frame: Tensor  # [N] int64
    pixel: Tensor  # [N] int64 flat index

    def __getitem__(self, chosen: Tensor) -> _Seeds:
        return _Seeds(
            _select(self.cloud, chosen),
            self.footprint[chosen],
            self.frame[chosen],
            self.pixel[chosen],
        )


def _select(cloud: PointCloud, chosen: Tensor) -> PointCloud:
    return PointCloud(
        cloud.xyz[chosen], cloud.normals[chosen], cloud.rgb[chosen], cloud.confidence[chosen]
    )


def _candidates(
    prediction: Prediction,
    images: ImageSet,
    marks: Tensor,
    options: FuseOptions,
    pool: ThreadPoolExecutor,
) -> _Seeds:
    """Seeds at trusted pixels of all frames, at most about CANDIDATES for each point allowed."""
    trusted = sum(int((marks[some] == 2).sum()) for some in room.chunks(prediction))
    share = CANDIDATES * options.points / trusted
    random = torch.Generator().manual_seed(options.seed)

    def chosen(frame: int) -> Tensor:
        pixel = (marks[frame] == 2).flatten().nonzero()[:, 0]
        return pixel[torch.rand(len(pixel), generator=random) < share] if share < 1 else pixel

    parts: list[_Seeds] = []
    for some in room.chunks(prediction, AHEAD):
        frames = range(some.start, some.stop)
        pixels = [chosen(frame) for frame in frames]  # in order: random numbers are
        parts += pool.map(partial(_seeds_of_frame, prediction, images), frames, pixels)
    clouds = [part.cloud for part in parts]
    return _Seeds(
        PointCloud(
            torch.cat([cloud.xyz for cloud in clouds]),
            torch.cat([cloud.normals for cloud in clouds]),
            torch.cat([cloud.rgb for cloud in clouds]),
            torch.cat([cloud.confidence for cloud in clouds]),
        ),
        torch.cat([part.footprint for part in parts]),
        torch.cat([part.frame for part in parts]),
        torch.cat([part.pixel for part in parts]),
    )


def _seeds_of_frame(prediction: Prediction, images: ImageSet, frame: int, pixel: Tensor) -> _Seeds:
    cameras, depth = prediction.cameras, prediction.depth[frame].float()
    points = _points_of_frame(prediction, frame)
    normals = surface_normals(points, cameras.centers[frame])
    rgb = (images.pixels[frame].flatten(1).T[pixel] * 255).round().to(torch.uint8)
    confidence = prediction.confidence[frame].flatten()[pixel]
    return _Seeds(
        PointCloud(points.flatten(0, 1)[pixel], normals.flatten(0, 1)[pixel], rgb, confidence),
        depth.flatten()[pixel] / cameras.intrinsics[frame, 0, 0],
        torch.full_like(pixel, frame),
        pixel,
    )


def _thin_out(seeds: _Seeds, budget: int, pool: ThreadPoolExecutor) -> _Seeds:
    """The surest seed of each voxel, with voxels just large enough to keep the budget."""
    order = seeds.cloud.confidence.argsort(descending=True, stable=True)
    xyz, level = seeds.cloud.xyz[order], seeds.footprint[order].log2().round()
    keep = partial(_first_of_voxel, xyz, level, pool)
    low, high = 1.0, 1.0  # voxel edges in footprints
    kept = keep(high)
    while (count := int(kept.sum())) > budget:
        low, high = high, high * max(1.1, (count / budget) ** 0.5)
        kept = keep(high)
    for _ in range(4 if high > 1 else 0):
        middle = (low + high) / 2
        chosen = keep(middle)
        fits = int(chosen.sum()) <= budget
        low, high = (low, middle) if fits else (middle, high)
        kept = chosen if fits else kept
    return seeds[order[kept]]


def _first_of_voxel(
    xyz: Tensor, level: Tensor, pool: ThreadPoolExecutor, edge_in_footprints: float
) -> Tensor:
    """[N] bool: the first seed in each voxel.

    level: [N] float32 logarithm of the seeds' footprints to the base of 2, whole: the edge follows
    the size of a pixel at the point in steps of two, so that near surfaces keep their detail and
    the background does not eat the budget.
    """
    key = torch.empty(len(xyz), dtype=torch.int64)

    def fill(start: int) -> None:
        some = slice(start, start + IN_CACHE)
        edge = (edge_in_footprints * torch.exp2(level[some])).double()
        # Odd multipliers, wrapping in 64 bits: two voxels sharing a key is as good as impossible.
        keys = level[some].long()
        for axis in range(3):
            cell = (xyz[some, axis].double() / edge).floor().long()
            keys = keys.mul_(0x9E3779B97F4A7C1).add_(cell.mul_(0x2545F4914F6CDD1D))
            keys = keys ^ (keys >> 29)
        key[some] = keys

    list(pool.map(fill, range(0, len(xyz), IN_CACHE)))
    ordered, index = key.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    result = torch.zeros_like(first)
    result[index[first]] = True
    return result


@dataclass(frozen=True, eq=False)
class _Sighting:
    """What one frame says about the points."""

    point: Tensor  # [M] int64 that pixels join
    pixel: Tensor  # [M] int64 flat index of the pixel that joins each
    xyz: Tensor  # [M, 3] float64 of these pixels
    confidence: Tensor  # [M] float64
    against: Tensor  # int64 points that the frame looks through


def _sighting(
    seeds: _Seeds, prediction: Prediction, marks: Tensor, frame: int, own: Tensor
) -> _Sighting:
    """own: [n] int64 the seeds of the frame, each of which its own pixel joins in any case.

    Projecting a seed back may round into the neighbouring pixel.
    """
    xyz = seeds.cloud.xyz
    parts = [_seen(part, prediction, frame) for part in xyz.split(IN_CACHE)]
    starts = range(0, len(xyz), IN_CACHE)
    point = torch.cat([part[0] + start for part, start in zip(parts, starts, strict=True)])
    pixel, z = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    sure = (marks[frame].flatten()[pixel] > 0).nonzero()[:, 0]
    point, pixel, z = point[sure], pixel[sure], z[sure]
    relative = prediction.depth[frame].flatten()[pixel] / z - 1
    joins = (relative.abs() <= AGREEMENT) & (seeds.frame[point] != frame)
    against = point[relative > SEEN_THROUGH]
    point, pixel = torch.cat([point[joins], own]), torch.cat([pixel[joins], seeds.pixel[own]])
    confidence = prediction.confidence[frame].flatten()[pixel].double()
    places = _points_of_frame(prediction, frame).flatten(0, 1)[pixel].double()
    return _Sighting(point, pixel, places, confidence, against)


def _seen(xyz: Tensor, prediction: Prediction, frame: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the points [N, 3] project into a frame, to which pixels, and their z-depth."""
    H, W = prediction.depth.shape[1:]
    cameras = prediction.cameras
    xy, z = project(xyz[None], cameras.intrinsics[frame], cameras.extrinsics[frame])
    x, y = xy[0].unbind(-1)
    inside = (z[0] > 0) & (x >= 0) & (y >= 0) & (x < W) & (y < H)
    point = inside.nonzero()[:, 0]
    return point, y[point].long() * W + x[point].long(), z[0, point]


def _observe(
    seeds: _Seeds,
    prediction: Prediction,
    images: ImageSet,
    marks: Tensor,
    pool: ThreadPoolExecutor,
) -> PointCloud:
    """The seeds moved to the mean of the pixels that see them, with these as observations."""
    n = len(seeds.cloud)
    counts = torch.bincount(seeds.frame, minlength=len(prediction))
    own = seeds.frame.argsort(stable=True).split(counts.tolist())
    joined: list[tuple[Tensor, Tensor]] = []  # per frame: points, and the pixel that joins each
    against = torch.zeros(n, dtype=torch.int32)
    total, weight = torch.zeros(n, 3, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    look = partial(_sighting, seeds, prediction, marks)
    for some in room.chunks(prediction, AHEAD):
        for seen in pool.map(look, range(some.start, some.stop), own[some]):
            against[seen.against] += 1
            total[seen.point] += seen.confidence[:, None] * seen.xyz
            weight[seen.point] += seen.confidence
            joined.append((seen.point, seen.pixel))
    xyz = (total / weight[:, None]).float()
    tracks = _tracks(xyz, joined, prediction, images)
    for_it = torch.bincount(tracks.point, minlength=n)
    kept = (for_it > 0) & (against <= for_it)
    if not kept.any():  # the frames contradict each other everywhere: rough points, not none
        kept = for_it > 0
    log.debug("points that other frames look through, dropped: %d of %d", int((~kept).sum()), n)
    cloud = _select(replace(seeds.cloud, xyz=xyz), kept)
    return replace(cloud, observations=keep_points(tracks, kept))


def _points_of_frame(prediction: Prediction, frame: int) -> Tensor:  # [H, W, 3]
    cameras, depth = prediction.cameras, prediction.depth[frame].float()
    return unproject(depth, cameras.intrinsics[frame], cameras.extrinsics[frame])


def _tracks(
    xyz: Tensor,
    joined: list[tuple[Tensor, Tensor]],
    prediction: Prediction,
    images: ImageSet,
) -> Tracks:
    """The joined pixels that agree with the moved points `xyz` too, as source pixels."""
    W = prediction.depth.shape[2]
    points, frames, places = [], [], []
    for frame, (point, pixel) in enumerate(joined):
        intrinsics = prediction.cameras.intrinsics[frame]
        at, z = project(xyz[None, point], intrinsics, prediction.cameras.extrinsics[frame])
        center = torch.stack([pixel % W, pixel // W], -1) + 0.5
        relative = prediction.depth[frame].flatten()[pixel] / z[0] - 1
        agrees = (relative.abs() <= AGREEMENT) & ((at[0] - center).abs() <= 1).all(-1)
        points.append(point[agrees])
        frames.append(torch.full((int(agrees.sum()),), frame, dtype=torch.int32))
        to_source = images.source_from_network[frame]
        scale, shift = torch.diagonal(to_source)[:2], to_source[:2, 2]
        places.append((center[agrees].double() * scale + shift).float())
    order = torch.cat(points).argsort(stable=True)
    return Tracks(xyz, torch.cat(points)[order], torch.cat(frames)[order], torch.cat(places)[order])
