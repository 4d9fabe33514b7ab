"""Frames and what was predicted of them on disk: memory of what is being read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vggt_cli.formats.colmap import Array
from vggt_cli.geometry import move
from vggt_cli.scene import Cameras, ImageSet, Prediction, Similarity

HALF = torch.finfo(torch.float16).max
AT_ONCE = 64  # frames read at a time


@dataclass(frozen=True, eq=False)
class Shelf:
    """S frames and their prediction, large arrays in files of float16, filled window by window.

    Pixels of 8 bits come back exactly, depth within 0.05 %.
    """

    folder: Path
    names: list[str]  # [S]
    cameras: Cameras  # each frame's in the world of its window until `place`
    source_from_network: Tensor  # [S, 3, 3]
    source_size: Tensor  # [S, 2]
    kinds: tuple[str, ...]  # the files: pixels, valid, depth, confidence, and tokens if there are

    @classmethod
    def create(cls, folder: Path, count: int, images: ImageSet, prediction: Prediction) -> Shelf:
        """Room in `folder` for `count` frames like those of a first window."""
        rows = _rows(images, prediction)
        for kind, values in rows.items():
            file = folder / f"{kind}.npy"
            shape = (count, *values.shape[1:])
            np.lib.format.open_memmap(file, "w+", _dtype(kind), shape)  # a file with a hole
        size = torch.tensor(images.size).expand(count, 2)
        cameras = Cameras(torch.zeros(count, 3, 4), torch.zeros(count, 3, 3), size)
        to_source, source_size = torch.zeros(count, 3, 3).double(), torch.zeros(count, 2).long()
        return cls(folder, [""] * count, cameras, to_source, source_size, tuple(rows))

    def put(self, frames: Sequence[int], images: ImageSet, prediction: Prediction) -> None:
        """These frames and their prediction into their places."""
        index = list(frames)
        for kind, values in _rows(images, prediction).items():
            self._open(kind, "r+")[index] = _stored(values, kind).numpy()
        for frame, name in zip(index, images.names, strict=True):
            self.names[frame] = name
        self.cameras.extrinsics[index] = prediction.cameras.extrinsics
        self.cameras.intrinsics[index] = prediction.cameras.intrinsics
        self.source_from_network[index] = images.source_from_network
        self.source_size[index] = images.source_size

    def prediction(self, frames: Sequence[int]) -> Prediction:
        """What was put of these frames, in memory, without tokens."""
        index = list(frames)
        depth, confidence = (
            torch.from_numpy(self._open(kind, "r")[index]).float()
            for kind in ("depth", "confidence")
        )
        return Prediction(self.cameras[index], depth, confidence)

    def chunks(self) -> Iterator[tuple[ImageSet, Tensor | None]]:
        """All frames and their tokens in order, AT_ONCE at a time."""
        for start in range(0, len(self.names), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            images, tokens = self._images("r", some), None
            if "tokens" in self.kinds:
                tokens = torch.from_numpy(self._open("tokens", "r")[some].copy())
            yield images, tokens

    def place(self, poses: Sequence[Similarity], owner: Tensor) -> None:
        """Moves every frame into the common world, of which `poses[owner[frame]]` are the way."""
        for number, pose in enumerate(poses):
            own = (owner == number).nonzero()[:, 0].tolist()
            self.cameras.extrinsics[own] = move(self.cameras[own], pose).extrinsics
            depth = self._open("depth", "r+")
            scaled = torch.from_numpy(depth[own]).float() * pose.scale
            depth[own] = _stored(scaled, "depth").numpy()

    def whole(self) -> tuple[ImageSet, Prediction]:
        """All of it as maps of the files, float16; changes stay in memory."""
        depth, confidence, *tokens = (
            torch.from_numpy(self._open(kind, "c")) for kind in self.kinds[2:]
        )
        prediction = Prediction(self.cameras, depth, confidence, tokens[0] if tokens else None)
        return self._images("c", slice(None)), prediction

    def _images(self, mode: str, frames: slice) -> ImageSet:
        pixels, valid = (self._open(kind, mode)[frames] for kind in ("pixels", "valid"))
        if mode == "r":
            pixels, valid = pixels.copy(), valid.copy()
        return ImageSet(
            tuple(self.names[frames]),
            torch.from_numpy(pixels),
            torch.from_numpy(valid),
            self.source_from_network[frames],
            self.source_size[frames],
        )

    def _open(self, kind: str, mode: str) -> Array:
        """The file mapped anew: what is not held is given back to the system."""
        array: Array = np.lib.format.open_memmap(self.folder / f"{kind}.npy", mode)
        return array


def _rows(images: ImageSet, prediction: Prediction) -> dict[str, Tensor]:
    rows = {
        "pixels": images.pixels,
        "valid": images.valid,
        "depth": prediction.depth,
        "confidence": prediction.confidence,
    }
    return rows if prediction.tokens is None else {**rows, "tokens": prediction.tokens}


def _dtype(kind: str) -> type[np.generic]:
    return np.bool_ if kind == "valid" else np.float16


def _stored(values: Tensor, kind: str) -> Tensor:
    """As the file has it; what float16 cannot hold is the largest that it can."""
    return values if kind == "valid" else values.clamp(-HALF, HALF).half()
