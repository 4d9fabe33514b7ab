"""The features of photos at full size, kept in the user's cache by what the files hold."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from vggt_cli.errors import InputError
from vggt_cli.formats import decode
from vggt_cli.formats import features as third
from vggt_cli.formats.colmap import Array
from vggt_cli.formats.features import Features
from vggt_cli.models.store import home, sha256
from vggt_cli.scene import Photo

log = logging.getLogger(__name__)

LONGEST = {"sift": 3200, "xfeat": 1600}  # pixels: larger photos are reduced (COLMAP's for SIFT)
BATCH = 8  # photos in memory at a time
THREADS = 4  # at most: each holds about 0.5 GB
VERSION = 1  # part of a cached file's name: changes with what is found in the same photo
CACHE_SIZE = 4 << 30  # bytes: about 3000 photos; the files not used for longest go first


def cache_folder() -> Path:
    """Where features are kept unless another place is given."""
    return home() / "features"


def sift(
    photos: Sequence[Photo], cache: Path | None, progress: Callable[[int], None]
) -> list[Features]:
    """SIFT features of each photo, in pixels of the upright file; largest first.

    Photos whose longer side is over 3200 pixels are reduced to that. A file that has become
    unreadable has none. cache: folder, or None for none. progress: photos done.
    """
    found: list[Features] = []
    threads = max(1, min(THREADS, os.cpu_count() or 1))
    for start in range(0, len(photos), BATCH):
        batch = photos[start : start + BATCH]
        entries = [_entry(photo, "sift", cache) for photo in batch]
        known = [_read(entry) for entry in entries]
        missing = [i for i, features in enumerate(known) if features is None]
        with ThreadPoolExecutor(threads) as pool:
            grays = list(pool.map(lambda i, of=batch: _gray(of[i], "sift"), missing))
        for i, gray, features in zip(missing, grays, third.sift(grays, threads), strict=True):
            known[i] = _in_file(features, gray, batch[i])
            _write(entries[i], known[i])
        found += [features for features in known if features is not None]
        progress(len(found))
    if cache:
        _prune(cache)
    return found


def xfeat(photo: Photo, cache: Path | None) -> Features:
    """XFeat's features of a photo, as `sift`; its longer side reduced to 1600 pixels.

    Raises InputError where the extra `features` is not installed.
    """
    entry = _entry(photo, "xfeat", cache)
    known = _read(entry)
    if known is None:
        gray = _gray(photo, "xfeat")
        known = _in_file(third.xfeat(gray), gray, photo)
        _write(entry, known)
    return known


def _gray(photo: Photo, kind: str) -> Array:
    try:
        return decode.gray(photo.path, LONGEST[kind])
    except InputError as error:
        log.warning("no features: %s", error)
        return np.zeros((1, 1), np.uint8)


def _in_file(features: Features, gray: Array, photo: Photo) -> Features:
    h, w = gray.shape
    scale = np.array([photo.size[1] / w, photo.size[0] / h])
    return Features((features.xy * scale).astype(np.float32), features.vectors)


def _entry(photo: Photo, kind: str, cache: Path | None) -> Path | None:
    """The file of the cache for what `photo` holds now, or None."""
    if cache is None or not photo.path.is_file():
        return None
    what = (sha256(photo.path), kind, VERSION, LONGEST[kind], third.FEATURES, third.LEARNED)
    return cache / f"{hashlib.sha256(repr(what).encode()).hexdigest()}.npz"


def _read(entry: Path | None) -> Features | None:
    """What a whole file of the cache holds; it counts as used now."""
    try:
        if entry is None:
            return None
        with np.load(io.BytesIO(entry.read_bytes()), allow_pickle=False) as kept:
            features = Features(kept["xy"], kept["vectors"])
        entry.touch()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return features


def _write(entry: Path | None, features: Features | None) -> None:
    """Written beside and renamed; a cache that cannot be written costs time, not the run."""
    if entry is None or features is None:
        return
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, xy=features.xy, vectors=features.vectors)
        beside = entry.with_name(f"{entry.name}.{os.getpid()}")
        beside.write_bytes(buffer.getvalue())
        beside.replace(entry)


def _prune(cache: Path) -> None:
    """Deletes the files that were not used for longest until the cache is within its size."""
    with suppress(OSError):
        kept = sorted(((p.stat().st_mtime, p) for p in cache.glob("*.npz*")), reverse=True)
        total = 0
        for _, path in kept:
            total += path.stat().st_size
            if total > CACHE_SIZE:
                path.unlink()
