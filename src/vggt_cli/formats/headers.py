"""What the header of a photo says, without its pixels and without torch."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image


class Header(NamedTuple):
    """Sizes are (height, width)."""

    size: tuple[int, int]  # as Pillow opens it
    upright: tuple[int, int]  # once EXIF rotation is applied
    orientation: int  # EXIF; 1: upright


def header(path: Path) -> Header | str:
    """The header of the photo at `path`, or why it cannot be read."""
    Image.MAX_IMAGE_PIXELS = None  # people's own photos: panoramas pass Pillow's bomb limit
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            w, h = image.size
            # Pillow's TIFF size has the rotation applied.
            turned = orientation in range(5, 9) and image.format != "TIFF"
    except FileNotFoundError:
        return "missing"
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises
        return f"cannot be read ({type(error).__name__})"
    return Header((h, w), (w, h) if turned else (h, w), orientation)


def gps(path: Path) -> tuple[float, float, float] | None:
    """Latitude and longitude in degrees (north, east) and altitude in metres, as EXIF has them.

    The altitude is NaN where it is not said. None: no position, or none that can be read.
    Source: Exif 2.32 (CIPA DC-008), section 4.6.6, GPS attribute information.
    """
    tags = ExifTags.GPS
    try:
        with Image.open(path) as image:
            said = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
        latitude = _degrees(said[tags.GPSLatitude], said[tags.GPSLatitudeRef], "S")
        longitude = _degrees(said[tags.GPSLongitude], said[tags.GPSLongitudeRef], "W")
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, ZeroDivisionError):
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
