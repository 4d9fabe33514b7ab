"""Photos out: rewritten copies for images/, where the file itself will not do."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vggt_cli.formats.images import upright_file
from vggt_cli.geometry import distort, pixel_centers, reframe, sample
from vggt_cli.scene import Photo

ROWS = 128  # resampled at a time: a photo of 12 megapixels takes about 300 MB in all
Values = np.ndarray[tuple[int, ...], np.dtype[Any]]


def clone(source: Path, target: Path) -> None:
    """`target` with the content of `source`: reflink where the disk can, hard link, else copy."""
    if sys.platform == "linux":
        import fcntl

        with source.open("rb") as original, target.open("wb") as copy, _if_possible():
            fcntl.ioctl(copy, 0x40049409, original.fileno())  # FICLONE
            return
        target.unlink()
    with _if_possible():
        os.link(source.resolve(), target)
        return
    shutil.copy2(source, target)


def _if_possible() -> contextlib.suppress:
    return contextlib.suppress(OSError)


def upright_copy(photo: Photo, target: Path) -> None:
    """Write `photo` to `target` turned upright: orientation reset, ICC and other EXIF kept."""
    turned, how = upright_file(photo.path)
    turned.save(target, **how)


def straight_copy(
    photo: Photo, target: Path, intrinsics: Tensor, radial: Tensor, straight: Tensor
) -> None:
    """Write `photo` to `target` upright, as a pinhole camera of intrinsics `straight` sees it.

    Size, kind of file, bits, alpha, ICC and EXIF stay; palettes become colours.
    intrinsics, straight: [3, 3] in pixels of the upright photo, with its lens and without: see
    `geometry.straight_intrinsics`. radial: [] the lens's term, see `geometry.distort`.
    """
    turned, how = upright_file(photo.path)
    image = _continuous(turned)
    source: Values = np.atleast_3d(np.asarray(image))  # [H, W, C]
    H, W = source.shape[:2]
    lens, term, pinhole = intrinsics.double(), radial.double(), straight.double()
    result = np.empty_like(source)
    for top in range(0, H, ROWS):
        xy = pixel_centers((min(ROWS, H - top), W), lens)
        xy[..., 1] += top
        seen = distort(reframe(xy, pinhole, lens), lens, term)
        result[top : top + ROWS] = _sampled(source, seen, image.mode in ("RGBA", "LA"))
    Image.frombytes(image.mode, image.size, result.tobytes()).save(target, **how)


def _continuous(image: Image.Image) -> Image.Image:
    """The image in a mode whose values can be averaged: no palette, no colour that means none."""
    if image.mode in ("RGBA", "LA", "F") or image.mode.startswith("I"):
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert({"1": "L", "P": "RGB"}.get(image.mode, image.mode))


def _sampled(source: Values, xy: Tensor, with_alpha: bool) -> Values:
    """The image [H, W, C] at pixels `xy` [h, w, 2]; what is transparent has no say in colours."""
    xy = xy.nan_to_num(0.0)
    first = max(0, int(xy[..., 1].min()) - 2)  # bicubic: two rows above and below
    part = source[first : int(xy[..., 1].max()) + 3]
    values = torch.from_numpy(part.astype(np.float32)).permute(2, 0, 1)
    if with_alpha:
        values = torch.cat([values[:-1] * values[-1:], values[-1:]])
    found = sample(values, xy - torch.tensor([0, first]))
    if with_alpha:
        found = torch.cat([found[:-1] / found[-1:].clamp(min=0.5), found[-1:]])
    found = found.clamp(float(part.min()), float(part.max()))  # bicubic swings over
    return (found.round() if source.dtype.kind in "iu" else found).permute(1, 2, 0).numpy()
