"""One run at a time for a scene folder, and none that was killed leaves anything behind."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from vggt_cli.errors import OutputError

DRAFT = r"\.{}\.[a-z0-9_]{{8}}(\.old)?"  # what `export` writes beside a scene until it is whole


@contextlib.contextmanager
def claimed(folder: Path, locks: Path) -> Iterator[None]:
    """The block in which no other run works on `folder`; what a killed one left is cleared first.

    locks: a folder of the user's for lock files: beside a scene they would be litter. The system
    lets go of them when a process ends, however it does.
    Raises OutputError where another run works on it.
    """
    absolute = folder.absolute()
    name = hashlib.sha256(str(absolute).encode()).hexdigest()[:32]
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{name}.lock")
        with lock.acquire(timeout=0):
            _clear(absolute)
            yield
    except Timeout:
        raise OutputError(
            f"another run is working on: {folder}", hint="wait for it, or choose another folder"
        ) from None


def _clear(folder: Path) -> None:
    if not folder.parent.is_dir():
        return
    pattern = re.compile(DRAFT.format(re.escape(folder.name)))
    left = [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]
    whole = [path for path in left if path.suffix == ".old"]
    if whole and not folder.exists():  # killed between the two renames of an exchange
        whole.pop().rename(folder)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
