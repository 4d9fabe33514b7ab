"""What a scene is made of, as one hash: where it is the same, so is the scene."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vggt_cli import __version__
from vggt_cli.formats.files import below, name_in

FILES = ("intrinsics", "poses", "masks")  # name a file or folder whose content counts
# Change no result, as far as a user can tell beforehand: memory that is free is not said either.
NO_RESULT = ("max_memory", "offline", "require_commercial", "strict")


def key(root: Path, paths: Sequence[Path], options: Mapping[str, Any], weights: str) -> str:
    """sha256 of the photos with their names, of the options and of the weights' sha256.

    Photos that cannot be read count by name, and so do files that an option names, within their
    folder. Other versions of this tool give other keys.
    """
    known = {k: v for k, v in options.items() if k not in NO_RESULT}
    given = [Path(known[k]) for k in FILES if known.get(k)]
    inside = [(g, f) for g in given for f in (sorted(below(g)) if g.is_dir() else [g])]
    photos = [(name_in(root, path), path) for path in paths]
    named = [*photos, *((name_in(g, f), f) for g, f in inside if f.is_file())]
    with ThreadPoolExecutor() as threads:  # hashing lets go of Python's lock
        digests = list(threads.map(_digest, [path for _, path in named]))
    files = [(name, digest) for (name, _), digest in zip(named, digests, strict=True)]
    said = [__version__, weights, known, files[: len(photos)], files[len(photos) :]]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
