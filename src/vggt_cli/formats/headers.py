"""What the header of a photo says, without its pixels and without torch; how photos are opened."""

from __future__ import annotations

import contextlib
import math
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError, features

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF", "HEIF")
# What Pillow raises at files that are cut, mislabelled or made to hurt.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError),
    *(struct.error, AttributeError, MemoryError, RuntimeError),
)
MOST_PIXELS = 2**30  # of a photo: 32768 x 32768
BYTES = 16  # a pixel, while a photo is decoded, converted and scaled


class Header(NamedTuple):
    """Sizes are (height, width)."""

    size: tuple[int, int]  # as Pillow opens it
    upright: tuple[int, int]  # once EXIF rotation is applied
    orientation: int  # EXIF; 1: upright


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The photo at `path` as Pillow opens it, none of its pixels decoded yet.

    Its kind is what the file holds, whatever its name says.
    Raises what UNREADABLE holds: for other kinds, for what is no file (a pipe would be waited for)
    and for more pixels than this machine can decode.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    Image.MAX_IMAGE_PIXELS = None  # Pillow's bound is below people's panoramas: ours is above them
    try:
        image = Image.open(path, formats=FORMATS if _reads_heif() else FORMATS[:-1])
    except UnidentifiedImageError as error:
        raise OSError(_what_it_is(path)) from error
    with image:
        w, h = image.size
        if w * h > most_pixels():
            most = f"{most_pixels() / 1e6:.0f} megapixels"
            raise OSError(f"{w} x {h} pixels, and at most {most} are decoded here")
        yield image


def most_pixels() -> int:
    """How many pixels a photo may have: what half of this machine's memory can decode."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return MOST_PIXELS
    return min(MOST_PIXELS, memory // (2 * BYTES))


def _reads_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    return True


def _what_it_is(path: Path) -> str:
    """Why Pillow knows no such photo."""
    with path.open("rb") as file:
        start = file.read(12)
    if not start:
        return "empty file"
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis") and not features.check("avif"):
        return "AVIF, which this Pillow does not read"
    if start[4:8] == b"ftyp" and not _reads_heif():
        return "HEIC: pip install 'vggt-cli[heif]'"
    return "not a photo of a known kind"


def exif_of(image: Image.Image) -> Image.Exif:
    """The photo's EXIF, empty where it is nonsense."""
    try:
        exif = image.getexif()
        dict(exif)
    except UNREADABLE:
        return Image.Exif()
    return exif


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 (upright) where it says nothing or nonsense."""
    found = exif_of(image).get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def header(path: Path) -> Header | str:
    """The header of the photo at `path`, or why it cannot be read."""
    try:
        with opened(path) as image:
            orientation = orientation_of(image)
            w, h = image.size
            # Pillow's TIFF size has the rotation applied.
            turned = orientation in range(5, 9) and image.format != "TIFF"
    except FileNotFoundError:
        return "missing"
    except UNREADABLE as error:
        return f"cannot be read ({type(error).__name__})"
    return Header((h, w), (w, h) if turned else (h, w), orientation)


def gps(path: Path) -> tuple[float, float, float] | None:
    """Latitude and longitude in degrees (north, east) and altitude in metres, as EXIF has them.

    The altitude is NaN where it is not said. None: no position, or none that can be read.
    Source: Exif 2.32 (CIPA DC-008), section 4.6.6, GPS attribute information.
    """
    tags = ExifTags.GPS
    try:
        with opened(path) as image:
            said = exif_of(image).get_ifd(ExifTags.IFD.GPSInfo)
        latitude = _degrees(said[tags.GPSLatitude], said[tags.GPSLatitudeRef], "S")
        longitude = _degrees(said[tags.GPSLongitude], said[tags.GPSLongitudeRef], "W")
    except UNREADABLE:
        return None
    altitude = math.nan
    with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
        below = said.get(tags.GPSAltitudeRef, 0) in (1, b"\1")
        altitude = float(said[tags.GPSAltitude]) * (-1 if below else 1)
    # A receiver without a fix writes zeros.
    sound = abs(latitude) <= 90 and abs(longitude) <= 180 and (latitude, longitude) != (0, 0)
    return (latitude, longitude, altitude) if sound else None


def _degrees(parts: tuple[float, float, float], reference: str, negative: str) -> float:
    degrees, minutes, seconds = (float(part) for part in parts)
    sign = -1 if reference.strip().upper() == negative else 1
    return sign * (degrees + minutes / 60 + seconds / 3600)
