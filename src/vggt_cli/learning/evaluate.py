"""How good a network is on scenes with known cameras, beside a constant prediction, two-view SIFT
and structure from motion."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.errors import InputError
from vggt_cli.formats import decode
from vggt_cli.formats import images as photos
from vggt_cli.formats.colmap import Lens
from vggt_cli.geometry import resize
from vggt_cli.learning import metrics, sfm, sift, synthetic
from vggt_cli.learning.clouds import Score
from vggt_cli.learning.datasets import PhotoScene
from vggt_cli.learning.public import Trial
from vggt_cli.learning.sift import View
from vggt_cli.models import store
from vggt_cli.models.networks import Network
from vggt_cli.reconstruction.predict import predict
from vggt_cli.scene import Cameras, ImageSet, Prediction, Shaping

log = logging.getLogger(__name__)

Row = dict[str, float | str]
Predict = Callable[[ImageSet], Prediction]

DEGREES = (3, 5, 15, 30)
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
    by_sfm: Callable[[], Cameras] | None = None  # NaN where not registered; of photos alone


class Found(NamedTuple):
    """What one way of predicting got wrong in one case."""

    rotation: Tensor  # [P] degrees, of all pairs
    direction: Tensor  # [P]
    figures: dict[str, float]


def evaluate(
    network: Network,
    listed: Mapping[str, Any] | None = None,
    baselines: Collection[str] = (),
    shaping: Shaping | None = None,
) -> list[Row]:
    """Rows of figures on rendered scenes for each number of frames.

    listed: seeds, frames, size and spread of the scenes; None: the held-out ones, which
    stand in weights/heldout.json and were fixed before any training. baselines: "sift" adds a row.
    shaping: that of the network's weights, to which the scenes are brought as photos are; None:
    they stay as large as rendered.
    """
    if listed is None:
        folder = store.bundled()
        assert folder is not None  # it comes with the tool
        listed = json.loads((folder / "heldout.json").read_text())
    rows = []
    for frames in listed["frames"]:
        path = synthetic.Path(frames, tuple(listed["size"]), listed["spread"])
        cases = (_rendered(seed, path, shaping) for seed in listed["seeds"])
        found = [_measured(network, case, baselines) for case in cases]
        log.info("%d rendered scenes of %d frames", len(found), frames)
        rows += _rows("rendered", frames, found)
    return rows


def evaluate_photos(
    network: Network,
    shaping: Shaping,
    scenes: Sequence[PhotoScene],
    baselines: Collection[str] = (),
) -> list[Row]:
    """Rows of figures on all photos of each scene together.

    shaping: that of the network's weights. baselines: "sift" and "sfm" add a row each.
    Raises InputError for a single photo, and for photos that cannot be read or are not of their
    camera's size.
    """
    for scene in scenes:
        if len(scene) < 2:
            raise InputError(f"a single photo has no relative pose: {scene.folder}")
    rows = []
    for scene in scenes:
        log.info("%s: %d photos", scene.folder, len(scene))
        found = _measured(network, _photographed(scene, shaping), baselines)
        rows += _rows(scene.folder.resolve().name, len(scene), [found])
    return rows


def evaluate_trials(
    network: Network, shaping: Shaping, trials: Iterable[Trial], baselines: Collection[str] = ()
) -> list[Row]:
    """Rows of figures of each group of a public data set, then their means over groups.

    Otherwise as `evaluate_photos`.
    """
    groups: dict[str, list[dict[str, Found]]] = {}
    frames: dict[str, int] = {}
    for trial in trials:
        log.info("%s: %d photos of %s", trial.group, len(trial.scene), trial.scene.folder)
        case = _photographed(trial.scene, shaping)
        found = _measured(network, case, baselines, trial.score)
        groups.setdefault(trial.group, []).append(found)
        frames[trial.group] = len(trial.scene)
    rows = [
        {**row, "sets": len(found)}
        for group, found in groups.items()
        for row in _rows(group, frames[group], found)
    ]
    return rows + _means(rows, len(groups)) if len(groups) > 1 else rows


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
    loaded = photos.load(scene.root, paths, shaping)
    if loaded.unreadable:
        name, reason = loaded.unreadable[0]
        raise InputError(f"cannot be read: {scene.root / name} ({reason})")
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

    def by_sfm() -> Cameras:
        return resize(
            sfm.reconstruct(scene.root, scene.names, cameras.image_size), maps.inverse(), size
        )

    truth, known = resize(cameras, maps.inverse(), size), torch.stack(valid) & images.valid
    return Case(images, truth, torch.stack(depth), known, views, by_sfm)


def _reduced(scene: PhotoScene, frame: int) -> View:
    """A whole photo at no more than LARGEST_VIEW pixels."""
    h, w = scene.model.cameras.image_size[frame].tolist()
    scale = min(1.0, LARGEST_VIEW / max(h, w))
    size = round(h * scale), round(w * scale)
    pixels, _ = decode.window(scene.path(frame), (h, w), (0.0, 0.0, float(w), float(h)), size)
    return _view(pixels, scene.model.lenses[frame])


def _view(pixels: Tensor, lens: Lens) -> View:
    """Pixels [3, h, w] in grey."""
    gray = (pixels * LUMA[:, None, None]).sum(0)
    return View((gray * 255).round().to(torch.uint8).numpy(), lens)


def _measured(
    network: Network, case: Case, baselines: Collection[str], score: Score | None = None
) -> dict[str, Found]:
    """What each way of predicting gets wrong in a case, by its name in the table."""
    true = metrics.relative_poses(case.cameras.extrinsics)
    ways: dict[str, Predict] = {"network": lambda x: predict(network, x), "constant": constant}
    found = {}
    for name, how in ways.items():
        prediction = how(case.images)
        figures = _map_figures(prediction, case)
        if score:
            figures |= score(prediction, case.cameras, case.depth, case.valid)
        poses = metrics.relative_poses(prediction.cameras.extrinsics)
        found[name] = Found(*metrics.pair_errors(poses, true), figures)
    if "sift" in baselines:
        found["SIFT"] = Found(*metrics.pair_errors(sift.relative_poses(case.views()), true), {})
    if "sfm" in baselines and case.by_sfm:
        cameras = case.by_sfm()
        poses = metrics.relative_poses(cameras.extrinsics)
        found["SfM"] = Found(*metrics.pair_errors(poses, true), _registered_figures(cameras, case))
    return found


def _rows(scene: str, frames: int, found: Sequence[Mapping[str, Found]]) -> list[Row]:
    """A row for each way of predicting, over all cases; no AUC of a single pair."""
    rows = []
    for way in found[0]:
        cases = [case[way] for case in found]
        row: Row = {"scene": scene, "frames": frames, "prediction": way}
        if sum(len(case.rotation) for case in cases) > 1:
            for k in DEGREES:
                row[f"AUC@{k}"] = mean(metrics.auc(c.rotation, c.direction, k) for c in cases)
        row["rotation"] = median(torch.cat([case.rotation for case in cases]).tolist())
        row["direction"] = median(torch.cat([case.direction for case in cases]).tolist())
        names = dict.fromkeys(name for case in cases for name in case.figures)
        row |= {name: mean(c.figures[name] for c in cases if name in c.figures) for name in names}
        rows.append(row)
    return rows


def _means(rows: Sequence[Row], groups: int) -> list[Row]:
    """The mean of each figure over groups, for each way of predicting."""
    means = []
    for way in dict.fromkeys(row["prediction"] for row in rows):
        chosen = [row for row in rows if row["prediction"] == way]
        mean_row: Row = {"scene": f"mean of {groups}", "prediction": way}
        for name in dict.fromkeys(name for row in chosen for name in row):
            values = [value for row in chosen if isinstance(value := row.get(name), float)]
            if values:
                mean_row[name] = mean(values)
        means.append(mean_row)
    return means


def _map_figures(prediction: Prediction, case: Case) -> dict[str, float]:
    """Of the field of view, and of depth where it is known."""
    k, true, width = prediction.cameras.intrinsics, case.cameras.intrinsics, case.images.size[1]
    figures = {"field of view": metrics.field_of_view_error(k, true, width)}
    if case.valid.any():
        errors = metrics.depth_errors(prediction.depth, case.depth, case.valid)
        figures |= zip(("AbsRel", "delta<1.25"), errors, strict=True)
    return figures


def _registered_figures(cameras: Cameras, case: Case) -> dict[str, float]:
    """Of structure from motion: its share of the photos, and the field of view of these."""
    there = cameras.extrinsics.isfinite().all(-1).all(-1)
    figures = {"registered": 100 * float(there.double().mean())}
    if there.any():
        k, true = cameras.intrinsics[there], case.cameras.intrinsics[there]
        error = metrics.field_of_view_error(k, true, case.images.size[1])
        figures["field of view"] = error
    return figures
