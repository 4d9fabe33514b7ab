"""One run at a time for a scene folder, and none that was killed leaves anything behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
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
    Raises OutputError where another run works on it, or `locks` cannot be written.
    """
    there = folder.resolve()  # a link and its target are one folder
    name = hashlib.sha256(os.fsencode(there)).hexdigest()[:32]
    lock = FileLock(locks / f"{name}.lock")
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"another run is working on: {folder}", hint="wait for it, or choose another folder"
        ) from None
    except OSError as error:
        raise OutputError(
            f"cannot write: {locks} ({error.strerror or error})",
            hint="set VGGT_HOME to a folder that can be written",
        ) from error
    try:
        _clear(there)
        yield
    finally:
        lock.release()


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
