"""How good predicted points are by the protocols of ETH3D's point maps and of DTU.

Accuracy is the mean distance from predicted to true points, completeness the mean distance back,
overall the mean of both; smaller is better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from torch import Tensor

from vggt_cli.errors import GeometryError, InputError
from vggt_cli.formats.colmap import Array
from vggt_cli.formats.points import read_ply
from vggt_cli.geometry import align_cameras, fit_similarity, unproject
from vggt_cli.learning.metrics import nearest_distances
from vggt_cli.scene import Cameras, Prediction

# (prediction, true cameras, true depth [S, H, W], where that is known) in the network's pixels.
Score = Callable[[Prediction, Cameras, Tensor, Tensor], dict[str, float]]

LEAST_SURE = 0.2  # of all predicted pixels: left out of clouds, as `vggt reconstruct` does
SPACING = 0.2  # mm between points of a prediction, of DTU's evaluation
FARTHEST = 20.0  # mm; larger distances are outliers to DTU's evaluation and do not count


def of_pixels(
    prediction: Prediction, cameras: Cameras, depth: Tensor, valid: Tensor
) -> dict[str, float]:
    """Figures of the points of all pixels with true depth, in units of the truth.

    Aligned by the similarity that brings each pixel's point closest to its true one.
    No figures where that is not defined. Source: spec vggt section 13 (ETH3D point maps).
    """
    if not valid.any():
        return {}
    ours = _world(prediction.depth, prediction.cameras)[valid]
    theirs = _world(depth, cameras)[valid]
    try:
        similarity = fit_similarity(ours, theirs, torch.ones(len(ours)))
    except GeometryError:
        return {}
    ours = similarity(ours)
    return _figures(nearest_distances(ours, theirs), nearest_distances(theirs, ours))


@dataclass(frozen=True)
class DtuScan:
    """The scanned surface of a scene of DTU, and where it counts; millimetres."""

    root: Path
    scan: int

    def __call__(
        self, prediction: Prediction, cameras: Cameras, depth: Tensor, valid: Tensor
    ) -> dict[str, float]:
        """Figures of the surer pixels' points, aligned by the cameras' centres; no ICP.

        No figures where the cameras cannot be aligned.
        """
        try:
            similarity = align_cameras(prediction.cameras, cameras)
        except GeometryError:
            return {}
        confidence = prediction.confidence.flatten()
        least = confidence.kthvalue(1 + int(LEAST_SURE * len(confidence))).values
        points = _world(prediction.depth, prediction.cameras)[prediction.confidence >= least]
        return self.figures(similarity(points))

    def figures(self, points: Tensor) -> dict[str, float]:
        """Figures of points [N, 3] in DTU's world, by its evaluation: points are thinned out to
        0.2 mm (by a grid), those outside the observability mask and true ones below the table's
        plane do not count, distances above 20 mm neither.

        Raises InputError for files that are missing or not DTU's.
        """
        folder = self.root / "ObsMask"
        mask = _mat(folder / f"ObsMask{self.scan}_10.mat", ("ObsMask", "BB", "Res"))
        plane = torch.from_numpy(_mat(folder / f"Plane{self.scan}.mat", ("P",))[0]).double().ravel()
        true = read_ply(self.root / "Points" / "stl" / f"stl{self.scan:03d}_total.ply")
        points = _thinned(points.double())
        observed = points[_observed(points, *mask)]
        above = true[true @ plane[:3] + plane[3] > 0]
        if not len(observed) or not len(above):
            return {}
        there, back = nearest_distances(observed, true), nearest_distances(above, points)
        there, back = there[there < FARTHEST], back[back < FARTHEST]
        return _figures(there, back) if len(there) and len(back) else {}


def _figures(there: Tensor, back: Tensor) -> dict[str, float]:
    accuracy, completeness = float(there.mean()), float(back.mean())
    overall = (accuracy + completeness) / 2
    return {"accuracy": accuracy, "completeness": completeness, "overall": overall}


def _world(depth: Tensor, cameras: Cameras) -> Tensor:
    """Points [S, H, W, 3] float64."""
    return unproject(depth.double(), cameras.intrinsics.double(), cameras.extrinsics.double())


def _thinned(points: Tensor) -> Tensor:
    """One point of each cube of SPACING."""
    cubes = (points / SPACING).floor().long().numpy()
    _, first = np.unique(cubes, axis=0, return_index=True)
    return points[torch.from_numpy(np.sort(first))]


def _observed(points: Tensor, mask: Array, box: Array, step: Array) -> Tensor:
    """Which points lie in voxels of the mask [X, Y, Z]; its first voxel is at box[0]."""
    corner = torch.from_numpy(box.astype(np.float64)).reshape(2, 3)[0]
    voxel = ((points - corner) / float(step.squeeze())).round().long()
    shape = torch.tensor(mask.shape)
    inside = ((voxel >= 0) & (voxel < shape)).all(-1)
    x, y, z = voxel.clamp(min=0).minimum(shape - 1).unbind(-1)
    return inside & torch.from_numpy(mask.astype(bool))[x, y, z]


def _mat(path: Path, names: tuple[str, ...]) -> list[Array]:
    try:
        found = loadmat(path)
        return [np.asarray(found[name]) for name in names]
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"not a file of DTU's evaluation: {path} ({error})") from error
