"""What VGGT's training minimises: pure functions of a prediction and the truth.

B sequences, S frames, H x W pixels, T tracks, K passes. The truth is normalised first
(`normalize`); predictions never are.
Source: spec vggt section 14, whose released weights are the defaults; VGGT-Omega's are `losses`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.geometry import compose, encode_pose, invert, unproject
from vggt_cli.learning.labels import Labels
from vggt_cli.learning.losses import Truth

LIMIT = 100.0  # of any single error
ALPHA = 0.2  # price of doubt
FEWEST = 100  # valid pixels that a depth, point or camera term needs


def normalize(truth: Truth) -> tuple[Truth, Tensor]:
    """The truth from the first camera, its points at a mean distance of one; and the [B] scale.

    The first extrinsics are [I | 0] only as nearly as the stored rotation is one.
    """
    first = truth.extrinsics[:, :1]
    points = unproject(truth.depth, truth.intrinsics, truth.extrinsics)
    seen = points @ first[:, :, None, :, :3].mT + first[:, :, None, None, :, 3]
    total = (seen.norm(dim=-1) * truth.valid).sum((1, 2, 3))
    scale = (total / (truth.valid.sum((1, 2, 3)) + 1e-3)).clamp(1e-6, 1e6)
    extrinsics = compose(truth.extrinsics, invert(first).expand_as(truth.extrinsics)).clone()
    extrinsics[..., 3] /= scale[:, None, None]
    depth = truth.depth / scale[:, None, None, None]
    return Truth(extrinsics, truth.intrinsics, depth, truth.valid), scale


def camera_parts(passes: Tensor, truth: Truth, decay: float = 0.6) -> dict[str, Tensor]:
    """Translation, rotation and field-of-view error of pose encodings [K, B, S, 9].

    Earlier passes count less, by `decay` each. Sequences whose first frame has hardly a valid
    pixel do not count.
    """
    size = (truth.depth.shape[-2], truth.depth.shape[-1])
    true = encode_pose(truth.extrinsics, truth.intrinsics, size)
    counts = truth.valid[:, 0].sum((-1, -2)) > FEWEST
    error = bounded((passes - true).abs())[:, counts]
    if not counts.any():
        error = torch.zeros_like(passes[:, :1])
    # No choice of sign between q and -q: the truth has w >= 0, and the network learns that too.
    translation, rotation, lens = error.split_with_sizes([3, 4, 2], -1)
    return {
        "translation": _over_passes(translation, decay),
        "rotation": _over_passes(rotation, decay),
        "field of view": _over_passes(lens, decay),
    }


def camera_sum(parts: dict[str, Tensor]) -> Tensor:
    """The camera loss of its parts."""
    return parts["translation"] + parts["rotation"] + 0.5 * parts["field of view"]


def _over_passes(error: Tensor, decay: float) -> Tensor:
    """Mean of the passes' mean errors [K, ...], the last at full weight."""
    K = len(error)
    weight = decay ** torch.arange(K - 1, -1, -1).to(error)
    return (error.flatten(1).mean(1) * weight).sum() / K


def bounded(error: Tensor) -> Tensor:
    """The error with what is not finite at zero and the rest cut at the limit."""
    return error.nan_to_num(0, 0, 0).clamp(-LIMIT, LIMIT)


def depth_parts(depth: Tensor, confidence: Tensor, truth: Truth) -> dict[str, Tensor]:
    """Regression, confidence and gradient error of depth and confidence [B, S, H, W]."""
    if int(truth.valid.sum()) < FEWEST:
        return _nothing(depth)
    difference = (depth - truth.depth)[..., None]
    parts = _error_parts(difference, confidence, truth.valid)
    return {**parts, "gradient": gradient_loss(difference, truth.valid)}


def point_parts(
    points: Tensor, confidence: Tensor, true: Tensor, valid: Tensor
) -> dict[str, Tensor]:
    """Regression, confidence and normal error of points [B, S, H, W, 3] against the true ones."""
    if int(valid.sum()) < FEWEST:
        return _nothing(points)
    parts = _error_parts(points - true, confidence, valid)
    return {**parts, "gradient": normal_loss(points, true, valid)}


def _nothing(like: Tensor) -> dict[str, Tensor]:
    return {name: like.new_zeros(()) for name in ("regression", "confidence", "gradient")}


def _error_parts(difference: Tensor, confidence: Tensor, valid: Tensor) -> dict[str, Tensor]:
    error, doubt = errors(difference, confidence, valid)
    return {"regression": usual(error).mean(), "confidence": usual(doubt).mean()}


def errors(difference: Tensor, confidence: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Of valid pixels: the length of the difference [..., C], and the same under its confidence."""
    error = bounded(difference[valid].norm(dim=-1))
    return error, bounded(weighed(error, confidence[valid]))


def weighed(error: Tensor, confidence: Tensor) -> Tensor:
    """The error times its confidence, less the price of doubt: the aleatoric loss."""
    return error * confidence - ALPHA * confidence.log()


def usual(values: Tensor, share: float = 0.98, fewest: int = 1000) -> Tensor:
    """The values [n] below their `share` quantile; all of them where few would be left."""
    n = len(values)
    if n <= fewest:
        return values
    values = values.clamp(max=LIMIT)
    threshold = values.detach().kthvalue(round(share * (n - 1)) + 1).values
    below = values < threshold
    return values[below] if int(below.sum()) > fewest else values


def gradient_loss(
    difference: Tensor, valid: Tensor, confidence: Tensor | None = None, scales: int = 4
) -> Tensor:
    """Mean jump of the difference [B, S, H, W, C] between neighbours, at steps 1, 2, 4, 8.

    confidence: [B, S, H, W] of the right or lower pixel weighs each jump, in every channel and
    where it is not valid too, as in the paper; None: it does not, as in the released training.
    """
    total = difference.new_zeros(())
    for step in (2**k for k in range(scales)):
        d, v = difference[..., ::step, ::step, :], valid[..., ::step, ::step, None]
        count = v.sum() * d.shape[-1]
        if int(count) == 0:
            continue
        d = torch.where(v, d, 0)
        for axis in (-2, -3):
            there = _after(v, axis) & _before(v, axis)
            jump = d.diff(dim=axis).abs().clamp(max=LIMIT) * there
            if confidence is not None:
                sure = _after(confidence[..., ::step, ::step, None], axis)
                jump = weighed(jump, sure.expand_as(jump))
            total = total + jump.sum() / count
    return total / scales


def _after(x: Tensor, axis: int) -> Tensor:
    return x.narrow(axis, 1, x.shape[axis] - 1)


def _before(x: Tensor, axis: int) -> Tensor:
    return x.narrow(axis, 0, x.shape[axis] - 1)


def normal_loss(
    points: Tensor,
    true: Tensor,
    valid: Tensor,
    confidence: Tensor | None = None,
    scales: int = 3,
) -> Tensor:
    """Mean of 1 - cosine between normals of points [B, S, H, W, 3] and true ones, steps 1, 2, 4.

    confidence: [B, S, H, W] of the pixel weighs its normals, or None as in `gradient_loss`.
    """
    total = points.new_zeros(())
    for step in (2**k for k in range(scales)):
        found, expected, there = (x[:, :, ::step, ::step] for x in (points, true, valid))
        inside = _corners_valid(there)
        if int(inside.sum()) < 10:
            continue
        cosine = (_corner_normals(found)[inside] * _corner_normals(expected)[inside]).sum(-1)
        error = 1 - cosine.clamp(-1 + 1e-8, 1 - 1e-8)
        if confidence is not None:
            sure = confidence[:, :, ::step, ::step].expand_as(inside)
            error = weighed(error, sure[inside])
        total = total + error.mean()
    return total / scales


def _around(x: Tensor) -> list[Tensor]:
    """Upper, left, lower and right neighbours of x [B, S, H, W, C]; zeros outside."""
    p = F.pad(x, (0, 0, 1, 1, 1, 1))
    return [p[:, :, :-2, 1:-1], p[:, :, 1:-1, :-2], p[:, :, 2:, 1:-1], p[:, :, 1:-1, 2:]]


def _corner_normals(points: Tensor) -> Tensor:
    """[4, B, S, H, W, 3] unit normals by each pair of a pixel's adjoining neighbours."""
    ways = [neighbour - points for neighbour in _around(points)]
    crosses = [torch.linalg.cross(ways[k], ways[(k + 1) % 4]) for k in range(4)]
    return F.normalize(torch.stack(crosses), dim=-1, eps=1e-8)


def _corners_valid(valid: Tensor) -> Tensor:
    """[4, B, S, H, W]: where a pixel and both neighbours of the pair are valid."""
    near = [x[..., 0] for x in _around(valid[..., None])]
    return torch.stack([valid & near[k] & near[(k + 1) % 4] for k in range(4)])


def track_parts(
    xy: Tensor,  # [K, B, S, T, 2] pixels after each iteration
    visibility: Tensor,  # [B, S, T] in [0, 1]
    confidence: Tensor,  # [B, S, T] in [0, 1]
    labels: Labels,
    decay: float = 0.8,
) -> dict[str, Tensor]:
    """Place, visibility and confidence error of tracks that are seen in frame 0.

    Sure is right where the last place is within 3 pixels of the true one. The release has this
    loss as a comment only.
    """
    followed = labels.seen[:, :1].expand_as(labels.seen)
    if not followed.any():
        return {name: xy.new_zeros(()) for name in ("place", "visibility", "sureness")}
    near = (xy[-1].detach() - labels.xy).norm(dim=-1) < 3
    seen = labels.seen & followed
    off = (xy - labels.xy).abs()[:, seen] if int(seen.sum()) > 2 else torch.zeros_like(xy)
    visible, sure = (
        F.binary_cross_entropy(p[followed], target[followed].to(p))
        for p, target in ((visibility, labels.seen), (confidence, near))
    )
    return {"place": _over_passes(off, decay), "visibility": visible, "sureness": sure}
