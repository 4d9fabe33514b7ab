"""Photos in: find the files, decode them upright, bring them to the network's size.

The one door to Pillow's decoders. "Source" is the upright image: EXIF rotation is applied at
decoding, and every map, size and pixel of the outputs refers to it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.scene import ImageSet, Photo, Shaping

log = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
KINDS = "JPEG, PNG, WebP, TIFF and BMP are read"
# Photos that people have and that are not read: named instead of passed over in silence.
OTHER_KINDS = (".arw", ".avif", ".cr2", ".cr3", ".dng", ".gif", ".heic", ".heif", ".jp2", ".nef")
# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as this many of its pixels are left
# for each pixel of the network: the result then differs by less than a grey level on average.
DRAFT_OVERSAMPLING = 2
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True, eq=False)
class Loaded:
    """Readable photos with their images, and why others were left out."""

    images: ImageSet
    photos: tuple[Photo, ...]
    unreadable: tuple[tuple[str, str], ...]  # (name, reason)


def find(source: str) -> tuple[Path, list[Path]]:
    """The root folder and the image files of `source`, in natural order of their paths.

    source: a folder (searched with its subfolders; hidden files are left out), one file, a glob
    pattern, or "-" for one path a line on standard input.
    Raises InputError if there is nothing to read.
    """
    path = Path(source)
    if source == "-":
        listed = [Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip()]
        return _common_root(listed, "standard input"), listed
    if path.is_dir():
        return path, _images_among(path, path.rglob("*"), source)
    if path.is_file():
        return path.parent, [path]
    base = Path(path.anchor or ".")
    matches = list(base.glob(str(path.relative_to(path.anchor))))
    if not matches:
        raise InputError(f"no such folder, file or pattern: {source}", hint=KINDS)
    found = _images_among(base, matches, source)
    return _common_root(found, source), found


def _common_root(paths: Sequence[Path], source: str) -> Path:
    if not paths:
        raise InputError(f"no images in: {source}", hint=KINDS)
    return Path(os.path.commonpath([p.absolute().parent for p in paths]))


def _images_among(root: Path, paths: Iterable[Path], source: str) -> list[Path]:
    """The files of known kinds below `root` that are not hidden, in natural order."""
    found: list[Path] = []
    other: list[Path] = []
    for path in paths:
        inside = path.relative_to(root)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        kind = path.suffix.lower()
        (found if kind in SUFFIXES else other if kind in OTHER_KINDS else []).append(path)
    if other:
        log.warning("%d files left out, e.g. %s: %s", len(other), other[0].name, KINDS)
    if not found:
        raise InputError(f"no images in: {source}", hint=KINDS)
    return sorted(found, key=lambda path: natural_order(path.relative_to(root).as_posix()))


def natural_order(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorting key under which `img2` comes before `img10`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    digits = [p[0].isascii() and p[0].isdigit() for p in parts]
    key = [(0, int(p), "") if d else (1, 0, p) for p, d in zip(parts, digits, strict=True)]
    return key, name


def network_size(size: tuple[int, int], shaping: Shaping) -> tuple[int, int]:
    """(height, width) at which a network sees an image of `size`; the aspect is kept.

    Source: spec vggt section 11 (mode "pad" without the padding), vggt_omega section 12
    (mode "balanced" without the crop beyond 2:1). Python rounds half to even, as they do.
    """
    H, W = size
    p, resolution = shaping.patch_size, shaping.resolution
    if shaping.mode == "balanced":
        patches = (resolution / p) ** 2
        columns = math.sqrt(patches / (H / W))
        return max(1, round(patches / columns)) * p, max(1, round(columns)) * p
    if W >= H:
        return max(1, round(H * (resolution / W) / p)) * p, resolution
    return resolution, max(1, round(W * (resolution / H) / p)) * p


def load(
    root: Path,
    paths: Sequence[Path],
    shaping: Shaping,
    progress: Callable[[int], None] = lambda done: None,
) -> Loaded:
    """The images of `paths` as a network takes them; files that cannot be read are left out.

    Mixed sizes are padded with white to the largest, centred; padding is not valid.
    progress: called with the number of files decoded so far.
    Raises InputError if no file can be read.
    """
    decoded: list[tuple[Photo, Tensor]] = []
    unreadable = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        shape = partial(network_size, shaping=shaping)
        results = threads.map(lambda path: _read(path, _name(root, path), shape), paths)
        for done, (path, result) in enumerate(zip(paths, results, strict=True), 1):
            if isinstance(result, str):
                unreadable.append((_name(root, path), result))
                log.warning("left out, cannot be read: %s (%s)", path, result)
            else:
                decoded.append(result)
            progress(done)
    if not decoded:
        reasons = "; ".join(f"{name}: {why}" for name, why in unreadable[:3])
        raise InputError(f"none of {len(paths)} images can be read: {reasons}", hint=KINDS)
    return _together(decoded, unreadable)


def load_sized(
    paths: Sequence[Path], names: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> Loaded:
    """The photos called `names`, each at its own network size. Raises InputError for a bad one."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        known = [lambda _, size=size: size for size in sizes]
        results = list(threads.map(_read, paths, names, known))
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, str):
            raise InputError(f"cannot be read: {path} ({result})", hint=KINDS)
    return _together([x for x in results if not isinstance(x, str)], [])


def _together(
    decoded: Sequence[tuple[Photo, Tensor]], unreadable: Sequence[tuple[str, str]]
) -> Loaded:
    photos = tuple(photo for photo, _ in decoded)
    source_size = torch.tensor([photo.size for photo in photos])
    images = stack([photo.name for photo in photos], [x for _, x in decoded], source_size)
    return Loaded(images, photos, tuple(unreadable))


def _name(root: Path, path: Path) -> str:
    return path.absolute().relative_to(root.absolute()).as_posix()


def _read(
    path: Path, name: str, shape: Callable[[tuple[int, int]], tuple[int, int]]
) -> tuple[Photo, Tensor] | str:
    """The photo with its RGBA pixels [4, h, w] uint8 at network size, or why it cannot be read."""
    Image.MAX_IMAGE_PIXELS = None  # people's own photos: panoramas pass Pillow's bomb limit
    try:
        with Image.open(path) as image:
            exif = image.getexif()
            rotated = exif.get(ExifTags.Base.Orientation, 1) in range(2, 9)
            photo = Photo(path, name, _upright_size(image), rotated, *_camera(exif))
            size = shape(photo.size)
            h, w = size if image.size == photo.size[::-1] else size[::-1]  # as stored
            image.draft(None, (w * DRAFT_OVERSAMPLING, h * DRAFT_OVERSAMPLING))  # JPEG alone
            image.load()
            upright = ImageOps.exif_transpose(_eight_bit(image))
    except FileNotFoundError:
        return "no such file"
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises
        return str(error).replace(str(path), path.name) or type(error).__name__
    return photo, torch.from_numpy(resized(upright, size))


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
    upright = _upright(path, longest)
    if upright.mode == "RGBA":
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    scale = min(1.0, longest / max(upright.size))
    w, h = (max(1, round(n * scale)) for n in upright.size)
    return np.asarray(upright.convert("L").resize((w, h), Image.Resampling.BICUBIC))


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of the upright photo, from its header; InputError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return _upright_size(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot be read: {path} ({error})", hint=KINDS) from error


def _upright(path: Path, longest: int = 100_000) -> Image.Image:
    """RGB or RGBA of 8 bits, a JPEG perhaps reduced to no less than `longest`; or InputError."""
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(path) as image:
            w, h = (max(1, round(n * min(1, longest / max(image.size)))) for n in image.size)
            image.draft(None, (w, h))
            return ImageOps.exif_transpose(_eight_bit(image))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"cannot be read: {path} ({error})", hint=KINDS) from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) once EXIF rotation is applied; Pillow's TIFF size has it applied."""
    on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
    return image.size if on_its_side and image.format != "TIFF" else image.size[::-1]


def _eight_bit(image: Image.Image) -> Image.Image:
    """RGB or RGBA with 8 bits a channel; 16-bit values are scaled, not clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        full = {"F": 1.0}.get(image.mode, 65535.0)
        if values.size and (values.min() < 0 or values.max() > full):
            raise ValueError(f"values outside 0..{full:g} in a {image.mode} image")
        gray = Image.fromarray(np.round(values * (255 / full)).astype(np.uint8))
        gray.info.update(image.info)  # keeps the EXIF rotation
        return gray.convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _camera(exif: Image.Exif) -> tuple[str, str, float]:
    """Make and model, focal length as written, and that of the same view on 36 x 24 mm or 0."""
    make, model = (str(exif.get(tag, "")).strip(" \0") for tag in (0x010F, 0x0110))
    details = exif.get_ifd(ExifTags.IFD.Exif)
    try:
        equivalent = float(details.get(ExifTags.Base.FocalLengthIn35mmFilm, 0))
    except (TypeError, ValueError, ZeroDivisionError):
        equivalent = 0.0
    focal = str(details.get(ExifTags.Base.FocalLength, ""))
    return f"{make} {model}".strip(), focal, equivalent if 0 < equivalent < 1e4 else 0.0


def resized(
    image: Image.Image, size: tuple[int, int], box: Box | None = None
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[4, h, w] uint8: RGB over white and alpha, by Pillow's bicubic filter on 8-bit values.

    box: left, top, right, bottom of the part of the image that is seen; None: all.
    Source: spec vggt section 11, vggt_omega section 12.
    """
    if image.mode == "RGBA":
        over = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        alpha, part = image.getchannel("A"), box
    else:
        over, alpha, part = image, Image.new("L", (1, 1), 255), None
    bicubic = Image.Resampling.BICUBIC
    rgb = over.resize((size[1], size[0]), bicubic, box)
    opaque = alpha.resize((size[1], size[0]), bicubic, part)
    return np.concatenate([np.asarray(rgb), np.asarray(opaque)[..., None]], -1).transpose(2, 0, 1)


def stack(names: Sequence[str], rgba: Sequence[Tensor], source_size: Tensor) -> ImageSet:
    """One ImageSet of images [4, h, w] uint8, padded with white around their centres.

    source_size: [S, 2] (height, width) of the upright sources.
    """
    H, W = (max(x.shape[axis] for x in rgba) for axis in (1, 2))
    pixels = torch.ones(len(rgba), 3, H, W)
    valid = torch.zeros(len(rgba), H, W, dtype=torch.bool)
    maps = torch.eye(3, dtype=torch.float64).repeat(len(rgba), 1, 1)
    for i, x in enumerate(rgba):
        h, w = x.shape[1:]
        top, left = (H - h) // 2, (W - w) // 2
        pixels[i, :, top : top + h, left : left + w] = x[:3].float() / 255
        valid[i, top : top + h, left : left + w] = x[3] >= 128
        scale = source_size[i].flip(0).double() / torch.tensor([w, h])
        maps[i, :2, :2] = torch.diag(scale)
        maps[i, :2, 2] = -scale * torch.tensor([left, top])
    return ImageSet(tuple(names), pixels, valid, maps, source_size)


def frame_of(images: ImageSet, frame: int) -> tuple[slice, slice]:
    """Rows and columns of the network's image that hold the photo, without padding."""
    scale = torch.diagonal(images.source_from_network[frame])[:2]
    left, top = (-images.source_from_network[frame, :2, 2] / scale).round().long().tolist()
    w, h = (images.source_size[frame].flip(0) / scale).round().long().tolist()
    return slice(top, top + h), slice(left, left + w)


def upright_sizes(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """(height, width) of the files that can be opened, from their headers alone."""
    Image.MAX_IMAGE_PIXELS = None
    sizes = []
    for path in paths:
        with contextlib.suppress(OSError), Image.open(path) as image:
            sizes.append(_upright_size(image))
    if not sizes:
        raise InputError(f"none of {len(paths)} images can be read", hint=KINDS)
    return sizes


def words(size: tuple[int, int]) -> str:
    """Width and height as people write them."""
    return f"{size[1]} x {size[0]}"


def upright_file(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """The photo upright, in its own mode, and how to save it: its kind, ICC and other EXIF kept."""
    with Image.open(path) as image:
        kind = "JPEG" if image.format == "MPO" else image.format  # MPO: phones' JPEG and more
        icc = image.info.get("icc_profile")
        turned = ImageOps.exif_transpose(image)
    exif = turned.getexif()  # without the orientation, which exif_transpose takes out
    quality = {"quality": 95, "subsampling": 0} if kind in ("JPEG", "WEBP") else {}
    return turned, {"format": kind, "exif": exif, "icc_profile": icc, **quality}
