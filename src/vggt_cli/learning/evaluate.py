"""How good a network is on the held-out rendered scenes, beside a constant prediction."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from vggt_cli.learning import metrics, synthetic
from vggt_cli.learning.synthetic import Sample
from vggt_cli.models import store
from vggt_cli.models.networks import Network
from vggt_cli.reconstruction.predict import predict
from vggt_cli.scene import Cameras, ImageSet, Prediction

Row = dict[str, float | str]
Predict = Callable[[ImageSet], Prediction]

MEAN_FIELD_OF_VIEW = math.radians(65)  # of the longer side in training


def evaluate(network: Network, listed: Mapping[str, Any] | None = None) -> list[Row]:
    """Rows of figures: `network` and a constant prediction, for each number of frames.

    listed: seeds, frames, size and spread of rendered scenes; None: the held-out ones, which
    stand in weights/heldout.json and were fixed before any training.
    """
    if listed is None:
        folder = store.bundled()
        assert folder is not None  # it comes with the tool
        listed = json.loads((folder / "heldout.json").read_text())
    rows: list[Row] = []
    for frames in listed["frames"]:
        path = synthetic.Path(frames, tuple(listed["size"]), listed["spread"])
        samples = [synthetic.sample(seed, path) for seed in listed["seeds"]]
        sets = [_as_photos(s, seed) for s, seed in zip(samples, listed["seeds"], strict=True)]
        for name, how in (("network", lambda x: predict(network, x)), ("constant", constant)):
            rows.append({"prediction": name, "frames": frames, **_figures(how, sets, samples)})
    return rows


def constant(images: ImageSet) -> Prediction:
    """The same camera for every frame, at the mean field of view, before a wall."""
    S, (H, W) = len(images), images.size
    focal = max(H, W) / 2 / math.tan(MEAN_FIELD_OF_VIEW / 2)
    k = torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]]).repeat(S, 1, 1)
    cameras = Cameras(torch.eye(3, 4).repeat(S, 1, 1), k, torch.tensor([[H, W]]).repeat(S, 1))
    return Prediction(cameras, torch.ones(S, H, W), torch.ones(S, H, W))


def _as_photos(sample: Sample, seed: int) -> ImageSet:
    random = torch.Generator().manual_seed(seed)
    pixels = synthetic.photographed(random, sample.pixels)
    S, _, H, W = pixels.shape
    return ImageSet(
        tuple(str(i) for i in range(S)),
        pixels,
        torch.ones(S, H, W, dtype=torch.bool),
        torch.eye(3, dtype=torch.float64).repeat(S, 1, 1),
        torch.tensor([[H, W]]).repeat(S, 1),
    )


def _figures(
    how: Predict, sets: Sequence[ImageSet], samples: Sequence[Sample]
) -> Mapping[str, float]:
    rotations: list[Tensor] = []
    directions: list[Tensor] = []
    relative, within, angles = [], [], []
    for images, truth in zip(sets, samples, strict=True):
        prediction = how(images)
        cameras = prediction.cameras
        rotation, direction = metrics.relative_pose_errors(
            cameras.extrinsics, truth.cameras.extrinsics
        )
        rotations.append(rotation)
        directions.append(direction)
        error, share = metrics.depth_errors(prediction.depth, truth.depth, truth.valid)
        relative.append(error)
        within.append(share)
        width = images.size[1]
        angles.append(
            metrics.field_of_view_error(cameras.intrinsics, truth.cameras.intrinsics, width)
        )
    aucs = {
        f"AUC@{k}": mean(metrics.auc(r, d, k) for r, d in zip(rotations, directions, strict=True))
        for k in (5, 15, 30)
    }
    return {
        **aucs,
        "rotation": median(torch.cat(rotations).tolist()),
        "direction": median(torch.cat(directions).tolist()),
        "AbsRel": mean(relative),
        "delta<1.25": mean(within),
        "field of view": mean(angles),
    }
