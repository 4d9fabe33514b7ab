"""How good a network is on scenes with known cameras, beside a constant prediction and SIFT."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.errors import InputError
from vggt_cli.formats import images as photos
from vggt_cli.formats.colmap import Lens
from vggt_cli.geometry import resize
from vggt_cli.learning import metrics, sift, synthetic
from vggt_cli.learning.datasets import PhotoScene
from vggt_cli.learning.sift import View
from vggt_cli.models import store
from vggt_cli.models.networks import Network
from vggt_cli.reconstruction.predict import predict
from vggt_cli.scene import Cameras, ImageSet, Prediction, Shaping

log = logging.getLogger(__name__)

Row = dict[str, float | str]
Predict = Callable[[ImageSet], Prediction]

MEAN_FIELD_OF_VIEW = math.radians(65)  # of the longer side in training
LARGEST_VIEW = 1024  # pixels of a photo's longer side that SIFT sees
LUMA = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True, eq=False)
class Case:
    """A set of photos with its truth in the network's pixels."""

    images: ImageSet
    cameras: Cameras
    depth: Tensor  # [S, H, W]
    valid: Tensor  # [S, H, W] bool, where depth is known
    views: Callable[[], Sequence[View]]  # what SIFT sees


def evaluate(
    network: Network,
    listed: Mapping[str, Any] | None = None,
    with_sift: bool = False,
    shaping: Shaping | None = None,
) -> list[Row]:
    """Rows of figures on rendered scenes for each number of frames.

    listed: seeds, frames, size and spread of the scenes; None: the held-out ones, which
    stand in weights/heldout.json and were fixed before any training. shaping: that of the network's
    weights, to which the scenes are brought as photos are; None: they stay as large as rendered.
    """
    if listed is None:
        folder = store.bundled()
        assert folder is not None  # it comes with the tool
        listed = json.loads((folder / "heldout.json").read_text())
    rows = []
    for frames in listed["frames"]:
        path = synthetic.Path(frames, tuple(listed["size"]), listed["spread"])
        cases = [_rendered(seed, path, shaping) for seed in listed["seeds"]]
        log.info("%d rendered scenes of %d frames", len(cases), frames)
        rows += _rows(network, "rendered", cases, with_sift)
    return rows


def evaluate_photos(
    network: Network, shaping: Shaping, scenes: Sequence[PhotoScene], with_sift: bool = False
) -> list[Row]:
    """Rows of figures on all photos of each scene together.

    shaping: that of the network's weights. Raises InputError for a single photo, and for photos
    that cannot be read or are not of their camera's size.
    """
    for scene in scenes:
        if len(scene) < 2:
            raise InputError(f"a single photo has no relative pose: {scene.folder}")
    rows = []
    for scene in scenes:
        log.info("%s: %d photos", scene.folder, len(scene))
        case = _photographed(scene, shaping)
        rows += _rows(network, scene.folder.resolve().name, [case], with_sift)
    return rows


def constant(images: ImageSet) -> Prediction:
    """The same camera for every frame, at the mean field of view, before a wall."""
    S, (H, W) = len(images), images.size
    focal = max(H, W) / 2 / math.tan(MEAN_FIELD_OF_VIEW / 2)
    k = torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]]).repeat(S, 1, 1)
    cameras = Cameras(torch.eye(3, 4).repeat(S, 1, 1), k, torch.tensor([[H, W]]).repeat(S, 1))
    return Prediction(cameras, torch.ones(S, H, W), torch.ones(S, H, W))


def as_photos(sample: synthetic.Sample, seed: int) -> ImageSet:
    """The frames of a sample as a camera records them; the same for the same seed."""
    pixels = synthetic.photographed(torch.Generator().manual_seed(seed), sample.pixels)
    S, _, H, W = pixels.shape
    return ImageSet(
        tuple(str(i) for i in range(S)),
        pixels,
        torch.ones(S, H, W, dtype=torch.bool),
        torch.eye(3, dtype=torch.float64).repeat(S, 1, 1),
        torch.tensor([[H, W]]).repeat(S, 1),
    )


def _rendered(seed: int, path: synthetic.Path, shaping: Shaping | None) -> Case:
    sample = synthetic.sample(seed, path)
    recorded = as_photos(sample, seed)

    def views() -> list[View]:
        k = sample.cameras.intrinsics.double()
        parameters = torch.stack([k[:, 0, 0], k[:, 1, 1], k[:, 0, 2], k[:, 1, 2]], -1).tolist()
        lenses = [Lens("PINHOLE", recorded.size, tuple(values)) for values in parameters]
        return [_view(seen, lens) for seen, lens in zip(recorded.pixels, lenses, strict=True)]

    if shaping is None:
        return Case(recorded, sample.cameras, sample.depth, sample.valid, views)
    (h, w), size = recorded.size, photos.network_size(recorded.size, shaping)
    pixels = F.interpolate(recorded.pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    depth, valid = (F.interpolate(x[:, None].float(), size) for x in (sample.depth, sample.valid))
    back = torch.diag(torch.tensor([w / size[1], h / size[0], 1.0], dtype=torch.float64))
    valid = valid[:, 0] > 0
    every = torch.ones_like(valid)
    back = back.expand(len(pixels), 3, 3)
    images = ImageSet(recorded.names, pixels, every, back, recorded.source_size)
    larger = torch.tensor([size]).repeat(len(pixels), 1)
    return Case(images, resize(sample.cameras, back.inverse(), larger), depth[:, 0], valid, views)


def _photographed(scene: PhotoScene, shaping: Shaping) -> Case:
    paths = [scene.path(frame) for frame in range(len(scene))]
    loaded = photos.load(scene.folder / "images", paths, shaping)
    if loaded.unreadable:
        name, reason = loaded.unreadable[0]
        raise InputError(f"cannot be read: {scene.folder / 'images' / name} ({reason})")
    images, cameras = loaded.images, scene.model.cameras
    for path, found, wanted in zip(paths, images.source_size, cameras.image_size, strict=True):
        if not found.equal(wanted):
            words = f"{found.flip(0).tolist()}, its camera {wanted.flip(0).tolist()}"
            raise InputError(f"the photo is {words}: {path}")
    size = torch.tensor([images.size]).repeat(len(scene), 1)
    maps = images.source_from_network
    depth, valid = zip(
        *(scene.depth(frame, maps[frame], images.size) for frame in range(len(scene))), strict=True
    )

    def views() -> list[View]:
        return [_reduced(scene, frame) for frame in range(len(scene))]

    truth = resize(cameras, maps.inverse(), size)
    return Case(images, truth, torch.stack(depth), torch.stack(valid) & images.valid, views)


def _reduced(scene: PhotoScene, frame: int) -> View:
    """A whole photo at no more than LARGEST_VIEW pixels."""
    h, w = scene.model.cameras.image_size[frame].tolist()
    scale = min(1.0, LARGEST_VIEW / max(h, w))
    size = round(h * scale), round(w * scale)
    pixels, _ = photos.window(scene.path(frame), (h, w), (0.0, 0.0, float(w), float(h)), size)
    return _view(pixels, scene.model.lenses[frame])


def _view(pixels: Tensor, lens: Lens) -> View:
    """Pixels [3, h, w] in grey."""
    gray = (pixels * LUMA[:, None, None]).sum(0)
    return View((gray * 255).round().to(torch.uint8).numpy(), lens)


def _rows(network: Network, scene: str, cases: Sequence[Case], with_sift: bool) -> list[Row]:
    head: Row = {"scene": scene, "frames": len(cases[0].images)}
    rows = []
    ways: dict[str, Predict] = {"network": lambda x: predict(network, x), "constant": constant}
    for name, how in ways.items():
        predictions = [how(case.images) for case in cases]
        poses = [metrics.relative_poses(p.cameras.extrinsics) for p in predictions]
        figures = _pose_figures(poses, cases) | _map_figures(predictions, cases)
        rows.append({**head, "prediction": name, **figures})
    if with_sift:
        poses = [sift.relative_poses(case.views()) for case in cases]
        rows.append({**head, "prediction": "SIFT", **_pose_figures(poses, cases)})
    return rows


def _pose_figures(poses: Sequence[Tensor], cases: Sequence[Case]) -> dict[str, float]:
    """Of relative poses [P, 3, 4] of each case; no AUC of a single pair."""
    errors = [
        metrics.pair_errors(pairs, metrics.relative_poses(case.cameras.extrinsics))
        for pairs, case in zip(poses, cases, strict=True)
    ]
    several = len(cases) * len(poses[0]) > 1
    aucs = {
        f"AUC@{k}": mean(metrics.auc(*both, k) for both in errors) for k in (5, 15, 30) if several
    }
    rotation, direction = (median(torch.cat(kind).tolist()) for kind in zip(*errors, strict=True))
    return {**aucs, "rotation": rotation, "direction": direction}


def _map_figures(predictions: Sequence[Prediction], cases: Sequence[Case]) -> dict[str, float]:
    """Of fields of view, and of depth where it is known."""
    width = cases[0].images.size[1]
    angles, depths = [], []
    for prediction, case in zip(predictions, cases, strict=True):
        k, true = prediction.cameras.intrinsics, case.cameras.intrinsics
        angles.append(metrics.field_of_view_error(k, true, width))
        if case.valid.any():
            depths.append(metrics.depth_errors(prediction.depth, case.depth, case.valid))
    figures = {"field of view": mean(angles)}
    if depths:
        relative, within = zip(*depths, strict=True)
        figures |= {"AbsRel": mean(relative), "delta<1.25": mean(within)}
    return figures
