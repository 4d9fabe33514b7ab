"""One photo in: decoded upright, in 8 bits a channel.

The one door to Pillow's decoders, with `headers`. "Source" is the upright image: EXIF
rotation is applied at decoding, and every map, size and pixel of the outputs refers to it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats.files import KINDS
from vggt_cli.formats.headers import UNREADABLE, exif_of, opened, orientation_of
from vggt_cli.scene import Photo

# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as this many of its pixels are left
# for each pixel of the network: the result then differs by less than a grey level on average.
DRAFT_OVERSAMPLING = 2
ONE_BY_ONE = 2**25  # pixels: larger photos are decoded one at a time, whatever the threads
TURNED = {  # by EXIF's orientation: what makes the photo upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_large = threading.Lock()
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def read(
    path: Path, name: str, shape: Callable[[tuple[int, int]], tuple[int, int]], mask: Path | None
) -> tuple[Photo, Tensor] | str:
    """The photo with its RGBA pixels [4, h, w] uint8 at network size, or why it cannot be read."""
    try:
        with opened(path) as image:
            rotated = orientation_of(image) != 1
            kind, source = image.format or "", _upright_size(image)
            size = shape(source)
            h, w = size if image.size == source[::-1] else size[::-1]  # as stored
            image.draft(None, (w * DRAFT_OVERSAMPLING, h * DRAFT_OVERSAMPLING))  # JPEG alone
            exif = _camera(exif_of(image))
            rgba = resized(_decoded(image), size)
    except FileNotFoundError:
        return "no such file"
    except UNREADABLE as error:
        return str(error).replace(str(path), path.name) or type(error).__name__
    clear = bool((rgba[3] < 128).any())
    photo = Photo(path, name, source, rotated, *exif, kind=kind, mask=mask, transparent=clear)
    if mask is not None:
        keep = _mask(mask, photo).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        rgba[3] = np.minimum(rgba[3], np.asarray(keep))
    return photo, torch.from_numpy(rgba)


def kept(photo: Photo) -> Image.Image:
    """Which pixels of the upright photo count, by its mask and its alpha: 255, else 0, mode L.

    Raises InputError for a mask that cannot be read or has another size.
    """
    keep = Image.new("L", photo.size[::-1], 255)
    if photo.mask is not None:
        keep = _mask(photo.mask, photo)
    if photo.transparent:
        keep = ImageChops.darker(keep, _white(_upright(photo.path).getchannel("A")))
    return keep


def _mask(path: Path, photo: Photo) -> Image.Image:
    """The mask at `path` in the pixels of the upright photo: 255 where it is white, else 0."""
    gray = over(_upright(path), "black").convert("L")
    if gray.getextrema()[1] == 1:  # written as 0 and 1
        gray = gray.point(lambda value: 255 * value)
    if photo.rotated and gray.size == photo.size != photo.size[::-1]:  # as the file is stored
        with opened(photo.path) as image:
            gray = gray.transpose(TURNED[orientation_of(image)])
    if gray.size != photo.size[::-1]:
        found, wanted = words(gray.size[::-1]), words(photo.size)
        raise InputError(f"the mask of {photo.name} is {found}, the photo {wanted}: {path}")
    return _white(gray)


def _white(gray: Image.Image) -> Image.Image:
    return gray.point(lambda value: 255 if value >= 128 else 0)


def window(
    path: Path, source_size: tuple[int, int], box: Box, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Pixels [3, h, w] float32 in [0, 1] and opaque [h, w] of a part of a photo, at `size`.

    box: left, top, right, bottom in pixels of the upright photo, which has `source_size`; not
    necessarily whole ones. Raises InputError if the file cannot be read or has another size.
    """
    upright = _upright(path)
    if upright.size != source_size[::-1]:
        found, wanted = words(upright.size[::-1]), words(source_size)
        raise InputError(f"the photo is {found}, its camera {wanted}: {path}")
    rgba = torch.from_numpy(resized(upright, size, box))
    return rgba[:3].float() / 255, rgba[3] >= 128


def gray(path: Path, longest: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[h, w] uint8 luma of the upright photo over white, at most `longest`; InputError as above."""
    upright = over(_upright(path, longest), "white")
    scale = min(1.0, longest / max(upright.size))
    w, h = (max(1, round(n * scale)) for n in upright.size)
    return np.asarray(upright.convert("L").resize((w, h), Image.Resampling.BICUBIC))


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of the upright photo, from its header; InputError if it cannot be read."""
    try:
        with opened(path) as image:
            return _upright_size(image)
    except UNREADABLE as error:
        raise InputError(f"cannot be read: {path} ({error})", hint=KINDS) from error


def upright_sizes(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """(height, width) of the files that can be opened, from their headers alone."""
    sizes, reasons = [], []
    for path in paths:
        try:
            sizes.append(size_of(path))
        except InputError as error:
            reasons.append(str(error))
    if not sizes:
        said = "; ".join(reasons[:3])
        raise InputError(f"none of {len(paths)} images can be read: {said}", hint=KINDS)
    return sizes


def _upright(path: Path, longest: int = 100_000) -> Image.Image:
    """RGB or RGBA of 8 bits, a JPEG perhaps reduced to no less than `longest`; or InputError."""
    try:
        with opened(path) as image:
            w, h = (max(1, round(n * min(1, longest / max(image.size)))) for n in image.size)
            image.draft(None, (w, h))
            return _decoded(image)
    except UNREADABLE as error:
        raise InputError(f"cannot be read: {path} ({error})", hint=KINDS) from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) once EXIF rotation is applied; Pillow's TIFF size has it applied."""
    on_its_side = orientation_of(image) in range(5, 9)
    return image.size if on_its_side and image.format != "TIFF" else image.size[::-1]


def _decoded(image: Image.Image) -> Image.Image:
    """The photo upright, RGB or RGBA with 8 bits a channel."""
    w, h = image.size
    with _large if w * h > ONE_BY_ONE else contextlib.nullcontext():
        image.load()
        return turned(eight_bit(image), orientation_of(image))


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image, stored under that EXIF orientation, upright; itself where it is."""
    how = TURNED.get(orientation)
    return image if how is None else image.transpose(how)


def over(image: Image.Image, color: str) -> Image.Image:
    """RGB: what is transparent shows `color`."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, color), image).convert("RGB")


def eight_bit(image: Image.Image) -> Image.Image:
    """RGB or RGBA with 8 bits a channel; 16-bit values are scaled, not clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        full = {"F": 1.0}.get(image.mode, 65535.0)
        if values.size and (values.min() < 0 or values.max() > full):
            raise ValueError(f"values outside 0..{full:g} in a {image.mode} image")
        gray = Image.fromarray(np.round(values * (255 / full)).astype(np.uint8))
        return gray.convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _camera(exif: Image.Exif) -> tuple[str, str, float]:
    """Make and model, focal length as written, and that of the same view on 36 x 24 mm or 0."""
    make, model = (str(exif.get(tag, "")).strip(" \0") for tag in (0x010F, 0x0110))
    details, equivalent = dict[int, Any](), 0.0
    with contextlib.suppress(*UNREADABLE):  # nonsense says nothing
        details = exif.get_ifd(ExifTags.IFD.Exif)
        equivalent = float(details.get(ExifTags.Base.FocalLengthIn35mmFilm, 0))
    focal = str(details.get(ExifTags.Base.FocalLength, ""))
    return f"{make} {model}".strip(), focal, equivalent if 0 < equivalent < 1e4 else 0.0


def resized(
    image: Image.Image, size: tuple[int, int], box: Box | None = None
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[4, h, w] uint8: RGB over white and alpha, by Pillow's bicubic filter on 8-bit values.

    box: left, top, right, bottom of the part of the image that is seen; None: all.
    Source: spec vggt section 11, vggt_omega section 12.
    """
    alpha, part = Image.new("L", (1, 1), 255), None
    if image.mode == "RGBA":
        alpha, part = image.getchannel("A"), box
    bicubic = Image.Resampling.BICUBIC
    rgb = over(image, "white").resize((size[1], size[0]), bicubic, box)
    opaque = alpha.resize((size[1], size[0]), bicubic, part)
    return np.concatenate([np.asarray(rgb), np.asarray(opaque)[..., None]], -1).transpose(2, 0, 1)


def words(size: tuple[int, int]) -> str:
    """Width and height as people write them."""
    return f"{size[1]} x {size[0]}"
