"""A folder with photos and a COLMAP model, ours or anyone's, as `check` looks at it.

Read whole where it can be and never written; of the photos only the headers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap_rows
from vggt_cli.formats.colmap_rows import NO_POINT, NO_POINTS, PARTS, Camera, Image, Points
from vggt_cli.formats.headers import Header, header
from vggt_cli.formats.view_selection import without_neighbours

# Where models are found, seen from the scene's folder: the first that is there.
MODELS_IN = ("sparse/0", "sparse", "colmap/sparse/0", "colmap/sparse", "reference", ".")


@dataclass(frozen=True)
class Files:
    """A scene's folder as it was found; what could not be read is empty."""

    folder: Path
    model: Path  # folder of cameras, images and points3D
    kind: str  # "bin" or "txt"
    cameras: Mapping[int, Camera]
    images: Sequence[Image]
    points: Points
    unreadable: Mapping[str, str]  # part of the model -> why
    photos: Mapping[str, Header | str]  # by name in the model; str: why it cannot be opened

    def part(self, name: str) -> str:
        """The file of a part of the model, seen from the folder."""
        return self.inside(self.model / f"{name}.{self.kind}")

    def inside(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @cached_property
    def ours(self) -> bool:
        """Whether `vggt export` takes the scene."""
        there = (self.folder / "report.json").is_file() and (self.folder / "depth").is_dir()
        return there and self.model == self.folder / "sparse/0"

    def exported(self, path: str) -> bool:
        """Whether `vggt export` wrote the file."""
        return self.ours and (self.folder / path).is_file()

    @cached_property
    def lonely(self) -> list[str]:
        return without_neighbours(self.images, self.points)

    @cached_property
    def contradiction(self) -> tuple[str, str] | None:
        """The file and the words, where a track names no 2D point or a 2D point no 3D point."""
        track, seen = self.points.track, [image.seen for image in self.images]
        if not self.images or "points3D" in self.unreadable:
            return None
        number = np.array([image.number for image in self.images], np.uint32)
        order = np.argsort(number)
        image = order[np.minimum(np.searchsorted(number[order], track["image"]), len(number) - 1)]
        count = np.array([len(rows) for rows in seen])
        lost = int(((number[image] != track["image"]) | (track["index"] >= count[image])).sum())
        if lost:
            return self.part("points3D"), f"{lost} entries of tracks name no 2D point"
        named = np.concatenate([rows["point"] for rows in seen])
        lost = int((~np.isin(named[named != NO_POINT], self.points.number)).sum())
        return (self.part("images"), f"{lost} 2D points name no 3D point") if lost else None

    @cached_property
    def opened(self) -> list[tuple[Image, Camera, Header]]:
        """Images whose camera and photo could be read."""
        return [
            (image, self.cameras[image.camera], header)
            for image in self.images
            if isinstance(header := self.photos[image.name], Header)
            and image.camera in self.cameras
        ]

    @cached_property
    def used(self) -> dict[int, Camera]:
        """Cameras that images name."""
        numbers = {image.camera for image in self.images}
        return {n: camera for n, camera in self.cameras.items() if n in numbers}


def examine(folder: Path) -> Files:
    """What is in `folder`; parts of the model that cannot be read are empty and named.

    Raises InputError if there is no such folder or nothing of a COLMAP model in it.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    models = [folder / place for place in MODELS_IN if _has_model(folder / place)]
    if not models:
        hint = "a scene holds images/ and a COLMAP model in sparse/0/ or sparse/"
        raise InputError(f"no COLMAP model in: {folder}", hint)
    model = models[0]
    read = {"cameras": colmap_rows.cameras, "images": colmap_rows.images}
    found: dict[str, Any] = {"cameras": {}, "images": [], "points3D": NO_POINTS}
    unreadable = {}
    for part, reader in {**read, "points3D": colmap_rows.points}.items():
        try:
            found[part] = reader(model)
        except (InputError, OSError) as error:
            unreadable[part] = _reason(error, model)
    photos = {image.name: header(folder / "images" / image.name) for image in found["images"]}
    kind = colmap_rows.kind_of(model)
    cameras, images, points = (found[part] for part in PARTS)
    return Files(folder, model, kind, cameras, images, points, unreadable, photos)


def _reason(error: InputError | OSError, model: Path) -> str:
    """What an error says, without the path."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    words, _, rest = str(error).partition(f": {model}")
    _, bracket, detail = rest.partition(" (")
    return words + bracket + detail


def _has_model(folder: Path) -> bool:
    return any((folder / f"{part}.{kind}").is_file() for part in PARTS for kind in ("bin", "txt"))
