"""How good a prediction is: pure functions. Angles in degrees out, radians nowhere."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from vggt_cli.geometry import compose, invert


def relative_poses(extrinsics: Tensor) -> Tensor:
    """Second camera from first [P, 3, 4], float64, of all pairs i < j of extrinsics [S, 3, 4]."""
    i, j = torch.triu_indices(len(extrinsics), len(extrinsics), 1)
    double = extrinsics.double()
    return compose(double[j], invert(double[i]))


def relative_pose_errors(extrinsics: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation and translation-direction errors in degrees of all pairs i < j of [S, 3, 4]."""
    return pair_errors(relative_poses(extrinsics), relative_poses(true))


def pair_errors(pairs: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation and translation-direction errors in degrees of relative poses [P, 3, 4], float64.

    Directions are folded: an opposite one counts as equal, at most 90 degrees. A pair whose true
    centres coincide has no direction, its error is 0; with predicted ones it is 90. A pair that
    was not solved (NaN) counts as wrong as can be: 180 and 90.
    Source: spec vggt section 13, vggt_omega section 15.
    """
    turn = pairs[..., :3] @ true[..., :3].mT
    cosine = (torch.diagonal(turn, dim1=-2, dim2=-1).sum(-1) - 1) / 2
    sine = (turn - turn.mT).norm(dim=(-2, -1)) / 8**0.5
    t, t_true = pairs[..., 3], true[..., 3]
    across, along = torch.linalg.cross(t, t_true).norm(dim=-1), (t * t_true).sum(-1).abs()
    direction = torch.atan2(across, along)  # acos would lose the small angles
    direction = torch.where(t.norm(dim=-1) < 1e-9, torch.pi / 2, direction)
    direction = torch.where(t_true.norm(dim=-1) < 1e-9, 0.0, direction)
    rotation, direction = torch.rad2deg(torch.atan2(sine, cosine)), torch.rad2deg(direction)
    return rotation.nan_to_num(180.0), direction.nan_to_num(90.0)


def auc(rotation: Tensor, direction: Tensor, degrees: int) -> float:
    """Area under the curve of pairs within k degrees in both errors, k = 1..degrees, in percent."""
    worst = torch.maximum(rotation, direction)
    within = [(worst < k).double().mean() for k in range(1, degrees + 1)]
    return float(100 * torch.stack(within).mean())


def depth_errors(depth: Tensor, true: Tensor, valid: Tensor) -> tuple[float, float]:
    """Mean relative error and share within a factor of 1.25, after aligning the medians.

    One factor for the whole set of frames [S, H, W]: relative scale between them counts.
    """
    d, t = depth[valid].double(), true[valid].double()
    d = d * (t.median() / d.median())
    ratio = torch.maximum(d / t, t / d)
    return float(((d - t).abs() / t).mean()), float((ratio < 1.25).double().mean())


def field_of_view_error(intrinsics: Tensor, true: Tensor, width: int) -> float:
    """Mean absolute error in degrees of the horizontal field of view of [S, 3, 3]."""
    angles = [
        2 * torch.rad2deg(torch.atan(width / 2 / k[:, 0, 0].double())) for k in (intrinsics, true)
    ]
    return float((angles[0] - angles[1]).abs().mean())


def rms(values: Tensor) -> float:
    """Root of the mean square of [N]; of distances of aligned centres it is the ATE."""
    return float(values.double().square().mean().sqrt())


def extent(centers: Tensor) -> float:
    """Root mean square distance of centres [S, 3] from their mean: how far a trajectory goes."""
    return rms((centers.double() - centers.double().mean(0)).norm(dim=-1))


def focal_errors(intrinsics: Tensor, true: Tensor) -> Tensor:
    """Relative errors [S] of the focal lengths of [S, 3, 3]: geometric means of both axes."""
    focal, wanted = (torch.diagonal(k.double(), dim1=-2, dim2=-1) for k in (intrinsics, true))
    ratio = (focal[:, 0] * focal[:, 1] / (wanted[:, 0] * wanted[:, 1])).sqrt()
    return (ratio - 1).abs()


def nearest_distances(points: Tensor, others: Tensor) -> Tensor:
    """Distance [N], float64, from each of points [N, 3] to the nearest of others [M, 3]."""
    # Compact nodes are slow among copies of a point, as from one camera that stands still.
    tree = cKDTree(others.numpy(), compact_nodes=False, balanced_tree=False)
    distance, _ = tree.query(points.numpy())
    return torch.from_numpy(np.asarray(distance, np.float64))
