"""What two photos at a time give without any network: SIFT and the essential matrix.

The bar for networks, set high: the true intrinsics are given, and every pair is tried, however few
its matches. Features and robust estimation are pycolmap's; one thread, one seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vggt_cli.formats.colmap import Array, Lens, pycolmap
from vggt_cli.reconstruction.matches import match

FEATURES = 4096  # most in a photo, the largest first
INLIER = 1.0  # pixels; of 1, 2 and 4 the best on rendered scenes
TRIALS = {"confidence": 0.999, "min_num_trials": 100, "max_num_trials": 10_000}


class View(NamedTuple):
    """A photo and the lens that took it, whose pixels may be others."""

    gray: Array  # [h, w] uint8
    lens: Lens


def relative_poses(views: Sequence[View]) -> Tensor:
    """Second camera from first [P, 3, 4], float64, of all pairs i < j; NaN where none was found.

    Translations have length one or nought.
    """
    module = pycolmap()
    options = {"num_threads": 1, "use_gpu": False, "sift": {"max_num_features": FEATURES}}
    extractor = module.FeatureExtractor.create(module.FeatureExtractionOptions(options))
    found = [extractor.extract_from_uint8_array(np.ascontiguousarray(v.gray)) for v in views]
    xy = [np.array([(k.x, k.y) for k in keypoints]).reshape(-1, 2) for keypoints, _ in found]
    vectors = [torch.from_numpy(described.data.astype(np.float32)) for _, described in found]
    cameras = [_camera(module, view) for view in views]
    ransac = module.RANSACOptions(max_error=INLIER, random_seed=0, **TRIALS)
    poses = torch.full((len(views) * (len(views) - 1) // 2, 3, 4), torch.nan, dtype=torch.float64)
    for n, (i, j) in enumerate(itertools.combinations(range(len(views)), 2)):
        first, second = (side.numpy() for side in match(vectors[i], vectors[j]))
        if len(first) < 5:  # an essential matrix has five degrees of freedom
            continue
        places = xy[i][first], xy[j][second]
        result = module.estimate_essential_matrix(*places, cameras[i], cameras[j], ransac)
        if result is not None:
            poses[n] = torch.from_numpy(result["cam2_from_cam1"].matrix())
    return poses


def _camera(module: Any, view: View) -> Any:
    h, w = view.lens.size
    camera = module.Camera.create_from_model_name(1, view.lens.model, 1.0, w, h)
    camera.params = list(view.lens.parameters)
    camera.rescale(view.gray.shape[1], view.gray.shape[0])
    return camera
