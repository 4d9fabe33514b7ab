"""How every benchmark measures and what it writes beside its figures."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vggt_cli.device import synchronize

RESULTS = Path(__file__).parent / "results"


def seconds(step: Callable[[], object], device: torch.device, runs: int = 10) -> dict[str, float]:
    """Wall seconds of one `step`: median, min and max of `runs` after two unmeasured."""
    taken = []
    for _ in range(2 + runs):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    kept = taken[2:]
    return {"median": statistics.median(kept), "min": min(kept), "max": max(kept)}


def circumstances() -> dict[str, Any]:
    """The commit and the machine."""
    root = Path(__file__).parents[1]
    described = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(described, cwd=root, capture_output=True, text=True, check=False)
    machine = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {"commit": done.stdout.strip(), "machine": machine}


def write(name: str, figures: Any, folder: Path = RESULTS) -> Path:
    """FOLDER/NAME.json with the figures, the commit and the machine."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**circumstances(), "figures": figures}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
