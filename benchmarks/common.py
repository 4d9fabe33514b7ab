"""How every benchmark measures and what it writes beside its figures."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vggt_cli.device import synchronize

ROOT = Path(__file__).parents[1]
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
    described = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=False)
    machine = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {"commit": done.stdout.strip(), "machine": machine}


def compared(script: str, arguments: Sequence[str], commit: str, runs: int = 5) -> dict[str, Any]:
    """Figures of `script` with the package of `commit` and with the one here, in turn.

    The script prints a JSON object of numbers as its last line when it is called with
    `arguments`; each run is a process of its own, and the first of each package is not counted.
    """
    with _sources(commit) as before:
        packages = {"before": before, "after": ROOT / "src"}
        taken: dict[str, list[dict[str, float]]] = {which: [] for which in packages}
        for _ in range(1 + runs):
            for which, package in packages.items():
                taken[which].append(_once(script, arguments, package))
    figures: dict[str, Any] = {"against": commit, "runs": runs}
    for name in taken["after"][0]:
        both: dict[str, Any] = {}
        for which, found in taken.items():
            values = [one[name] for one in found[1:] if name in one]
            if values:
                median = statistics.median(values)
                both[which] = {"median": median, "min": min(values), "max": max(values)}
        if len(both) == 2 and both["after"]["median"]:
            both["before / after"] = round(both["before"]["median"] / both["after"]["median"], 3)
        figures[name] = both
    return figures


@contextmanager
def _sources(commit: str) -> Iterator[Path]:
    """The package of `commit`, checked out beside this one for as long as it is needed."""
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", tree, commit], capture_output=True, check=True)
        try:
            yield tree / "src"
        finally:
            subprocess.run([*git, "remove", "--force", tree], capture_output=True, check=True)


def _once(script: str, arguments: Sequence[str], package: Path) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(package)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    figures: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return figures


def write(name: str, figures: Any, folder: Path = RESULTS) -> Path:
    """FOLDER/NAME.json with the figures, the commit and the machine."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**circumstances(), "figures": figures}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
