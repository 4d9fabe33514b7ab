"""What the header of a photo says, without its pixels and without torch."""

from __future__ import annotations

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
