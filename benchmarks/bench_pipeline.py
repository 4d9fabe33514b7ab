"""Seconds of the main job's parts with mini: start-up, network, fusion, writing, whole command.

python benchmarks/bench_pipeline.py [FOLDER OF PHOTOS]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import seconds, write

from vggt_cli.device import compute_dtype
from vggt_cli.formats import export, files, images
from vggt_cli.models import weights
from vggt_cli.reconstruction import pipeline, settings
from vggt_cli.reconstruction.fuse import FuseOptions, fuse
from vggt_cli.reconstruction.predict import predict

CPU = torch.device("cpu")


def command(*arguments: str) -> None:
    """Run the command in a process of its own."""
    subprocess.run([sys.executable, "-m", "vggt_cli", *arguments], capture_output=True, check=True)


def main(folder: str) -> None:
    """Measure and write."""
    network, used = weights.load("mini", CPU, compute_dtype(CPU))
    root, paths = files.find(folder)
    loaded = images.load(root, paths, used.shaping).images
    prediction = predict(network, loaded)
    scene = pipeline.reconstruct(folder, settings.Options(model="mini"))
    with tempfile.TemporaryDirectory() as place:
        figures = {
            "photos": len(paths),
            "help": seconds(lambda: command("--help"), CPU),
            "load images": seconds(lambda: images.load(root, paths, used.shaping), CPU),
            "predict": seconds(lambda: predict(network, loaded), CPU),
            "fuse with observations": seconds(lambda: fuse(prediction, loaded, FuseOptions()), CPU),
            "write": seconds(
                lambda: export.write(scene, Path(place) / "scene", overwrite=True), CPU
            ),
            "whole command": seconds(
                lambda: command(
                    "reconstruct",
                    folder,
                    "--out",
                    f"{place}/scene",
                    "--overwrite",
                    "--model",
                    "mini",
                ),
                CPU,
                runs=3,
            ),
        }
    print(write("pipeline", figures))


if __name__ == "__main__":
    examples = Path(__file__).parents[1] / "examples/motorcycle"
    main(sys.argv[1] if len(sys.argv) > 1 else str(examples))
