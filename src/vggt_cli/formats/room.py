"""Tensors on disk: what is too much for memory lies in files without names.

The system takes a file back when nothing holds its tensor any more, or the process ends,
however it does.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

import torch
from torch import Tensor

from vggt_cli.errors import OutputError

AT_ONCE = 32  # frames that are read at a time
_pages: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def on_disk(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in a file. Raises OutputError where the disk has no room for them."""
    count = math.prod(shape)
    size = max(1, count * dtype.itemsize)
    place = folder()
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            _reserve(file.fileno(), size)
            pages = mmap.mmap(file.fileno(), size)  # has a descriptor of its own
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        words = f"no room for {size / 1e9:.1f} GB" if full else "cannot write"
        raise OutputError(
            f"{words}: {place} ({error.strerror})", hint="set TMPDIR to a folder with space"
        ) from error
    _pages.add(pages)
    flat = torch.frombuffer(pages, dtype=dtype, count=count) if count else torch.empty(0).to(dtype)
    return flat.view(tuple(shape))


def let_go() -> None:
    """Give the memory of all that was read and written on disk back; the values stay."""
    for pages in list(_pages):
        if hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)


def chunks(frames: Sized, most: int | None = None) -> Iterator[slice]:
    """`most` frames after the other; what was read of them on disk is let go of in between.

    most: None: AT_ONCE.
    """
    most = most or AT_ONCE
    for start in range(0, len(frames), most):
        yield slice(start, min(start + most, len(frames)))
        let_go()


def folder() -> Path:
    """Where the files lie: TMPDIR, else /var/tmp, as /tmp is often memory itself."""
    usual = Path("/var/tmp")
    if "TMPDIR" not in os.environ and usual.is_dir() and os.access(usual, os.W_OK):
        return usual
    return Path(tempfile.gettempdir())


def _reserve(file: int, size: int) -> None:
    """All blocks now: to write into a hole of a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
