"""Photos with known cameras: a rendered scene as JPEG files and cameras.json.

python examples/render.py FOLDER [SEED]     (examples/rendered was made with seed 129)
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from vggt_cli.learning import synthetic


def render(folder: Path, seed: int, size: tuple[int, int] = (240, 320)) -> None:
    """Writes 8 frames of `size`, each pixel the mean of four rays, and their true cameras."""
    path = synthetic.Path(8, (2 * size[0], 2 * size[1]), spread=0.6)
    scene = synthetic.sample(seed, path)
    halved = torch.diag(torch.tensor([0.5, 0.5, 1.0])) @ scene.cameras.intrinsics
    folder.mkdir(parents=True, exist_ok=True)
    cameras = []
    for i, frame in enumerate(avg_pool2d(scene.pixels, 2)):
        name = f"frame_{i}.jpg"
        levels = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(levels.numpy()).save(folder / name, quality=95)
        extrinsics = scene.cameras.extrinsics[i].tolist()  # world-to-camera, OpenCV axes
        cameras.append(
            {"name": name, "size": size, "extrinsics": extrinsics, "intrinsics": halved[i].tolist()}
        )
    (folder / "cameras.json").write_text(json.dumps(cameras, indent=1) + "\n")


if __name__ == "__main__":
    render(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 129)
