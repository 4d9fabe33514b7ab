"""Photos out: rewritten copies for images/, where the file itself will not do, and masks."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats.decode import eight_bit, kept, over, turned
from vggt_cli.formats.files import KINDS
from vggt_cli.formats.headers import UNREADABLE, exif_of, opened, orientation_of
from vggt_cli.geometry import distort, pixel_centers, reframe, sample
from vggt_cli.scene import RECODED, Photo

ROWS = 128  # resampled at a time: a photo of 12 megapixels takes about 300 MB in all
Lens = tuple[Tensor, Tensor, Tensor]  # intrinsics, radial term, intrinsics without it
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
    turned, how = _upright_file(photo.path)
    turned.save(target, **how)


def straight_copy(photo: Photo, target: Path, lens: Lens) -> None:
    """Write `photo` to `target` upright, as a pinhole camera sees it: see `_straight`.

    Size, kind of file, bits, alpha, ICC and EXIF stay; palettes become colours.
    """
    turned, how = _upright_file(photo.path)
    _straight(_continuous(turned), lens).save(target, **how)


def mask_copy(photo: Photo, target: Path, lens: Lens | None) -> None:
    """Write the mask of `photo` to `target`, a PNG in the pixels of its copy: 255 counts, 0 not."""
    keep = kept(photo)
    if lens is not None:
        keep = _straight(keep, lens).point(lambda value: 255 if value >= 128 else 0)
    keep.save(target, "PNG")


def _straight(image: Image.Image, lens: Lens) -> Image.Image:
    """The upright image as a pinhole camera sees it, of the same size.

    lens: [3, 3] in pixels of the upright photo, [] its term, see `geometry.distort`, and [3, 3]
    without it, see `geometry.straight_intrinsics`.
    """
    source: Values = np.atleast_3d(np.asarray(image))  # [H, W, C]
    H, W = source.shape[:2]
    bent, term, pinhole = (part.double() for part in lens)
    result = np.empty_like(source)
    for top in range(0, H, ROWS):
        xy = pixel_centers((min(ROWS, H - top), W), bent)
        xy[..., 1] += top
        seen = distort(reframe(xy, pinhole, bent), bent, term)
        result[top : top + ROWS] = _sampled(source, seen, image.mode in ("RGBA", "LA"))
    return Image.frombytes(image.mode, image.size, result.tobytes())


def _upright_file(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """The photo upright, in its own mode, and how to save it: its kind, ICC and other EXIF kept.

    What few programs read (HEIC, AVIF) becomes a JPEG. Raises InputError if it cannot be read.
    """
    try:
        with opened(path) as image:
            image.load()
            kind = "JPEG" if image.format in ("MPO", *RECODED) else image.format
            icc = image.info.get("icc_profile")
            upright = turned(image.copy(), orientation_of(image))
            exif = exif_of(upright)  # of the copy: a TIFF's own has its layout too
            if image.format in RECODED:
                upright = over(eight_bit(upright), "white")
    except UNREADABLE as error:
        raise InputError(f"cannot be read: {path} ({error})", hint=KINDS) from error
    exif.pop(ExifTags.Base.Orientation, None)
    try:
        writable = len(exif.tobytes()) < 65533 or kind != "JPEG"  # what its segment holds
    except UNREADABLE:
        writable = False  # nonsense
    quality = {"quality": 95, "subsampling": 0} if kind in ("JPEG", "WEBP") else {}
    return upright, {
        "format": kind,
        "exif": exif if writable else b"",
        "icc_profile": icc,
        **quality,
    }


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
