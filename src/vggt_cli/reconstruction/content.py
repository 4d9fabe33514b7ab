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

    Photos that cannot be read count by name. Of a file or folder that an option names counts what
    is in it, with names, and not where it is. Other versions of this tool give other keys.
    """
    given = {k: Path(options[k]) for k in FILES if options.get(k) and Path(options[k]).exists()}
    known = {k: v for k, v in options.items() if k not in (*NO_RESULT, *given)}
    named = [("", name_in(root, path), path) for path in paths]
    for option, place in given.items():
        inside = sorted(below(place)) if place.is_dir() else [place]
        named += [(option, name_in(place, file), file) for file in inside if file.is_file()]
    with ThreadPoolExecutor() as threads:  # hashing lets go of Python's lock
        digests = threads.map(_digest, [path for *_, path in named])
        files = [(*name, digest) for (*name, _), digest in zip(named, digests, strict=True)]
    said = [__version__, weights, known, files]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    if not path.is_file():  # a pipe would never end
        return ""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
