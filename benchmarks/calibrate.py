"""Measures what each step of a run costs here, and writes the constants that plans are made of.

python benchmarks/calibrate.py            mini, and all steps that no network changes
python benchmarks/calibrate.py NAME...    published networks (vggt weights list), weights filled

Runs whole reconstructions of rendered photos in processes of their own, fits the constants of
`plan.amounts` to the seconds and the peak memory of each step, and says how far they are off on
sets that the fit has not seen. Nothing else may run meanwhile.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_forward import values
from bench_refine import photographs
from common import ROOT, write
from PIL import Image
from safetensors.torch import save_file
from scipy.optimize import nnls

from vggt_cli.models import catalog, checkpoint
from vggt_cli.models.networks import CONFIGS
from vggt_cli.models.weights import identify
from vggt_cli.reconstruction import plan
from vggt_cli.reconstruction.plan import Work

COSTS = ROOT / "src/vggt_cli/reconstruction/costs.json"
# Photos, (height, width) of them, refined, frames at once. Refined ones are never enlarged, which
# would leave them without fine features.
SEEN = [
    (2, (768, 1024), True, 16),
    (5, (768, 1024), True, 16),
    (12, (768, 1024), True, 16),
    (20, (768, 1024), True, 120),
    (26, (768, 1024), True, 16),
    (44, (768, 1024), True, 16),
    (12, (480, 640), True, 16),
    (32, (480, 640), True, 120),
    (3, (3000, 4000), False, 16),
    (20, (3000, 4000), False, 16),
    (12, (768, 1024), False, 120),
    (60, (512, 1024), False, 120),
    (60, (768, 1024), False, 16),
    (100, (768, 1024), False, 120),
    (200, (768, 1024), False, 40),
    (320, (768, 1024), False, 16),
]
HELD_OUT = [
    (8, (600, 800), True, 16),
    (17, (768, 1024), True, 16),
    (36, (600, 1024), True, 16),
    (40, (1200, 1600), False, 16),
    (80, (600, 1024), False, 120),
    (150, (768, 1024), False, 60),
    (400, (768, 768), False, 24),
]
# Photos, and the share of the resolution that the weights were trained at.
LARGE_SEEN = [(1, 1.0), (2, 1.0), (4, 1.0), (1, 0.5), (4, 0.5), (10, 0.5)]
LARGE_HELD_OUT = [(3, 1.0), (7, 0.5), (3, 0.7)]
# What each step's cost may be a sum of.
SECONDS = {
    "start": ("run",),
    "load images": ("run", "frames", "photos", "maps"),
    "load weights": ("run",),
    "predict": ("run", "tokens", "frame attention", "set attention", "joints"),
    "find tracks": ("run", "frames", "searched photos", "whole pairs", "pairs"),
    "refine": ("run", "frames", "all pairs"),
    "fuse": ("run", "candidates", "sightings"),
    "diagnose": ("run", "frames", "photos", "all pairs"),
    "write": ("run", "frames", "photos", "maps", "candidates"),
}
BYTES = {
    "start": ("run",),
    "load images": ("run", "photo", "held"),
    "load weights": ("run", "held"),
    "predict": ("run", "frame tokens", "window tokens", "held"),
    "find tracks": ("run", "frames", "searched photo", "held"),
    "refine": ("run", "frames", "held"),
    "fuse": ("run", "refined", "candidates", "sightings", "held"),
    "diagnose": ("run", "refined", "photo", "candidates", "held"),
    "write": ("run", "refined", "photo", "candidates", "held"),
}
OF_NETWORK = ("load weights", "predict")
RUN = """
import json, os, sys, time
from pathlib import Path
from vggt_cli.formats import export
from vggt_cli.reconstruction import pipeline
from vggt_cli.reconstruction.settings import Options, settle
from vggt_cli.formats.decode import upright_sizes
source, out, options, last = *sys.argv[1:3], Options(**json.loads(sys.argv[3])), sys.argv[4]
steps, begun = {}, {}
paths = sorted(Path(source).iterdir())
work = settle(options).plan(options, upright_sizes(paths), len(paths)).work
def said(stage, done, total):
    if done == total == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        begun[stage] = time.perf_counter()
    elif done == total == 1 and stage in begun:
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        steps[stage] = {"seconds": time.perf_counter() - begun.pop(stage), "bytes": peak}
        if stage == last:
            print(json.dumps({"steps": steps, "work": vars(work)}), flush=True)
            os._exit(0)
scene = pipeline.reconstruct(source, options, said)
said("write", 0, 0)
export.write(scene, Path(out))
said("write", 1, 1)
"""


def measured(
    source: Path, options: dict[str, Any], last: str, home: Path | None = None
) -> tuple[Work, dict[str, dict[str, float]]]:
    """The work of one run in a process of its own, and seconds and peak bytes of its steps.

    home: where hashes and features are kept; None: nothing was kept.
    """
    with tempfile.TemporaryDirectory() as place:
        begun = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", RUN, source, f"{place}/scene", json.dumps(options), last],
            capture_output=True, text=True, check=False,
            env={**os.environ, "VGGT_HOME": str(home or place)},
        )  # fmt: skip
        took = time.perf_counter() - begun
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    work = Work(**{**found["work"], "size": tuple(found["work"]["size"])})
    inside = sum(step["seconds"] for step in found["steps"].values())
    found["steps"]["start"] = {"seconds": took - inside, "bytes": 1}  # Python, torch, and the end
    print(json.dumps(found), flush=True)
    return work, found["steps"]


def folder_of(originals: Path, count: int, size: tuple[int, int], place: Path) -> Path:
    """So many photos of that size; where there are fewer, they come again, a little brighter."""
    folder, (h, w) = Path(tempfile.mkdtemp(dir=place)), size
    paths = sorted(originals.iterdir())
    for i in range(count):
        again = 2 * (i // len(paths))
        with Image.open(paths[i % len(paths)]) as photo:
            scale = max(h / photo.height, w / photo.width)
            whole = photo.resize((round(photo.width * scale), round(photo.height * scale)))
        brighter = whole.crop((0, 0, w, h)).point([min(255, v + again) for v in range(256)] * 3)
        brighter.save(folder / f"{i:04d}.jpg", quality=92)
    return folder


Runs = list[tuple[Work, dict[str, dict[str, float]]]]


def fitted(runs: Runs, kind: str, terms: dict[str, tuple[str, ...]]) -> dict[str, dict[str, float]]:
    """Constants of each step: none negative, least error relative to what was measured."""
    result = {}
    for step, names in terms.items():
        rows, values = [], []
        for work, steps in runs:
            if step in steps:
                of = plan.amounts(work)
                rows.append([of[name] for name in names])
                values.append(max(steps[step][kind], 0.05 if kind == "seconds" else 1))
        if rows:
            scale = np.array(rows).max(0).clip(1e-9)
            weighted = np.array(rows) / scale / np.array(values)[:, None]
            found, _ = nnls(weighted, np.ones(len(values)))
            kept = zip(names, found / scale, strict=True)
            result[step] = {name: float(f"{c:.4g}") for name, c in kept if c > 0}
    return result


def compared(runs: Runs) -> list[dict[str, Any]]:
    """Predicted beside measured."""
    lines = []
    for work, steps in runs:
        planned = plan.foresee(work)
        took = sum(step["seconds"] for step in steps.values())
        peak = max(step["bytes"] for step in steps.values()) / 1e9
        lines.append(
            {
                "images": work.frames,
                "size": list(work.size),
                "megapixels": round(work.photo_pixels / 1e6, 2),
                "refined": work.refined,
                "window": work.window,
                "seconds": _both(took, sum(planned.seconds.values())),
                "gigabytes": _both(peak, planned.peak_memory / 1e9),
                "steps": {
                    name: [round(step["seconds"], 2), round(planned.seconds[name], 2)]
                    for name, step in steps.items()
                },
            }
        )
    return lines


def _both(measured: float, predicted: float) -> dict[str, float]:
    found = {"measured": measured, "predicted": predicted, "error": predicted / measured - 1}
    return {name: round(value, 3) for name, value in found.items()}


def main(names: list[str]) -> None:
    """Measure, fit, write, and say how far off."""
    costs = json.loads(COSTS.read_text())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        originals = place / "rendered"
        originals.mkdir()
        photographs(12 if names else 44, originals)
        for name in names or ["mini"]:
            model = name
            if names:
                model = str(place / f"{name}.safetensors")
                shapes = checkpoint.shapes(CONFIGS[catalog.entry(name).config])
                filled = {k: values(k, v).float() for k, v in shapes.items()}
                save_file(filled, model, metadata={"weights": name})
                del filled
                # Hashed once, as a file of weights is on every machine.
                measured(originals, {"model": model, "refine": "none"}, "load weights", place)
            seen, unseen = (_runs(model, which, originals, place) for which in (True, False))
            _learn(costs, seen, bool(names))
            COSTS.write_text(json.dumps(costs, indent=1) + "\n")
            plan.costs.cache_clear()
            figures = {"fitted": compared(seen), "held out": compared(unseen)}
            print(json.dumps(figures["held out"], indent=1))
            print(write(f"plan_{name}", figures))
            if names:
                Path(model).unlink()


def _runs(model: str, seen: bool, originals: Path, place: Path) -> Runs:
    sets: list[tuple[int, tuple[int, int], dict[str, Any]]] = []
    if model == "mini":
        for n, size, refined, window in SEEN if seen else HELD_OUT:
            sets.append((n, size, {"refine": "ba" if refined else "none", "window": window}))
    else:
        full = identify(model)[0].shaping.resolution
        for n, part in LARGE_SEEN if seen else LARGE_HELD_OUT:
            sets.append((n, (768, 1024), {"refine": "none", "resolution": round(full * part)}))
    return [
        measured(
            folder_of(originals, n, size, place),
            {"model": model, **options},
            "write" if model == "mini" else "predict",
            None if model == "mini" else place,
        )
        for n, size, options in sets
    ]


def _learn(costs: dict[str, Any], runs: Runs, network_alone: bool) -> None:
    seconds, peaks = fitted(runs, "seconds", SECONDS), fitted(runs, "bytes", BYTES)
    steps = {s: {"seconds": seconds[s], "bytes": peaks[s]} for s in seconds}
    work = runs[0][0]
    known = {step: steps.pop(step) for step in OF_NETWORK}
    costs["networks"][f"{work.config} {work.device} {work.dtype}"] = known
    if not network_alone:
        costs["steps"] = steps
        capability = torch.backends.cpu.get_cpu_capability()
        costs["machine"] = f"{torch.get_num_threads()} threads of a CPU with {capability}"


if __name__ == "__main__":
    main(sys.argv[1:])
