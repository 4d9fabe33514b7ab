"""What the user gives, photos or videos and masks, as one photo set."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vggt_cli.errors import InputError
from vggt_cli.formats import decode, files, images, masks, video
from vggt_cli.reconstruction.stages import Progress
from vggt_cli.scene import Frame, Shaping

log = logging.getLogger(__name__)

FRAMES = 200  # of videos, at most, unless told


@dataclass(frozen=True)
class InputOptions:
    """What is made of a source."""

    fps: float | None  # keyframes a second of a video; None: by motion
    frames: int | None  # of all videos, at most; None: FRAMES
    masks: str | None  # folder: see formats.masks.matching
    strict: bool  # what cannot be read stops the run


@dataclass(frozen=True)
class Sources:
    """Photos and keyframes, still on disk."""

    root: Path
    paths: Sequence[Path]
    masks: Sequence[Path | None]  # of each path
    frames: Mapping[Path, Frame]  # of those paths that are of a video
    unread: Sequence[tuple[str, str]]  # videos left out, and why
    warnings: Sequence[str]


def gather(root: Path, paths: list[Path], options: InputOptions, progress: Progress) -> Sources:
    """The photos that `find` found, or keyframes of the videos, which are decoded for that.

    Raises InputError for videos that cannot be read: with `strict` for one, else for all.
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
    return Sources(root, paths, found, frames, unread, _bare(found, paths, options))


def read(
    sources: Sources,
    shaping: Shaping,
    on_disk: tuple[int, int] | None,
    strict: bool,
    progress: Progress,
) -> images.Loaded:
    """The photos at the network's size; with `on_disk` see `images.load`.

    Raises InputError for what cannot be read: with `strict` for one photo, else for all.
    """
    count = len(sources.paths)

    def said(done: int) -> None:
        progress("load images", done, count)

    loaded = images.load(sources.root, sources.paths, shaping, said, sources.masks, on_disk)
    _refuse(loaded.unreadable, strict)
    photos = [dataclasses.replace(p, frame=sources.frames.get(p.path)) for p in loaded.photos]
    return images.Loaded(loaded.images, tuple(photos), (*sources.unread, *loaded.unreadable))


def find(source: str, options: InputOptions) -> tuple[Path, list[Path]]:
    """`files.find`, with options that fit what is there; raises InputError."""
    root, paths = files.find(source, None if options.masks is None else Path(options.masks))
    if not files.is_video(paths[0]) and (options.fps or options.frames):
        raise InputError(f"--fps and --frames are of videos, and here are photos: {source}")
    return root, paths


def measured(paths: Sequence[Path], options: InputOptions) -> tuple[int, list[tuple[int, int]]]:
    """How many images `read` gives, at most, and (height, width) of them or of each video's."""
    if not files.is_video(paths[0]):
        return len(paths), decode.upright_sizes(paths)
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
