"""What was predicted of many frames, on disk, filled window by window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vggt_cli.formats.room import chunks, let_go, on_disk
from vggt_cli.geometry import move
from vggt_cli.scene import Cameras, ImageSet, Prediction, Similarity

HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True, eq=False)
class Shelf:
    """A prediction of S frames as it grows; depth is kept within 0.05 %."""

    all: Prediction  # float16 on disk; cameras in the world of each frame's window until `place`

    @classmethod
    def like(cls, prediction: Prediction, count: int) -> Shelf:
        """Room for `count` frames like those of `prediction`. OutputError where there is none."""
        size = prediction.cameras.image_size[:1].expand(count, 2)
        cameras = Cameras(torch.zeros(count, 3, 4), torch.zeros(count, 3, 3), size)
        depth, confidence, tokens = (
            None if x is None else on_disk((count, *x.shape[1:]), torch.float16)
            for x in (prediction.depth, prediction.confidence, prediction.tokens)
        )
        assert depth is not None
        assert confidence is not None
        return cls(Prediction(cameras, depth, confidence, tokens))  # a text is of all frames

    def put(self, frames: Sequence[int], prediction: Prediction) -> None:
        """What was predicted of these frames into their places."""
        index = list(frames)
        self.all.depth[index] = _half(prediction.depth)
        self.all.confidence[index] = _half(prediction.confidence)
        if self.all.tokens is not None and prediction.tokens is not None:
            self.all.tokens[index] = _half(prediction.tokens)
        self.all.cameras.extrinsics[index] = prediction.cameras.extrinsics
        self.all.cameras.intrinsics[index] = prediction.cameras.intrinsics

    def read(self, frames: Sequence[int]) -> Prediction:
        """What was put of these frames, in memory, float32, without tokens."""
        some = self.all[list(frames)]
        return replace(
            some, depth=some.depth.float(), confidence=some.confidence.float(), tokens=None
        )

    def chunks(self, images: ImageSet, frames: Tensor) -> Iterator[tuple[ImageSet, Tensor | None]]:
        """The `frames` [n] and their tokens in order, few at a time."""
        for some in chunks(frames):
            which = frames[some].tolist()
            yield images[which], None if self.all.tokens is None else self.all.tokens[which]

    def place(self, poses: Sequence[Similarity], owner: Tensor, stretch: float = 1.0) -> None:
        """Moves every frame into the common world, of which `poses[owner[frame]]` are the way.

        stretch: times which all depth is taken.
        """
        for number, pose in enumerate(poses):
            own = (owner == number).nonzero()[:, 0].tolist()
            moved = move(self.all.cameras[own], pose)
            self.all.cameras.extrinsics[own] = moved.extrinsics
            self.all.depth[own] = _half(self.all.depth[own].float() * (stretch * pose.scale))
            let_go()


def _half(values: Tensor) -> Tensor:
    """As it is kept: what float16 cannot hold is the largest that it can."""
    return values.clamp(-HALF, HALF).half()
