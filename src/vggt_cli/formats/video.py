"""Videos in: sharp keyframes, spaced by how far the view has moved. The one door to PyAV."""

from __future__ import annotations

import logging
import math
import shutil
import socket
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from vggt_cli.errors import InputError, OutputError
from vggt_cli.formats.files import name_in
from vggt_cli.formats.headers import most_pixels
from vggt_cli.formats.motion import BLOCK, LONGEST, STEP, Since, View
from vggt_cli.scene import Frame

if TYPE_CHECKING:  # an extra, and slow to load
    import av

log = logging.getLogger(__name__)

SPACING = 0.1  # seconds between keyframes, at least, however fast the view moves
LOOKS = 30  # frames a second that are looked at, at most
FINER = 4  # times as many pixels as for motion is sharpness measured at
# Containers of one file: a playlist that calls itself .mp4 would open others, by any protocol.
CONTAINERS = "avi,matroska,mov,mpeg,mpegts,webm"


class Look(NamedTuple):
    """A frame as the choice sees it."""

    number: int  # from 0
    seconds: float
    frame: av.VideoFrame
    sharpness: float
    view: View


class _Folder:
    """A folder that is deleted when nothing holds this any more, or the program ends.

    It is locked, and the system lets go of a lock when a process ends, however it does: what
    killed ones of this user and host left goes with the next.
    """

    def __init__(self) -> None:
        prefix = f"vggt-frames-{socket.gethostname()}-"  # no lock is sure to hold for other hosts
        outer = Path(tempfile.mkdtemp(prefix=prefix))
        weakref.finalize(self, shutil.rmtree, outer, ignore_errors=True)
        for left in outer.parent.glob(f"{prefix}????????"):
            # Another user's might be a trap; what was never locked may be at its beginning.
            with suppress(OSError):
                if left.lstat().st_uid == outer.stat().st_uid and (left / "locked").is_dir():
                    with FileLock(left / "lock", timeout=0):
                        shutil.rmtree(left, ignore_errors=True)
        self.lock = FileLock(outer / "lock", timeout=0, thread_local=False)
        with suppress(OSError, NotImplementedError):  # a disk without locks
            self.lock.acquire()
        self.path = outer / ("locked" if self.lock.is_locked else "frames")


def as_photos(
    root: Path,
    videos: list[Path],
    fps: float | None,
    most: int,
    progress: Callable[[int, int], None],
) -> tuple[Path, dict[Path, Frame], list[tuple[str, str]]]:
    """Keyframes of the `videos` as JPEG files of quality 95: their root, they, and what is unread.

    The files are called VIDEO_NUMBER.jpg, with the video's ending where two differ by no more, and
    last as long as one of their `Frame`s.
    fps: so many a second, the sharpest in its time; None: by motion. most: of all videos together.
    progress: called with the seconds done and all.
    Raises InputError without PyAV, or if no video can be read; OutputError where the disk is full.
    """
    _av(videos[0])
    folder = _Folder()
    frames: dict[Path, Frame] = {}
    unread: list[tuple[str, str]] = []
    share = max(1, most // len(videos))
    bare = Counter(path.absolute().with_suffix("") for path in videos)
    for path in videos:
        name = name_in(root, path)
        alone = bare[path.absolute().with_suffix("")] == 1
        target = folder.path / (Path(name).with_suffix("") if alone else name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            found = _written(keyframes(path, fps, progress), target, share)
        except InputError as error:
            unread.append((name, str(error)))
            log.warning("left out: %s", error)
            continue
        except OSError as error:
            raise OutputError(
                f"cannot write frames: {folder.path} ({error.strerror or error})",
                hint="set TMPDIR to a folder with space",
            ) from error
        for file, number, seconds in found:
            frames[file] = Frame(name, number, seconds, folder)
        log.info("%s: %d keyframes", name, len(found))
    if not frames:
        raise InputError("; ".join(why for _, why in unread[:3]))
    if len(frames) > most:  # of more videos than that
        even = np.linspace(0, len(frames) - 1, most).round().astype(int)
        frames = dict(list(frames.items())[i] for i in even)
    return folder.path, frames, unread


def _written(looks: Iterable[Look], target: Path, most: int) -> list[tuple[Path, int, float]]:
    """Files of at most `most` of the `looks`, evenly chosen; never are there twice as many."""
    found: list[tuple[Path, int, float]] = []
    stride = 1
    for index, look in enumerate(looks):
        if index % stride:
            continue
        file = target.with_name(f"{target.name}_{look.number:06d}.jpg")
        picture(look.frame).save(file, quality=95, subsampling=0)
        found.append((file, look.number, look.seconds))
        if len(found) > 2 * most:
            found, stride = _only(found, range(0, len(found), 2)), 2 * stride
    even = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return _only(found, even.tolist())


def _only(
    found: list[tuple[Path, int, float]], which: Iterable[int]
) -> list[tuple[Path, int, float]]:
    left = [found[i] for i in which]
    for file, _, _ in set(found) - set(left):
        file.unlink()
    return left


def picture(frame: av.VideoFrame) -> Image.Image:
    """The frame as it is shown: square pixels, turned as the video's header says."""
    shape = getattr(frame, "sample_aspect_ratio", None) or 1
    rgb = frame.reformat(width=round(frame.width * shape), format="rgb24").to_ndarray()
    return Image.fromarray(np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90))))


def keyframes(
    path: Path, fps: float | None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Look]:
    """Frames of the video, each the sharpest of its neighbours, one decoded after the other.

    fps: one in each 1 / fps seconds; None: one for each STEP that the view moves.
    Raises InputError where PyAV is missing or nothing can be decoded.
    """
    looks = _looks(path, LOOKS if fps is None else max(LOOKS, fps), progress)
    return by_motion(looks) if fps is None else by_time(looks, fps)


def by_motion(looks: Iterable[Look]) -> Iterator[Look]:
    """The sharpest at the beginning, then of each half step that lies a step behind the last."""
    reference: Look | None = None
    best: Look | None = None
    opening = True
    for look in looks:
        if reference is None:
            reference, since = look, Since(look.view)
        moved = since.moved(look.view)
        if opening and best and moved >= STEP / 2:
            yield best
            reference, since, best, opening = best, Since(best.view), None, False
            moved = since.moved(look.view)
        if not opening and look.seconds - reference.seconds < SPACING:
            continue
        if opening or moved >= STEP / 2:
            best = _sharper(best, look)
        if not opening and best and moved >= STEP:
            yield best
            reference, since, best = best, Since(best.view), None
    # What is left at the end had no choice: it may be blurred.
    if best and reference and (opening or best.sharpness > reference.sharpness / 2):
        yield best


def by_time(looks: Iterable[Look], fps: float) -> Iterator[Look]:
    """The sharpest of each 1 / fps seconds."""
    best: Look | None = None
    begin, slot = 0.0, 0
    for look in looks:
        begin = begin if best else look.seconds
        now = math.floor((look.seconds - begin) * fps + 1e-6)
        if best and now != slot:
            yield best
            best = None
        slot, best = now, _sharper(best, look)
    if best:
        yield best


def _sharper(best: Look | None, look: Look) -> Look:
    return look if best is None or look.sharpness > best.sharpness else best


def _look(frame: av.VideoFrame, number: int, seconds: float, scaled: Any) -> Look:
    """The frame with its view and its sharpness: the mean square of its Laplacian."""
    scale = FINER * LONGEST / max(frame.width, frame.height)
    w, h = (
        max(FINER * BLOCK, round(side * scale)) // FINER * FINER
        for side in (frame.width, frame.height)
    )
    gray = scaled(frame, w, h, "gray", threads=1).to_ndarray().astype(np.float32)
    inner = gray[1:-1, 1:-1]
    around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    small = gray.reshape(h // FINER, FINER, w // FINER, FINER).mean((1, 3))
    sharpness = float(np.square(around - 4 * inner).mean())
    return Look(number, seconds, frame, sharpness, View.of(small))


def _looks(path: Path, most: float, progress: Callable[[int, int], None]) -> Iterator[Look]:
    """At most `most` frames a second of the video, in order."""
    last = -math.inf
    # One for all frames: each would make its own, with threads, and take ten times as long.
    scaled = _av(path).video.reformatter.VideoReformatter().reformat
    for number, (frame, seconds, duration) in enumerate(_decoded(path)):
        if seconds - last >= 0.9 / most:
            last = seconds
            progress(int(seconds), math.ceil(duration))
            yield _look(frame, number, seconds, scaled)


def _decoded(path: Path) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """Every frame that can be decoded, its time from the start and the length of all in seconds."""
    av, failed, count, begin = _av(path), "", 0, 0.0
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate, duration = float(stream.guessed_rate or 25), (container.duration or 0) / 1e6
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
            except av.FFmpegError as error:
                failed = error.strerror or str(error)
                if not isinstance(error, av.InvalidDataError):
                    break
                continue
            for frame in frames:
                seconds = count / rate if frame.time is None else frame.time
                begin = begin if count else seconds
                count += 1
                yield frame, seconds - begin, duration
            if packet is None:
                break
    if not count:
        raise InputError(f"no frame can be decoded: {path} ({failed or 'empty'})")
    if failed:
        log.warning("parts of a video cannot be decoded: %s (%s)", path, failed)


def _av(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        hint = "pip install 'vggt-cli[video]'"
        raise InputError(f"videos are read by PyAV, which is not here: {path}", hint) from error
    return av


def _opened(path: Path) -> Any:
    """The container of the video; closes at the end of a with statement. Raises InputError."""
    av = _av(path)
    if not path.is_file():
        raise InputError(f"cannot be read: {path} (no such file, or not a regular one)")
    only = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(str(path.absolute()), options=only)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"cannot be read: {path} ({error.strerror or error})") from error
    pixels = max((s.width * s.height for s in container.streams.video), default=0)
    if not 0 < pixels <= most_pixels():
        container.close()
        why = f"frames of {pixels} pixels" if pixels else "no video in it"
        raise InputError(f"cannot be read: {path} ({why})")
    return container


def header(path: Path) -> tuple[tuple[int, int], float]:
    """(height, width) of the upright frames, and the length in seconds. Raises InputError."""
    frame, _, duration = next(_decoded(path))
    w, h = picture(frame).size
    return (h, w), duration
