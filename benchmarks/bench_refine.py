"""Seconds and memory of each stage of `vggt reconstruct` with refinement, for 10, 30, 100 photos.

python benchmarks/bench_refine.py [COUNT...]

Photos of 1024 x 768 of one rendered place, each pixel the mean of four rays.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import write
from PIL import Image
from torch.nn.functional import avg_pool2d

from vggt_cli.learning import synthetic
from vggt_cli.scene import Cameras

SEED, SIZE, TILE = 5, (768, 1024), 256


def photographs(count: int, folder: Path) -> None:
    """So many photos of the place, rendered tile by tile for memory."""
    random = torch.Generator().manual_seed(SEED)
    world = synthetic.world(random)
    cameras = synthetic.cameras(random, world, synthetic.Path(count, SIZE, spread=0.5))
    for i in range(count):
        photo = Image.new("RGB", (SIZE[1], SIZE[0]))
        for top in range(0, SIZE[0], TILE):
            for left in range(0, SIZE[1], TILE):
                photo.paste(_tile(world, cameras[i : i + 1], top, left), (left, top))
        photo.save(folder / f"{i:03d}.jpg", quality=95)


def _tile(world: synthetic.World, camera: Cameras, top: int, left: int) -> Image.Image:
    k = camera.intrinsics.clone()
    k[:, :2, 2] -= torch.tensor([left, top])
    k[:, :2] *= 2
    size = torch.tensor([[2 * TILE, 2 * TILE]])
    pixels = avg_pool2d(synthetic.render(world, Cameras(camera.extrinsics, k, size)).pixels, 2)[0]
    levels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(levels.numpy())


def main(counts: list[int]) -> None:
    """Measure and write."""
    figures = []
    with tempfile.TemporaryDirectory() as place:
        for count in counts:
            folder, scene = Path(place) / f"{count} photos", Path(place) / f"{count} scene"
            folder.mkdir()
            photographs(count, folder)
            command = ["reconstruct", str(folder), "--out", str(scene), "--model", "mini", "--json"]
            environment = {**os.environ, "VGGT_HOME": place}  # no features from another run
            run = subprocess.run(
                [sys.executable, "-m", "vggt_cli", *command],
                capture_output=True, text=True, check=True, env=environment,
            )  # fmt: skip
            report = json.loads(run.stdout)
            figures.append(
                {
                    "photos": count,
                    "seconds": report["seconds"],
                    "peak_memory_bytes": report["peak_memory_bytes"],
                    "refinement": report["refinement"],
                }
            )
            print(json.dumps(figures[-1]), flush=True)
    print(write("refine", figures))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [10, 30, 100])
