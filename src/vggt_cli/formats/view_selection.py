"""Which images COLMAP's dense stereo would match with which, from a sparse model alone.

Source: COLMAP's mvs::Model::GetMaxOverlappingImages, as of pycolmap 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vggt_cli.formats.colmap_rows import Array, Image, Points

MIN_ANGLE = 1.0  # degrees: patch_match_stereo's default min_triangulation_angle
PERCENTILE = 0.75  # of the angles at the points that two images share
ENOUGH_PAIRS = 20_000_000  # of observations; with more, part of the points is looked at first


def without_neighbours(images: Sequence[Image], points: Points) -> list[str]:
    """Names of images that share no points, or only with too small an angle, with any other.

    An image has a neighbour if the 75th percentile of the angles at their shared points is at
    least one degree. Observations of images that do not exist are passed over.
    """
    numbers = np.array([image.number for image in images], np.uint32)
    order = np.argsort(numbers)
    place = np.minimum(np.searchsorted(numbers[order], points.track["image"]), len(images) - 1)
    frame = order[place]
    point = np.repeat(np.arange(len(points.length)), points.length)
    known = numbers[frame] == points.track["image"]
    frame, point = frame[known], point[known]
    centers = _centers(images)

    def alone(rows: Array) -> Array:
        return ~_has_neighbour(frame[rows], point[rows], points.xyz, centers)

    length = np.bincount(point, minlength=len(points.length))
    step = int((length * (length - 1) // 2).sum() // ENOUGH_PAIRS) + 1
    lonely = alone(point % step == 0)
    if step > 1 and lonely.any():  # all the points of the few that found nobody
        touched = np.zeros(len(points.length), bool)
        touched[point[lonely[frame]]] = True
        lonely &= alone(touched[point])
    return [image.name for image, single in zip(images, lonely, strict=True) if single]


def _centers(images: Sequence[Image]) -> Array:
    """[S, 3] of the cameras, in scene units."""
    poses = np.array([image.pose for image in images]).reshape(-1, 7)
    w, u = poses[:, :1], -poses[:, 1:4]  # the inverse rotation
    t = poses[:, 4:]
    norm = (poses[:, :4] ** 2).sum(-1, keepdims=True)
    with np.errstate(all="ignore"):  # poses that are no numbers are a matter of their own
        centers: Array = -(t + 2 * np.cross(u, np.cross(u, t) + w * t) / norm)
    return centers


def _has_neighbour(frame: Array, point: Array, xyz: Array, centers: Array) -> Array:
    """[S] bool from observations [K], which are sorted by point.

    The percentile of a pair is interpolated between two of its angles, and whether they are large
    enough follows from the count of those that are; only where the limit lies between the two
    does it need them: the largest of the small and the smallest of the large.
    """
    S, limit = len(centers), np.deg2rad(MIN_ANGLE)
    shared, small = np.zeros(S * S, np.int64), np.zeros(S * S, np.int64)
    low, high = np.zeros(S * S), np.full(S * S, np.pi)
    with np.errstate(all="ignore"):
        rays = xyz[point] - centers[frame]
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    after = np.searchsorted(point, point, side="right") - np.arange(len(point)) - 1
    first, ahead = np.flatnonzero(after > 0), 1
    while len(first):
        second = first + ahead
        angle = np.arccos(np.abs((rays[first] * rays[second]).sum(-1)).clip(0, 1))
        i, j = frame[first], frame[second]
        pair, less = np.minimum(i, j) * S + np.maximum(i, j), angle < limit
        shared += np.bincount(pair, minlength=S * S)
        small += np.bincount(pair[less], minlength=S * S)
        np.maximum.at(low, pair[less], angle[less])
        np.minimum.at(high, pair[~less], angle[~less])
        ahead += 1
        first = first[after[first] >= ahead]
    rank = PERCENTILE * (shared - 1)
    between = low + (rank - np.floor(rank)) * (high - low)
    wide = (small <= np.floor(rank)) | ((small <= np.ceil(rank)) & (between >= limit))
    pairs = ((shared > 0) & wide).reshape(S, S)
    np.fill_diagonal(pairs, False)
    return np.asarray((pairs | pairs.T).any(0))
