"""Which files are meant: folders, patterns and lists, in natural order. Nothing is opened here."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vggt_cli.errors import InputError

log = logging.getLogger(__name__)

RARE_SUFFIXES = (".avif", ".heic", ".heif", ".hif")  # few programs read them
SUFFIXES = (".bmp", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", *RARE_SUFFIXES)
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm")
KINDS = "JPEG, PNG, WebP, TIFF, BMP, HEIC, AVIF and video are read"
# Photos that people have and that are not read: named instead of passed over in silence.
OTHER_KINDS = (".arw", ".cr2", ".cr3", ".dng", ".gif", ".jp2", ".jxl", ".nef", ".orf", ".raf")


def find(source: str, without: Path | None = None) -> tuple[Path, list[Path]]:
    """The root folder and the files of `source`, in natural order: photos, or videos alone.

    What is named like a photo and is none, a pipe or a broken link for example, is among them:
    who opens it says what it is. Videos beside photos are left out, with a warning.
    source: a folder (searched with its subfolders, through links too, each folder once; hidden
    files are left out), one file, a glob pattern, or "-" for one path a line on standard input.
    without: a folder of masks, which may lie among the photos.
    Raises InputError if there is nothing to read.
    """
    path = Path(source)
    if source == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # names need not be text
        listed = [Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip()]
        return _common_root(listed, "standard input"), _photos_or_videos(listed)
    # Hidden folders that the pattern itself names are meant.
    base = Path(*itertools.takewhile(lambda part: not set("*?[") & set(part), path.parts[:-1]))
    matches: list[Path] = []
    with contextlib.suppress(OSError, ValueError):  # names too long, patterns that are none
        if path.is_dir():
            return path, _known(path, below(path, without), source)
        if path.is_file():
            return path.parent, [path]
        matches = list(base.glob(str(path.relative_to(base))))
    if not matches:
        raise InputError(f"no such folder, file or pattern: {source}", hint=KINDS)
    hidden = without.absolute() if without else None
    matches = [p for p in matches if not hidden or hidden not in p.absolute().parents]
    found = _known(base, matches, source)
    return _common_root(found, source), found


def is_video(path: Path) -> bool:
    """Whether the file is named like a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def name_in(root: Path, path: Path) -> str:
    """The path below `root`, with "/": what the photo is called."""
    inside = Path(os.path.abspath(path)).relative_to(os.path.abspath(root))  # noqa: PTH100  no ".."
    return inside.as_posix()


def _common_root(paths: Sequence[Path], source: str) -> Path:
    if not paths:
        raise InputError(f"no images in: {source}", hint=KINDS)
    folders = [os.path.dirname(os.path.abspath(path)) for path in paths]  # noqa: PTH100, PTH120
    return Path(os.path.commonpath(folders))


def below(root: Path, without: Path | None = None) -> Iterator[Path]:
    """All files below `root`; a folder that links lead to twice, or in a loop, counts once."""
    seen = {_identity(without)} if without and without.is_dir() else set()
    for folder, inner, files in os.walk(root, onerror=_unreadable, followlinks=True):
        here = Path(folder)
        if _identity(here) in seen:
            inner.clear()
            continue
        seen.add(_identity(here))
        inner[:] = [name for name in inner if not name.startswith(".")]
        # Folders themselves before links to them, so that a photo has the name of its own place.
        inner.sort(key=lambda name: ((here / name).is_symlink(), natural_order(name)))
        yield from (here / name for name in files)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> None:
    log.warning("left out, cannot be read: %s (%s)", error.filename, error.strerror)


def _known(root: Path, paths: Iterable[Path], source: str) -> list[Path]:
    """The files of known kinds below `root` that are not hidden, in natural order."""
    found: list[Path] = []
    other: list[Path] = []
    for path in paths:
        inside = path.relative_to(root)
        if any(part.startswith(".") and part != ".." for part in inside.parts) or path.is_dir():
            continue
        kind = path.suffix.lower()
        known = kind in SUFFIXES + VIDEO_SUFFIXES
        (found if known else other if kind in OTHER_KINDS else []).append(path)
    if other:
        log.warning("%d files left out, e.g. %s: %s", len(other), other[0].name, KINDS)
    if not found:
        raise InputError(f"no images in: {source}", hint=KINDS)
    found.sort(key=lambda path: natural_order(path.relative_to(root).as_posix()))
    return _photos_or_videos(found)


def _photos_or_videos(paths: list[Path]) -> list[Path]:
    photos = [path for path in paths if not is_video(path)]
    videos = [path for path in paths if is_video(path)]
    if photos and videos:
        names = ", ".join(path.name for path in videos[:3])
        log.warning("%d videos beside photos left out, give them alone: %s", len(videos), names)
    return photos or videos


def natural_order(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorting key under which `img2` comes before `img10`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    key = [_part(part) for part in parts]
    return key, name


def _part(part: str) -> tuple[int, int, str]:
    """Digits by their number; more of them than a file name holds are no number."""
    digits = part[0].isascii() and part[0].isdigit() and len(part) < 1000
    return (0, int(part), "") if digits else (1, 0, part)
