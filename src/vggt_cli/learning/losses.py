"""What training minimises: pure functions of a prediction and the truth.

B sequences, S frames, H x W pixels, N patches. The truth is normalised first (`normalize`).
Source: spec vggt_omega section 15, whose weights are the defaults; the matching term is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from vggt_cli.geometry import compose, decode_pose, encode_pose, invert, unproject

# (rows, columns) of the four corners of all cells of 2 x 2 pixels, going round: the neighbours of
# corner k are k - 1 and k - 3.
_LOW, _HIGH = slice(None, -1), slice(1, None)
_CORNERS = ((_LOW, _LOW), (_LOW, _HIGH), (_HIGH, _HIGH), (_HIGH, _LOW))

FEWEST = 100  # valid pixels of a batch, or of a sequence, that say nothing yet
START = ((0, 0),) * 4  # where subsampling starts at each step of the gradient term


class Truth(NamedTuple):
    """What a batch of sequences really looks like."""

    extrinsics: Tensor  # [B, S, 3, 4]
    intrinsics: Tensor  # [B, S, 3, 3] pixels
    depth: Tensor  # [B, S, H, W]
    valid: Tensor  # [B, S, H, W] bool


def normalize(truth: Truth) -> tuple[Truth, Tensor]:
    """The truth from the first camera, its points at a mean distance of one; and the [B] scale."""
    first = truth.extrinsics[:, :1]
    extrinsics = compose(truth.extrinsics, invert(first).expand_as(truth.extrinsics)).clone()
    extrinsics[:, 0] = torch.eye(3, 4).to(extrinsics)
    distance = unproject(truth.depth, truth.intrinsics, extrinsics).norm(dim=-1)
    count = truth.valid.sum((1, 2, 3))
    scale = (distance * truth.valid).sum((1, 2, 3)) / count.clamp(min=1)
    usable = (count > FEWEST) & (scale > 1e-6) & scale.isfinite()
    scale = torch.where(usable, scale, torch.ones_like(scale))
    extrinsics[..., 3] /= scale[:, None, None]
    depth = truth.depth / scale[:, None, None, None]
    return Truth(extrinsics, truth.intrinsics, depth, truth.valid), scale


def camera_parts(encoding: Tensor, truth: Truth) -> dict[str, Tensor]:
    """Translation, rotation, field of view and pairwise error of pose encodings [B, S, 9]."""
    size = (truth.depth.shape[-2], truth.depth.shape[-1])
    true = encode_pose(truth.extrinsics, truth.intrinsics, size)
    length = true[..., :3].norm(dim=-1).mean(1).clamp(0.25, 4)[:, None, None]
    translation = (encoding[..., :3] - true[..., :3]).abs() / length
    q, q_true = encoding[..., 3:7], true[..., 3:7]
    nearer = (q - q_true).abs().sum(-1) <= (q + q_true).abs().sum(-1)
    q_true = torch.where(nearer[..., None], q_true, -q_true)
    cosine = F.cosine_similarity(q, q_true, dim=-1).abs()
    rotation = (q - q_true).abs() + 0.1 * (1 - cosine[..., None])
    return {
        "translation": translation.clamp(max=128).mean(),
        "rotation": rotation.mean(),
        "field of view": (encoding[..., 7:] - true[..., 7:]).abs().mean(),
        "pairs": _pairs(decode_pose(encoding, size)[0], truth.extrinsics),
    }


def camera_loss(encoding: Tensor, truth: Truth) -> Tensor:
    """2 translation + rotation + field of view + pairs."""
    return camera_sum(camera_parts(encoding, truth))


def camera_sum(parts: dict[str, Tensor]) -> Tensor:
    """The camera loss of its parts."""
    return 2 * parts["translation"] + parts["rotation"] + parts["field of view"] + parts["pairs"]


def _pairs(extrinsics: Tensor, true: Tensor) -> Tensor:
    """Error of all relative poses i < j of extrinsics [B, S, 3, 4]."""
    i, j = torch.triu_indices(extrinsics.shape[1], extrinsics.shape[1], 1)
    a, b = (compose(e[:, j], invert(e[:, i])) for e in (extrinsics, true))
    rotation = (a[..., :3] - b[..., :3]).square().sum((-1, -2)).mean()
    t, t_true = a[..., 3], b[..., 3]
    u, v = (F.pad(x, (0, 1), value=1.0) for x in (t, t_true))
    turned = torch.log1p((u.norm(dim=-1) * v.norm(dim=-1) - (u * v).sum(-1)).clamp(min=0))
    return rotation + (t - t_true).abs().mean() + 2 * turned.mean()


def depth_parts(depth: Tensor, confidence: Tensor, truth: Truth) -> dict[str, Tensor]:
    """Regression, confidence and gradient error of depth and confidence [B, S, H, W]."""
    valid = truth.valid
    error = (depth - truth.depth).abs() * (1 + 0.2 * _nearness(truth))
    error = _clipped(error, depth > truth.depth, 100.0)[valid]
    doubt = (error * confidence[valid] - 0.2 * confidence[valid].log()).clamp(max=100)
    return {
        "regression": error.mean(),
        "confidence": doubt.mean(),
        "gradient": gradient_loss(depth, truth),
    }


def depth_loss(
    depth: Tensor,
    confidence: Tensor,
    truth: Truth,
    exact: Tensor | None = None,
    offsets: Sequence[tuple[int, int]] = START,
    fewest: int = 4096,
) -> Tensor:
    """Regression + confidence + gradient + a tenth of the normals' error.

    exact: [B] bool, the sequences whose truth is exact at depth edges, as rendered depth is and
    scanned is not: gradient and normals are theirs only. None: all. Zero with few valid pixels.
    """
    if int(truth.valid.sum()) <= FEWEST:
        return depth.new_zeros(())
    parts = depth_parts(depth, confidence, truth)
    total = parts["regression"] + parts["confidence"]
    if exact is not None:
        truth = of_sequences(truth, exact)
    return total + gradient_loss(depth, truth, offsets, fewest) + 0.1 * normal_loss(depth, truth)


def of_sequences(truth: Truth, counts: Tensor) -> Truth:
    """The truth with valid pixels only in the sequences that a [B] bool picks."""
    return truth._replace(valid=truth.valid & counts[:, None, None, None])


def _nearness(truth: Truth) -> Tensor:
    """Weight of near pixels: the inverse of depth, which is kept above a tenth of the mean."""
    valid = truth.valid.to(truth.depth)
    mean = (truth.depth * valid).mean((-1, -2), keepdim=True)
    mean = mean / (valid.mean((-1, -2), keepdim=True) + 1e-7)
    return (1 / (torch.maximum(truth.depth, 0.1 * mean) + 1e-6)).clamp(0.1, 10)


def _clipped(error: Tensor, too_far: Tensor, limit: float) -> Tensor:
    """The error cut at `limit`, with its gradient kept where the prediction is too far."""
    cut = error.clamp(max=limit)
    return torch.where((error > limit) & too_far, error + (cut - error).detach(), cut)


def gradient_loss(
    depth: Tensor,
    truth: Truth,
    offsets: Sequence[tuple[int, int]] = START,
    fewest: int = 4096,
) -> Tensor:
    """Mean difference of neighbouring depth errors at steps 1, 2, 4, 8, the coarser weighted less.

    offsets: the pixel (x, y) where subsampling starts at each step; training draws them.
    """
    total = depth.new_zeros(())
    for k, offset in enumerate(offsets):
        enough = max(fewest // 2, 64) if k else fewest
        total = total + gradient_at(depth, truth, 2**k, offset, enough) / 2**k
    return total / (sum(2.0**-k for k in range(len(offsets))) + 1e-6)


def random_offsets(random: Generator) -> list[tuple[int, int]]:
    """A pixel (x, y) of the first cell of each step of the gradient term."""
    drawn = [torch.randint(2**k, (2,), generator=random).tolist() for k in range(len(START))]
    return [(x, y) for x, y in drawn]


def gradient_at(
    depth: Tensor, truth: Truth, step: int, offset: tuple[int, int], fewest: int
) -> Tensor:
    """The gradient term at one step from the pixel (x, y) = offset on; 0 with few valid pairs."""
    rows, columns = slice(offset[1], None, step), slice(offset[0], None, step)
    valid = truth.valid[..., rows, columns]
    error = torch.where(valid, (depth - truth.depth)[..., rows, columns], 0)
    across, down = error.diff(dim=-1).abs(), error.diff(dim=-2).abs()
    across_valid = valid[..., 1:] & valid[..., :-1]
    down_valid = valid[..., 1:, :] & valid[..., :-1, :]
    pairs = across_valid.sum() + down_valid.sum()
    if int(pairs) < fewest:
        return depth.new_zeros(())
    total = (across.clamp(max=100) * across_valid).sum() + (down.clamp(max=100) * down_valid).sum()
    return total / pairs


def normal_loss(depth: Tensor, truth: Truth, fewest: int = 100) -> Tensor:
    """Mean Huber error, in radians, of the normals at the corners of all 2 x 2 cells of pixels.

    Corners at depth edges of the truth do not count; 0 with few others.
    """
    valid = truth.valid & ~depth_edges(truth)
    found, true = (_corner_normals(d, truth.intrinsics) for d in (depth, truth.depth))
    corner = [valid[..., rows, columns] for rows, columns in _CORNERS]
    inside = torch.stack([corner[k] & corner[k - 1] & corner[k - 3] for k in range(4)])
    if int(inside.sum()) < fewest:
        return depth.new_zeros(())
    a, b = found[inside], true[inside]
    angle = torch.atan2(torch.linalg.cross(a, b).norm(dim=-1) + 1e-12, (a * b).sum(-1))
    degree = math.pi / 180
    angle = angle.clamp(degree, 90 * degree)
    return F.smooth_l1_loss(angle, torch.zeros_like(angle), beta=3 * degree) / (1 + 1e-6)


def depth_edges(truth: Truth) -> Tensor:
    """[B, S, H, W]: where the true depth of the 3 x 3 pixels around differs by more than 3 %."""
    flat, valid = truth.depth.flatten(0, 1), truth.valid.flatten(0, 1)
    far = F.max_pool2d(torch.where(valid, flat, -torch.inf), 3, 1, 1)
    near = -F.max_pool2d(torch.where(valid, -flat, -torch.inf), 3, 1, 1)
    edges: Tensor = (far - near) / flat > 0.03
    return edges.view_as(truth.depth)


def _corner_normals(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """[4, B, S, H - 1, W - 1, 3] normals, not of unit length, at each corner of the cells."""
    still = torch.eye(3, 4).to(depth).expand(*intrinsics.shape[:-2], 3, 4)
    points = unproject(depth, intrinsics, still)
    p = [points[..., rows, columns, :] for rows, columns in _CORNERS]
    return torch.stack([torch.linalg.cross(p[k - 3] - p[k], p[k - 1] - p[k]) for k in range(4)])


def predicted_points(depth: Tensor, encoding: Tensor, truth: Truth, progress: float) -> Tensor:
    """World points [B, S, H, W, 3] of predicted depth [B, S, H, W] and poses [B, S, 9].

    progress: share of training done. Until 60 % the lenses are the true ones, then the predicted
    ones; the principal point, which poses do not have, always is the true one.
    """
    size = (depth.shape[-2], depth.shape[-1])
    extrinsics, lenses = decode_pose(encoding, size)
    if progress < 0.6:
        return unproject(depth, truth.intrinsics, extrinsics)
    lenses = torch.cat([lenses[..., :2], truth.intrinsics[..., 2:]], -1)
    return unproject(depth, lenses, extrinsics)


def point_loss(points: Tensor, truth: Truth) -> Tensor:
    """Mean error of world points [B, S, H, W, 3], near ones weighted more; 0 with few valid."""
    if int(truth.valid.sum()) <= FEWEST:
        return points.new_zeros(())
    true = unproject(truth.depth, truth.intrinsics, truth.extrinsics)
    error = (points - true).abs() * (1 + 0.2 * _nearness(truth))[..., None]
    return error[truth.valid].clamp(max=100).mean()


def track_loss(points: Tensor, truth: Truth, xy: Tensor, seen: Tensor, fewest: int = 100) -> Tensor:
    """Mean error of the way from a track's point in frame 0 to its point in each other frame.

    points: [B, S, H, W, 3] world; xy: [B, S, T, 2] pixels of the tracks; seen: [B, S, T] bool.
    """
    H, W = truth.depth.shape[-2:]
    column, row = xy.floor().long().unbind(-1)
    pixel = row.clamp(0, H - 1) * W + column.clamp(0, W - 1)  # [B, S, T]
    true = unproject(truth.depth, truth.intrinsics, truth.extrinsics)
    drift = (points - true).flatten(2, 3).gather(2, pixel[..., None].expand(*pixel.shape, 3))
    good = seen & truth.valid.flatten(2).gather(2, pixel)
    both = good[:, :1] & good[:, 1:]
    if int(both.sum()) < fewest:
        return points.new_zeros(())
    return (drift[:, :1] - drift[:, 1:]).abs()[both].clamp(max=1000).mean()


def patch_points(truth: Truth, patch: int) -> tuple[Tensor, Tensor]:
    """True world points [B, S, h, w, 3] at the middle of each patch, and where they are valid."""
    h, w = truth.depth.shape[-2] // patch, truth.depth.shape[-1] // patch
    middle = (..., slice(patch // 2, h * patch, patch), slice(patch // 2, w * patch, patch))
    points = unproject(truth.depth, truth.intrinsics, truth.extrinsics)
    return points[..., middle[1], middle[2], :], truth.valid[middle]
