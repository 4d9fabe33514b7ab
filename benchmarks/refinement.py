"""What refinement does with mini's cameras, and with reference cameras that were disturbed.

    python benchmarks/refinement.py FOLDER      # of sets with images/ and reference/

One table: AUC at 3, 5 and 30 degrees and ATE in percent of the cameras' rms extent; of a pair of
photos the errors of rotation and direction. Every row uses the same feature tracks, found with
mini's prediction as guess. Disturbed: each camera by itself, the focal length 3 % off, three seeds.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import write
from disturb import disturbed

from vggt_cli.device import compute_dtype
from vggt_cli.errors import GeometryError
from vggt_cli.formats import colmap_read, images
from vggt_cli.formats.colmap import Model
from vggt_cli.formats.lenses import camera_groups
from vggt_cli.geometry import align_cameras, move, resize, share_intrinsics
from vggt_cli.learning import metrics
from vggt_cli.learning.sfm import reconstruct as mapped
from vggt_cli.models import weights
from vggt_cli.reconstruction.detect import cache_folder
from vggt_cli.reconstruction.pairs import guess
from vggt_cli.reconstruction.predict import predict
from vggt_cli.reconstruction.refine import Refined, RefineOptions, refine
from vggt_cli.reconstruction.tracks import FeatureTracks, follow
from vggt_cli.scene import Cameras, Prediction

CPU = torch.device("cpu")
LEVELS = ((2, 0.05), (5, 0.1), (10, 0.2))  # degrees, share of the rms extent of the cameras
SEEDS = range(3)


def figures(cameras: Cameras, true: Cameras) -> dict[str, float]:
    """AUC and ATE of three photos or more, errors of two."""
    rotation, direction = metrics.relative_pose_errors(cameras.extrinsics, true.extrinsics)
    if len(cameras) == 2:
        return {"rotation": float(rotation[0]), "direction": float(direction[0])}
    found = {f"auc@{k}": metrics.auc(rotation, direction, k) for k in (3, 5, 30)}
    aligned = move(cameras, align_cameras(cameras, true))
    apart = (aligned.centers - true.centers).norm(dim=-1)
    return {**found, "ate %": 100 * metrics.rms(apart) / metrics.extent(true.centers)}


def measure(scene: Path) -> Iterator[dict[str, Any]]:
    """The rows of one set."""
    model = colmap_read.read(scene / "reference")
    true = model.cameras
    network, entry = weights.load("mini", CPU, compute_dtype(CPU))
    loaded = images.load(
        scene / "images", [scene / "images" / name for name in model.names], entry.shaping
    )
    group = camera_groups(loaded.photos, "auto")
    prediction = predict(network, loaded.images)
    cameras = share_intrinsics(prediction.cameras, group)
    prediction = Prediction(cameras, prediction.depth, prediction.confidence)
    cameras = resize(cameras, loaded.images.source_from_network, loaded.images.source_size)
    yield row(scene, "mini", cameras, true)
    start = time.perf_counter()
    guessed = guess(prediction, loaded.images)
    found = follow(loaded.photos, loaded.images, guessed, None, cache_folder())
    tracked = time.perf_counter() - start
    exif = torch.tensor([photo.focal_pixels for photo in loaded.photos], dtype=torch.float64)
    refined = refine(cameras, found.tracks, group, RefineOptions("auto"), exif)
    spent = {"tracks seconds": tracked, "refine seconds": time.perf_counter() - start - tracked}
    yield row(scene, "mini + auto", refined.cameras, true) | said(refined) | spent
    alone = mapped(scene / "images", model.names, true.image_size)
    if alone.extrinsics.isfinite().all():
        yield row(scene, "pycolmap alone", alone, true)
    yield from from_disturbed(scene, model, group, found)


def from_disturbed(
    scene: Path, model: Model, group: list[int], found: FeatureTracks
) -> Iterator[dict[str, Any]]:
    """Rows of the reference disturbed, and of what `ba` makes of that."""
    for level in LEVELS:
        for seed in SEEDS:
            name = f"disturbed {level[0]} deg / {100 * level[1]:.0f} %, seed {seed}"
            focal = 0.03 if seed % 2 == 0 else -0.03
            start = disturbed(model.cameras, *level, focal=focal, seed=seed)
            yield row(scene, name, start, model.cameras)
            refined = refine(start, found.tracks, group, RefineOptions("ba", seed))
            yield row(scene, f"{name} + ba", refined.cameras, model.cameras) | said(refined)


def row(scene: Path, start: str, cameras: Cameras, true: Cameras) -> dict[str, Any]:
    """One line of the table."""
    try:
        found = figures(cameras, true)
    except GeometryError as error:  # centres that fix no scale
        found = {"error": str(error)}  # type: ignore[dict-item]
    rounded = {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}
    return {"set": scene.name, "cameras": start, **rounded}


def said(refined: Refined) -> dict[str, Any]:
    """What the judge chose, and why."""
    radial = round(float(refined.radial[0]), 5)
    return {
        "method": refined.verdict.method,
        "radial": radial,
        "moved": sum(image.outcome == "re-aligned" for image in refined.images),
        "words": refined.verdict.words,
    }


def main(folder: Path) -> None:
    """Measure every set, print the table as it comes, write the results."""
    rows = []
    print(
        "| set | cameras | AUC@3 | AUC@5 | AUC@30 | ATE % | chosen |\n|---|---|---|---|---|---|---|"
    )
    for reference in sorted(folder.glob("*/reference")):
        for found in measure(reference.parent):
            rows.append(found)
            cells = [found.get(f"auc@{k}", "") for k in (3, 5, 30)] + [found.get("ate %", "")]
            if "rotation" in found:
                cells = [
                    f"rotation {found['rotation']}, direction {found['direction']}",
                    "",
                    "",
                    "",
                ]
            words = [found["set"], found["cameras"], *cells, found.get("method", "")]
            print(f"| {' | '.join(map(str, words))} |", flush=True)
    print(write("refinement", rows), file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
