"""Depth maps into one cloud: which pixels to trust, one point for all that agree, a budget.

Works frame by frame, so that memory grows with the points that are kept and not with the frames.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sized
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.errors import GeometryError
from vggt_cli.geometry import keep_points, project, unproject
from vggt_cli.scene import ImageSet, PointCloud, Prediction, Tracks

log = logging.getLogger(__name__)

AGREEMENT = 0.02  # of the point's depth: within it a pixel's own depth joins the point
SEEN_THROUGH = 0.10  # a pixel this much deeper than the point speaks against it
DEPTH_EDGE = 0.03  # of the depth, within 3 x 3 pixels (spec vggt_omega section 8)
AT_ONCE = 32  # frames
IN_CACHE = 2**15  # points worked on at a time: they stay in the cache, of one thread of torch
SAMPLED = 20_000_000  # values of confidence for a percentile; of fewer all
USUAL_OF = 200  # frames that tell how rough depth usually is; of fewer all
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
    confident = confident_pixels(prediction, images, options)
    seeds = _thin_out(_candidates(prediction, images, confident, options), options.points)
    return _observe(seeds, prediction, images, confident) if observe else seeds.cloud


def confident_pixels(prediction: Prediction, images: ImageSet, options: FuseOptions) -> Tensor:
    """[S, H, W] bool: valid, with usable depth, above the percentile of confidence.

    Raises GeometryError if there is none.
    """
    usable = torch.empty(prediction.depth.shape, dtype=torch.bool)
    for some in _chunks(prediction):
        depth, confidence = prediction.depth[some], prediction.confidence[some]
        usable[some] = images.valid[some] & depth.isfinite() & (depth > 0) & confidence.isfinite()
    step = usable.numel() // SAMPLED | 1  # odd: no column is left out
    of_usable = prediction.confidence.flatten()[::step][usable.flatten()[::step]]
    if len(of_usable) == 0:
        valid = int(images.valid.sum())
        finite = prediction.confidence[prediction.confidence.isfinite()]
        span = f"{finite.min():.3g} to {finite.max():.3g}" if len(finite) else "nowhere finite"
        raise GeometryError(
            f"no pixel has a usable depth: 0 of {valid} valid pixels, confidence {span}",
            hint="are the images empty or fully transparent? do the weights fit the network?",
        )
    rank = min(int(len(of_usable) * options.confidence / 100), len(of_usable) - 1)
    threshold = of_usable.kthvalue(rank + 1).values
    for some in _chunks(prediction):
        usable[some] &= prediction.confidence[some] >= threshold
    return usable


def _chunks(frames: Sized) -> Iterator[slice]:
    """AT_ONCE frames after the other: thousands may lie on disk."""
    for start in range(0, len(frames), AT_ONCE):
        yield slice(start, start + AT_ONCE)


def depth_edges(depth: Tensor, valid: Tensor) -> Tensor:
    """[S, H, W] bool: pixels between a near and a far surface, which belong to neither.

    There the depth [S, H, W] varies within 3 x 3 pixels by more than 3 % of itself, and by more
    than three times what is usual among the `valid` pixels: a rough depth map is no reason to
    drop all of it.
    """
    some = slice(None, None, -(-len(depth) // USUAL_OF))
    limit = max(DEPTH_EDGE, 3 * float(_varies(depth[some])[valid[some]].median()))
    edges = torch.empty(depth.shape, dtype=torch.bool)
    for some in _chunks(depth):
        edges[some] = _varies(depth[some]) > limit
    return edges


def _varies(depth: Tensor) -> Tensor:
    """[S, H, W] how much depth [S, H, W] differs within 3 x 3 pixels, of itself."""
    depth = depth.float()
    padded = F.pad(depth[:, None], (1, 1, 1, 1), mode="replicate")
    largest, smallest = F.max_pool2d(padded, 3, 1), -F.max_pool2d(-padded, 3, 1)
    return (largest - smallest)[:, 0] / depth


def surface_normals(points: Tensor, center: Tensor) -> Tensor:
    """[H, W, 3] unit normals of a point map [H, W, 3], towards the camera at `center` [3]."""
    across = torch.gradient(points, dim=1)[0] if points.shape[1] > 1 else torch.ones_like(points)
    down = torch.gradient(points, dim=0)[0] if points.shape[0] > 1 else torch.ones_like(points)
    normals = torch.linalg.cross(across, down)
    to_camera = center - points
    normals = torch.where((normals * to_camera).sum(-1, keepdim=True) < 0, -normals, normals)
    flat = normals.norm(dim=-1, keepdim=True) < 1e-20
    return F.normalize(torch.where(flat, to_camera, normals), dim=-1, eps=1e-30)


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
    prediction: Prediction, images: ImageSet, confident: Tensor, options: FuseOptions
) -> _Seeds:
    """Seeds at trusted pixels of all frames, at most about CANDIDATES for each point allowed."""
    trusted = depth_edges(prediction.depth, confident).logical_not_().logical_and_(confident)
    share = CANDIDATES * options.points / int(trusted.sum())
    random = torch.Generator().manual_seed(options.seed)
    parts = []
    for frame in range(len(prediction)):
        pixel = trusted[frame].flatten().nonzero()[:, 0]
        if share < 1:
            pixel = pixel[torch.rand(len(pixel), generator=random) < share]
        parts.append(_seeds_of_frame(prediction, images, frame, pixel))
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


def _thin_out(seeds: _Seeds, budget: int) -> _Seeds:
    """The surest seed of each voxel, with voxels just large enough to keep the budget."""
    order = seeds.cloud.confidence.argsort(descending=True, stable=True)
    xyz, level = seeds.cloud.xyz[order], seeds.footprint[order].log2().round()
    low, high = 1.0, 1.0  # voxel edges in footprints
    kept = _first_of_voxel(xyz, level, high)
    while len(kept) > budget:
        low, high = high, high * max(1.1, (len(kept) / budget) ** 0.5)
        kept = _first_of_voxel(xyz, level, high)
    for _ in range(4 if high > 1 else 0):
        middle = (low + high) / 2
        chosen = _first_of_voxel(xyz, level, middle)
        low, high = (low, middle) if len(chosen) <= budget else (middle, high)
        kept = chosen if len(chosen) <= budget else kept
    return seeds[order[kept]]


def _first_of_voxel(xyz: Tensor, level: Tensor, edge_in_footprints: float) -> Tensor:
    """Indices, ascending, of the first seed in each voxel.

    level: [N] float32 logarithm of the seeds' footprints to the base of 2, whole: the edge follows
    the size of a pixel at the point in steps of two, so that near surfaces keep their detail and
    the background does not eat the budget.
    """
    key = torch.empty(len(xyz), dtype=torch.int64)
    for start in range(0, len(xyz), IN_CACHE):
        some = slice(start, start + IN_CACHE)
        edge = (edge_in_footprints * torch.exp2(level[some])).double()
        # Odd multipliers, wrapping in 64 bits: two voxels sharing a key is as good as impossible.
        keys = level[some].long()
        for axis in range(3):
            cell = (xyz[some, axis].double() / edge).floor().long()
            keys = keys.mul_(0x9E3779B97F4A7C1).add_(cell.mul_(0x2545F4914F6CDD1D))
            keys = keys ^ (keys >> 29)
        key[some] = keys
    ordered, index = key.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return index[first].sort().values


@dataclass(frozen=True, eq=False)
class _Sighting:
    """What one frame says about the points that project into it."""

    point: Tensor  # [M] int64
    pixel: Tensor  # [M] int64 flat index of the pixel that each projects to
    agrees: Tensor  # [M] bool
    sees_through: Tensor  # [M] bool


def _sightings(xyz: Tensor, prediction: Prediction, confident: Tensor) -> Iterator[_Sighting]:
    """For each frame in turn, its word on the points [N, 3]."""
    cameras = prediction.cameras
    H, W = prediction.depth.shape[1:]
    for frame in range(len(prediction)):
        xy, z = project(xyz[None], cameras.intrinsics[frame], cameras.extrinsics[frame])
        xy, z = xy[0], z[0]
        inside = (z > 0) & (xy >= 0).all(-1) & (xy[:, 0] < W) & (xy[:, 1] < H)
        point = inside.nonzero()[:, 0]
        column, row = xy[point].long().unbind(-1)
        pixel = row * W + column
        sure = confident[frame].flatten()[pixel]
        relative = prediction.depth[frame].flatten()[pixel] / z[point] - 1
        yield _Sighting(
            point, pixel, sure & (relative.abs() <= AGREEMENT), sure & (relative > SEEN_THROUGH)
        )


def _observe(
    seeds: _Seeds, prediction: Prediction, images: ImageSet, confident: Tensor
) -> PointCloud:
    """The seeds moved to the mean of the pixels that see them, with these as observations."""
    n = len(seeds.cloud)
    joined: list[tuple[Tensor, Tensor]] = []  # per frame: points, and the pixel that joins each
    against = torch.zeros(n, dtype=torch.int32)
    total, weight = torch.zeros(n, 3, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for frame, seen in enumerate(_sightings(seeds.cloud.xyz, prediction, confident)):
        point, pixel = _with_own_pixels(seen, seeds, frame)
        against[seen.point] += seen.sees_through.int()
        confidence = prediction.confidence[frame].flatten()[pixel].double()
        points = _points_of_frame(prediction, frame).flatten(0, 1)
        total[point] += confidence[:, None] * points[pixel].double()
        weight[point] += confidence
        joined.append((point, pixel))
    xyz = (total / weight[:, None]).float()
    tracks = _tracks(xyz, joined, prediction, images)
    for_it = torch.bincount(tracks.point, minlength=n)
    kept = (for_it > 0) & (against <= for_it)
    if not kept.any():  # the frames contradict each other everywhere: rough points, not none
        kept = for_it > 0
    log.debug("points that other frames look through, dropped: %d of %d", int((~kept).sum()), n)
    cloud = _select(replace(seeds.cloud, xyz=xyz), kept)
    return replace(cloud, observations=keep_points(tracks, kept))


def _with_own_pixels(seen: _Sighting, seeds: _Seeds, frame: int) -> tuple[Tensor, Tensor]:
    """Points and pixels that agree in `frame`; a seed's own pixel always does.

    Projecting a seed back may round into the neighbouring pixel.
    """
    own = (seeds.frame == frame).nonzero()[:, 0]
    foreign = seen.agrees & (seeds.frame[seen.point] != frame)
    point = torch.cat([seen.point[foreign], own])
    return point, torch.cat([seen.pixel[foreign], seeds.pixel[own]])


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
