"""What the user gives, photos or videos and masks, as one photo set."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vggt_cli.errors import InputError
from vggt_cli.formats import files, images, masks, video
from vggt_cli.reconstruction.stages import Progress
from vggt_cli.scene import Frame, Shaping

log = logging.getLogger(__name__)

FRAMES = 200  # of videos, at most, unless told


@dataclass(frozen=True)
class InputOptions:
    """What `read` makes of its source."""

    fps: float | None  # keyframes a second of a video; None: by motion
    frames: int | None  # of all videos, at most; None: FRAMES
    masks: str | None  # folder: see formats.masks.matching
    strict: bool  # what cannot be read stops the run


def read(
    root: Path, paths: list[Path], shaping: Shaping, options: InputOptions, progress: Progress
) -> tuple[images.Loaded, list[str]]:
    """The photos that `find` found, or keyframes of the videos, and warnings.

    Raises InputError for what cannot be read: with `strict` for one file, else for all.
    """
    unread: list[tuple[str, str]] = []
    frames: dict[Path, Frame] = {}
    if files.is_video(paths[0]):
        most = options.frames or FRAMES
        root, frames, unread = video.as_photos(
            root, paths, options.fps, most, partial(progress, "choose keyframes")
        )
        paths = list(frames)
        _refuse(unread, options.strict)
    found: Sequence[Path | None] = [None] * len(paths)
    if options.masks is not None:
        names = [files.name_in(root, path) for path in paths]
        found = masks.matching(Path(options.masks), names)
    loaded = images.load(
        root, paths, shaping, lambda n: progress("load images", n, len(paths)), found
    )
    _refuse(loaded.unreadable, options.strict)
    photos = [dataclasses.replace(p, frame=frames.get(p.path)) for p in loaded.photos]
    unreadable = (*unread, *loaded.unreadable)
    return images.Loaded(loaded.images, tuple(photos), unreadable), _bare(found, paths, options)


def find(source: str, options: InputOptions) -> tuple[Path, list[Path]]:
    """`files.find`, with options that fit what is there; raises InputError."""
    root, paths = files.find(source, None if options.masks is None else Path(options.masks))
    if not files.is_video(paths[0]) and (options.fps or options.frames):
        raise InputError(f"--fps and --frames are of videos, and here are photos: {source}")
    return root, paths


def measured(paths: Sequence[Path], options: InputOptions) -> tuple[int, list[tuple[int, int]]]:
    """How many images `read` gives, at most, and (height, width) of them or of each video's."""
    if not files.is_video(paths[0]):
        return len(paths), images.upright_sizes(paths)
    sizes, seconds = zip(*(video.header(path) for path in paths), strict=True)
    most = options.frames or FRAMES
    count = most if options.fps is None else min(most, round(sum(seconds) * options.fps) or 1)
    return count, list(sizes)


def _bare(found: Sequence[Path | None], paths: Sequence[Path], options: InputOptions) -> list[str]:
    """A warning for photos without a mask where there are masks."""
    bare = [path.name for path, mask in zip(paths, found, strict=True) if mask is None]
    if options.masks is None or not bare:
        return []
    words = f"{len(bare)} of {len(paths)} photos have no mask, so all of them counts"
    words = f"{words}, e.g. {bare[0]}"
    log.warning("%s", words)
    return [words]


def _refuse(unreadable: Sequence[tuple[str, Any]], strict: bool) -> None:
    if strict and unreadable:
        name, why = unreadable[0]
        raise InputError(f"cannot be read: {name} ({why})", hint="leave out --strict to go on")
