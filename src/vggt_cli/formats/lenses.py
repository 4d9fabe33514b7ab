"""Which photos a lens took."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vggt_cli.errors import InputError
from vggt_cli.formats.decode import words
from vggt_cli.scene import Photo


def camera_groups(photos: Sequence[Photo], mode: str) -> list[int]:
    """For each photo the number of the camera that took it, counted in order of appearance.

    mode: "auto" (equal size, EXIF camera and focal length), "per-image", "shared" (one for all)
    or "per-folder". Raises InputError where photos of different size would share a camera.
    """
    key_of: dict[str, Callable[[Photo], object]] = {
        "auto": lambda photo: (photo.size, photo.camera, photo.focal_length),
        "per-image": lambda photo: photo.name,
        "shared": lambda photo: "one for all",
        "per-folder": lambda photo: photo.name.rpartition("/")[0],
    }
    keys = [key_of[mode](photo) for photo in photos]
    first: dict[object, int] = {}
    for i, key in enumerate(keys):
        other = photos[first.setdefault(key, i)]
        if photos[i].size != other.size:
            raise InputError(
                f"one camera for photos of different size: {other.name} is {words(other.size)}, "
                f"{photos[i].name} is {words(photos[i].size)}",
                hint="use --camera auto or --camera per-image",
            )
    number = {key: n for n, key in enumerate(first)}
    return [number[key] for key in keys]
