"""Where weights lie on this machine, and what their hashes have to be.

Places, in this order: the folder that comes with the tool, the user's cache (VGGT_HOME, else
~/.cache/vggt), the cache of the Hugging Face hub. A folder NAME of the user's cache holds
record.json with the file and its sha256; a file without a record is not there.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vggt_cli.models.catalog import Entry, entry

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def silent(done: int, total: int) -> None:
    """A Progress that tells nobody."""


@dataclass(frozen=True)
class Found:
    """A file of weights on this machine."""

    path: Path
    sha256: str | None  # what it has to be, where that was written down


def find(name: str) -> Path | None:
    """The file with the weights called `name`, or None; WeightsError for an unknown name."""
    found = locate(entry(name))
    return found.path if found else None


def locate(known: Entry) -> Found | None:
    """The file with the weights of `known` and the hash that it has to have, or None."""
    return _bundled(known) or _cached(known) or _in_hub_cache(known)


def home() -> Path:
    """The user's cache: VGGT_HOME, else `vggt` in the cache folder of the system."""
    if os.environ.get("VGGT_HOME"):
        return Path(os.environ["VGGT_HOME"]).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vggt"


def bundled() -> Path | None:
    """The folder of weights that come with the tool: in the package, or in a checkout."""
    package = Path(__file__).parents[1]
    places = (package / "_weights", package.parents[1] / "weights")
    return next((place for place in places if (place / "MANIFEST.json").is_file()), None)


def sha256(path: Path, progress: Progress = silent, fresh: bool = False) -> str:
    """The sha256 of a file, in hexadecimal.

    Remembered in the user's cache by path, size and time of change, because 5 GB take a while;
    with `fresh` it is always computed.
    """
    status = path.stat()
    what = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    note = home() / "hashes" / hashlib.sha256(what.encode()).hexdigest()
    if note.is_file() and not fresh:
        return note.read_text()
    digest = hashlib.sha256()
    for block in _blocks(path, progress):
        digest.update(block)
    with suppress(OSError):  # a cache that cannot be written costs time, not the run
        _write_text(note, digest.hexdigest())
    return digest.hexdigest()


def record(known: Entry, path: Path, digest: str) -> None:
    """Notes `path` in the user's cache as the weights of `known`."""
    folder = home() / known.name
    file = path.name if path.parent == folder else str(path.absolute())
    _write_text(folder / "record.json", json.dumps({"file": file, "sha256": digest}, indent=1))


def keep(known: Entry, source: Path, progress: Progress = silent) -> Path:
    """A copy of `source` in the user's cache, recorded; in place of what was there before.

    An OSError on the way leaves what was there before.
    """
    before, target = _cached(known), home() / known.name / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    record(known, target, _copy(source, target, progress))
    if before and before.path.parent == target.parent and before.path != target:
        before.path.unlink()
    return target


def _bundled(known: Entry) -> Found | None:
    folder = bundled()
    if not folder:
        return None
    facts = json.loads((folder / "MANIFEST.json").read_text()).get(known.name)
    there = facts and (folder / facts["file"]).is_file()
    return Found(folder / facts["file"], facts["sha256"]) if there else None


def _cached(known: Entry) -> Found | None:
    note = home() / known.name / "record.json"
    if not note.is_file():
        return None
    facts = json.loads(note.read_text())
    path = note.parent / facts["file"]  # absolute for a file in the hub's cache
    return Found(path, facts["sha256"]) if path.is_file() else None


def _in_hub_cache(known: Entry) -> Found | None:
    if not known.source:
        return None
    from huggingface_hub import try_to_load_from_cache

    for file in known.files:
        path = try_to_load_from_cache(known.source, file)
        if isinstance(path, str):
            # Large files are stored under their sha256, as the server announced it.
            blob = Path(path).resolve().name
            return Found(Path(path), blob if len(blob) == 64 else None)
    return None


def _copy(source: Path, target: Path, progress: Progress) -> str:
    """Copies beside `target` and renames; the sha256 of what was copied."""
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as beside:
        try:
            for block in _blocks(source, progress):
                beside.write(block)
                digest.update(block)
            beside.flush()
            Path(beside.name).replace(target)
        finally:
            Path(beside.name).unlink(missing_ok=True)
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def _blocks(path: Path, progress: Progress) -> Iterator[bytes]:
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while block := file.read(1 << 23):
            yield block
            done += len(block)
            progress(done, total)
