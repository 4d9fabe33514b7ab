"""One world onto another by the cameras that both hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cli.geometry import compose, invert


@dataclass(frozen=True, eq=False)
class Similarity:
    """x -> scale * rotation x + translation, from world to world."""

    scale: float
    rotation: Tensor  # [3, 3] float64
    translation: Tensor  # [3] float64, units of the target

    def points(self, xyz: Tensor) -> Tensor:
        """Points [..., 3] in the target world."""
        return self.scale * xyz @ self.rotation.T + self.translation

    def cameras(self, extrinsics: Tensor) -> Tensor:
        """Extrinsics [..., 3, 4] in the target world; depths are `scale` times as large."""
        rotation = extrinsics[..., :3] @ self.rotation.T
        translation = self.scale * extrinsics[..., 3] - rotation @ self.translation
        return torch.cat([rotation, translation[..., None]], -1)


def centers(extrinsics: Tensor) -> Tensor:
    """[S, 3] optical centres of extrinsics [S, 3, 4]."""
    return invert(extrinsics)[..., 3]


def fit_cameras(source: Tensor, target: Tensor) -> Similarity:
    """The similarity that maps the cameras `source` [S, 3, 4] onto `target` [S, 3, 4], robustly.

    The turn comes from the cameras' axes, so that cameras on a line, which leave a turn about it
    open, and single ones will do; the scale is the median over pairs, the shift over cameras.
    """
    source, target = source.double(), target.double()
    rotation = _mean_rotation(target[:, :, :3].mT @ source[:, :, :3])
    a, b = centers(source), centers(target)
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
