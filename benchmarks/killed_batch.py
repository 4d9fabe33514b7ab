"""A batch that is killed at random moments and resumed ends with the scenes of one left alone.

python benchmarks/killed_batch.py [SCENES [KILLS]]

`vggt batch` makes all scenes once undisturbed. Then again, with one worker and with two, each time
killed with SIGKILL, all processes at once or only the first, and started anew with --resume; after
so many kills it is left to end by itself. Kills are spread over the scenes; half of them wait for
one to be written. With one worker nothing is there at first; with two, other scenes are, which
give way. Compared is every file of both trees, byte for byte, but for what two runs of the same
job never share: see VOLATILE.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common import ROOT, write
from PIL import Image

SEED = 11
VOLATILE = ("seconds", "peak_memory_bytes")  # keys of report.json; it says nothing of the host
KILLS = 12  # of the batch, with one worker and again with two
GONE = 10.0  # seconds in which workers must end once the first process is dead
MODEL = ("--model", "mini", "--device", "cpu", "-q")


@dataclass
class Watched:
    """What was seen of a batch over all its runs."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # by what was killed
    said: Counter[str] = field(default_factory=Counter)  # lines that call a scene made, by scene
    faults: list[str] = field(default_factory=list)


class Pace(NamedTuple):
    """How kills are spread over the jobs."""

    scenes_a_run: int  # made before a kill, in the mean
    seconds: float  # that a scene takes


def photographs(folder: Path, count: int, numbers: random.Random) -> None:
    """Two to four small photos for each of `count` scenes: the same crop of neighbours in a row."""
    rendered = sorted((ROOT / "examples/rendered").glob("*.jpg"))
    pair = sorted((ROOT / "examples/motorcycle").glob("*.png"))
    for scene in range(count):
        target = folder / f"{scene:02d}"
        target.mkdir(parents=True)
        row = pair if scene % 5 == 4 else rendered
        taken = numbers.randint(2, min(4, len(row)))
        first = numbers.randint(0, len(row) - taken)
        x, y = numbers.random(), numbers.random()
        for path in row[first : first + taken]:
            with Image.open(path) as photo:
                w, h = photo.width * 3 // 4, photo.height * 3 // 4
                left, top = round(x * (photo.width - w)), round(y * (photo.height - h))
                small = photo.crop((left, top, left + w, top + h)).resize((160, 120))
            small.save(target / path.name)


def jobs(folder: Path, count: int) -> Path:
    """FOLDER/JOBS.jsonl, its scenes under FOLDER/scenes; every tenth is refined."""
    path = folder / "JOBS.jsonl"
    with path.open("w") as file:
        for scene in range(count):
            options: dict[str, Any] = {"points": 2000, "refine": "none", "resolution": 128}
            if scene % 10 == 3:
                options |= {"refine": "auto"}
            if scene % 10 == 6:
                options |= {"format": ["colmap-txt", "nerfstudio", "depth"], "save_tokens": True}
            places = {
                "input": str(folder.parent / "photos" / f"{scene:02d}"),
                "out": str(folder / "scenes" / f"{scene:02d}"),
            }
            file.write(json.dumps({**places, **options}) + "\n")
    return path


def begun(path: Path, *options: object) -> tuple[subprocess.Popen[bytes], Path]:
    """`vggt batch` of the jobs in processes of its own group; its lines go into a file."""
    folder = path.parent
    places = {"VGGT_HOME": folder / "home", "TMPDIR": folder / "temporary"}
    for place in places.values():
        place.mkdir(exist_ok=True)
    lines = folder / "lines"
    command = [sys.executable, "-m", "vggt_cli", "batch", path, *MODEL, *options]
    with lines.open("wb") as out, (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=out, stderr=errors, start_new_session=True,
            env={**os.environ, **{name: str(place) for name, place in places.items()}},
        )  # fmt: skip
    return process, lines


def undisturbed(path: Path) -> float:
    """All scenes in one run; its seconds."""
    start = time.perf_counter()
    process, _ = begun(path)
    assert process.wait() == 0, (path.parent / "errors").read_text()
    return time.perf_counter() - start


def disturbed(
    path: Path, workers: int, numbers: random.Random, kills: int, seconds: float
) -> Watched:
    """Runs of the jobs, so many of them killed; the last one ends by itself.

    seconds: that a scene takes.
    """
    seen = Watched()
    names = [json.loads(line)["out"] for line in path.read_text().splitlines()]
    pace = Pace(len(names) // (kills + 1), seconds)
    while True:
        process, file = begun(path, "--resume", "--workers", workers)
        seen.runs += 1
        if seen.kills.total() < kills:
            _wait_for_a_moment(process, file, path.parent / "scenes", numbers, pace)
            ended = not _killed(process, numbers, seen)
        else:
            ended = process.wait() is not None
        lines = file.read_text().splitlines(keepends=True)
        if not ended and lines and not lines[-1].endswith("\n"):
            seen.faults.append(f"a line is cut: {lines.pop()}")
        done = [json.loads(line) for line in lines]
        seen.faults += list(_faults(done, seen.said))
        seen.said.update(line["out"] for line in done if line["ok"] and not line["skipped"])
        if ended:
            if process.returncode or sorted(line["out"] for line in done) != sorted(names):
                seen.faults.append(f"the last run: {process.returncode}, {len(done)} lines")
            return seen


def _wait_for_a_moment(
    process: subprocess.Popen[bytes], file: Path, scenes: Path, numbers: random.Random, pace: Pace
) -> None:
    """Some scenes are made, or the program just begins; and then any moment of the next one."""
    made = numbers.randint(0, 2 * pace.scenes_a_run)
    while made and process.poll() is None and file.read_bytes().count(b'"skipped": false') < made:
        time.sleep(0.02)
    if numbers.random() < 0.5:
        while process.poll() is None and not any(name.startswith(".") for name in _names(scenes)):
            time.sleep(0.005)
        time.sleep(numbers.uniform(0, pace.seconds / 5))  # it takes so long to write one
    else:
        end = time.monotonic() + numbers.uniform(0, 2 * pace.seconds)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _killed(process: subprocess.Popen[bytes], numbers: random.Random, seen: Watched) -> bool:
    """Whether the kill came before the batch's end."""
    alone = numbers.random() < 0.5
    if process.poll() is not None:
        return False
    (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return False
    seen.kills["first process" if alone else "all processes"] += 1
    if not _gone(process.pid):
        seen.faults.append("workers outlived the first process")
        os.killpg(process.pid, signal.SIGKILL)
    return True


def _gone(group: int) -> bool:
    end = time.monotonic() + GONE
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def _faults(done: list[dict[str, Any]], made: Counter[str]) -> Iterator[str]:
    """What the lines of one run say that must not be. made: what earlier runs called made."""
    for name, times in Counter(line["out"] for line in done).items():
        if times > 1:
            yield f"{times} lines in one run: {name}"
    for line in done:
        if not line["ok"]:
            yield f"failed: {line['out']}: {line['error']}"
        elif made[line["out"]] and not line["skipped"]:
            yield f"made again: {line['out']}"


def differences(one: Path, other: Path) -> list[str]:
    """Files below the two folders that are not the same, but for VOLATILE."""
    there = [{p.relative_to(root) for p in root.rglob("*")} for root in (one, other)]
    found = [f"only in one: {name}" for name in sorted(there[0] ^ there[1])]
    for name in sorted(there[0] & there[1]):
        a, b = one / name, other / name
        if a.is_dir() != b.is_dir() or (a.is_file() and _content(a) != _content(b)):
            found.append(f"differs: {name}")
    return found


def _content(path: Path) -> object:
    if path.name != "report.json":
        return path.read_bytes()
    report = json.loads(path.read_text())
    return {key: value for key, value in report.items() if key not in VOLATILE}


def make_others(finished: Path, target: Path) -> None:
    """Scenes that the jobs did not make, where theirs will lie."""
    shutil.copytree(finished, target, symlinks=True)
    for path in target.glob("*/report.json"):
        report = json.loads(path.read_text())
        path.write_text(json.dumps({**report, "content": "another"}))


def measured(place: Path, count: int, kills: int = KILLS) -> dict[str, Any]:
    """The figures of `count` scenes, made in `place`."""
    numbers = random.Random(SEED)
    photographs(place / "photos", count, numbers)
    (place / "whole").mkdir()
    spent = undisturbed(jobs(place / "whole", count))
    whole = place / "whole/scenes"
    figures: dict[str, Any] = {
        "scenes": count,
        "files": sum(path.is_file() for path in whole.rglob("*")),
        "seconds undisturbed": round(spent, 1),
        "keys of report.json left out": VOLATILE,
    }
    for workers in (1, 2):
        folder = place / f"{workers}"
        folder.mkdir()
        if workers == 2:
            make_others(whole, folder / "scenes")
        seen = disturbed(jobs(folder, count), workers, numbers, kills, spent / count)
        figures[f"workers: {workers}"] = {
            "runs": seen.runs,
            "kills": dict(seen.kills),
            "scenes made": len(seen.said),
            "faults": seen.faults,
            "differences": differences(whole, folder / "scenes"),
            "left in the temporary folder": sorted(
                p.name for p in (folder / "temporary").iterdir()
            ),
        }
        print(json.dumps(figures[f"workers: {workers}"], indent=1), flush=True)
    return figures


def main(count: int, kills: int) -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as place:
        print(write("killed_batch", measured(Path(place), count, kills)))


if __name__ == "__main__":
    scenes, kills = [*map(int, sys.argv[1:]), *(50, KILLS)[len(sys.argv) - 1 :]]
    main(scenes, kills)
