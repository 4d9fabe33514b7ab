"""One world onto another by the cameras that both hold."""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_cli.geometry import compose, invert
from vggt_cli.scene import Similarity


def fit_cameras(source: Tensor, target: Tensor) -> Similarity:
    """The similarity that maps the cameras `source` [S, 3, 4] onto `target` [S, 3, 4], robustly.

    The turn comes from the cameras' axes, so that cameras on a line, which leave a turn about it
    open, and single ones will do; the scale is the median over pairs, the shift over cameras.
    """
    source, target = source.double(), target.double()
    rotation = _mean_rotation(target[:, :, :3].mT @ source[:, :, :3])
    a, b = invert(source)[..., 3], invert(target)[..., 3]
    i, j = torch.triu_indices(len(a), len(a), 1)
    before, after = (a[i] - a[j]).norm(dim=-1), (b[i] - b[j]).norm(dim=-1)
    apart = (before > 1e-9 * before.sum()) & (after > 0)
    scale = float((after[apart] / before[apart]).quantile(0.5)) if apart.any() else 1.0
    shift = (b - scale * a @ rotation.T).quantile(0.5, dim=0)
    return Similarity(scale, rotation, shift)


def _mean_rotation(rotations: Tensor) -> Tensor:
    """[3, 3] the rotation with the least sum of chordal distances to `rotations` [S, 3, 3].

    Source: Weiszfeld's algorithm, as in Hartley, Aftab and Trumpf, CVPR 2011.
    """
    flat = rotations.flatten(1)
    mean = rotations[torch.cdist(flat, flat).sum(1).argmin()]
    for _ in range(20):
        weight = 1 / (rotations - mean).flatten(1).norm(dim=1).clamp(min=1e-9)
        u, _, vh = torch.linalg.svd((weight[:, None, None] * rotations).sum(0))
        sign = torch.ones(3, dtype=torch.float64)
        sign[2] = torch.linalg.det(u @ vh)
        mean = u @ torch.diag(sign) @ vh
    return mean


def hold_first(extrinsics: Tensor, first: Tensor) -> Tensor:
    """The cameras [S, 3, 4] moved rigidly so that the first is exactly `first` [3, 4]."""
    there_from_here = compose(invert(first), extrinsics[0])
    moved = compose(extrinsics, invert(there_from_here).expand_as(extrinsics))
    moved[0] = first
    return moved
