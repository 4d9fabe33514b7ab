"""Seconds and peak memory of one forward pass of the published sizes, with filled weights.

python benchmarks/bench_forward.py [--against COMMIT] [--size 336 518] [--frames 1 2 4 8] [--runs 3]

Cameras and depth alone, as the main job asks for them, in the compute dtype of the device. Each
measurement is a process of its own, which maps the weights from one temporary file. On a CPU that
others use, the CPU seconds of one thread (OMP_NUM_THREADS=1) tell more than the wall's.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import compared, write
from safetensors.torch import save_file
from torch import Tensor

from vggt_cli import device as devices
from vggt_cli.models import checkpoint
from vggt_cli.models.networks import CONFIGS
from vggt_cli.models.vggt import VGGTConfig
from vggt_cli.reconstruction.predict import predict
from vggt_cli.scene import ImageSet

NETWORKS = ["vggt-1b", "omega-1b"]
FRAMES = {"cpu": [1, 2, 4, 8], "cuda": [1, 2, 4, 8, 20, 50, 100, 200, 500]}
OFF = ("point_head.", "track_head.")  # of VGGT's checkpoints: not asked for here


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    """bfloat16 values of a parameter by its name, of a size that keeps signals alive."""
    leaf = name.rpartition(".")[2]
    if leaf == "bias_mask":
        return torch.ones(3).index_fill(0, torch.tensor(1), 0).repeat_interleave(shape[0] // 3)
    if leaf == "periods":
        return 100 ** (torch.arange(shape[0]) / shape[0])
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.bfloat16)
    if len(shape) == 1:
        return {"gamma": 0.2, "weight": 1.0}.get(leaf, 0.0) + 0.05 * noise
    matrix = leaf == "weight"
    return noise * (1 / max(1, noise[0].numel()) ** 0.5 if matrix else 0.2)


def fill(name: str, path: Path) -> None:
    """A file of weights for the network called `name`."""
    shapes = checkpoint.shapes(CONFIGS[name])
    save_file({k: values(k, v) for k, v in shapes.items() if not k.startswith(OFF)}, path)


def photos(count: int, size: tuple[int, int]) -> ImageSet:
    """Noise."""
    pixels = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(count))
    return ImageSet(
        tuple(map(str, range(count))),
        pixels,
        torch.ones(count, *size, dtype=torch.bool),
        torch.eye(3, dtype=torch.float64).expand(count, 3, 3),
        torch.tensor(size).expand(count, 2),
    )


def once(name: str, path: Path, size: tuple[int, int], frames: list[int]) -> dict[str, float]:
    """Seconds and peak memory so far for each number of frames, which grow."""
    device = devices.choose("auto")
    config = CONFIGS[name]
    if isinstance(config, VGGTConfig):
        config = replace(config, point_head=False, track_head=False)
    network = checkpoint.read(path).network(config, device, devices.compute_dtype(device))
    figures: dict[str, float] = {}
    predict(network, photos(1, size))
    figures["loaded and warm, peak GB"] = devices.peak_memory(device) / 1e9
    for S in sorted(frames):
        images = photos(S, size)
        start, used = time.perf_counter(), time.process_time()
        prediction = predict(network, images)  # on the CPU, so there is nothing to wait for
        figures[f"S={S} seconds"] = time.perf_counter() - start
        figures[f"S={S} CPU seconds"] = time.process_time() - used
        figures[f"S={S} peak GB"] = devices.peak_memory(device) / 1e9
        assert prediction.depth.isfinite().all()
    return figures


def main() -> None:
    """Measure and write; with --weights measure one network in this process and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--size", nargs=2, type=int, default=[336, 518])
    parser.add_argument("--frames", nargs="+", type=int)
    parser.add_argument("--against", help="a commit to compare with, in turn")
    parser.add_argument("--runs", type=int, default=3, help="of each commit that count")
    parser.add_argument("--name", default="forward", help="of the file of results")
    parser.add_argument("--weights", type=Path)
    given = parser.parse_args()
    device = devices.choose("auto")
    frames = given.frames or FRAMES[device.type]
    # Whole patches of the network, at most what was asked for.
    sizes = {name: CONFIGS[name].patch_size for name in given.networks}
    shaped = {n: (given.size[0] // p * p, given.size[1] // p * p) for n, p in sizes.items()}
    if given.weights:
        (name,) = given.networks
        print(json.dumps(once(name, given.weights, shaped[name], frames)))
        return
    figures = {}
    for name in given.networks:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.safetensors"
            fill(name, path)
            arguments = ["--networks", name, "--weights", str(path), "--frames", *map(str, frames)]
            arguments += ["--size", *map(str, given.size)]
            if given.against:
                measured = compared(sys.argv[0], arguments, given.against, given.runs)
            else:
                command = [sys.executable, sys.argv[0], *arguments]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                measured = json.loads(done.stdout.splitlines()[-1])
        figures[name] = {"size": shaped[name], "device": str(device), **measured}
    print(json.dumps(figures, indent=1))
    print(write(given.name, figures))


if __name__ == "__main__":
    main()
