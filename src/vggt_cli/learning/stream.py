"""What a run is trained on: the batch of step n, a function of n alone.

Nothing depends on what came before, so a run goes on exactly where it stopped, and processes that
share the work share no state.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from vggt_cli.errors import InputError
from vggt_cli.learning import losses, synthetic
from vggt_cli.learning.labels import labels
from vggt_cli.learning.losses import Truth
from vggt_cli.learning.objectives import Batch
from vggt_cli.learning.synthetic import Sample

FIRST_SEED = 1_000_000  # below are the seeds of held-out scenes
BLOCK = 40  # steps with one image size, because a rendered scene has one
FEWEST, MOST = 12, 48  # rendered scenes at hand at the beginning of a block, and at its end
VIEWS = 6  # of a rendered scene, at least: it serves several batches, seen otherwise


@dataclass(frozen=True)
class Data:
    """What is drawn for a batch."""

    scenes: tuple[Path, ...] = ()  # folders of photos with depth; none: scenes are rendered
    frames: tuple[int, ...] = (2, 3, 4)  # of a sequence, one of these a batch
    batch_frames: int = 12  # sequences are as many as this allows, at least one
    pixels: int = 128  # root of the area
    aspects: tuple[float, ...] = (1.0, 0.75, 1.333, 0.667, 1.5, 0.5, 2.0)  # height / width
    near: float = 0.4  # spread of rendered cameras at the beginning
    near_steps: int = 5_000  # until it is 1
    rendered: int = 0  # only so many scenes, to see whether they are learnt by heart; 0: no end
    seed: int = 0


def seed_of(*numbers: int) -> int:
    """A seed that depends on `numbers` alone, and is unlike those of their neighbours."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:4], "big")  # torch's generator on the CPU takes no more


def _random(*numbers: int) -> Generator:
    return Generator().manual_seed(seed_of(*numbers))


def image_size(pixels: int, aspect: float, patch: int) -> tuple[int, int]:
    """(height, width) in whole patches, of about pixels^2 in area."""
    sides = pixels * math.sqrt(aspect), pixels / math.sqrt(aspect)
    height, width = (max(1, round(side / patch)) * patch for side in sides)
    return height, width


class Stream(Dataset[Batch]):
    """The batches of process `rank` of `count`: stream[n] is that of step n.

    patch: pixels of a patch; device: where scenes are rendered; tracks: whether with labels.
    Sizes and lengths are the same in all processes, so that none waits for another; scenes are not.
    """

    def __init__(
        self,
        data: Data,
        patch: int,
        device: torch.device,
        rank: int = 0,
        count: int = 1,
        tracks: bool = False,
    ) -> None:
        self.data, self.patch, self.device, self.tracks = data, patch, device, tracks
        self.rank, self.count = rank, count
        self.pool: dict[int, Sample] = {}  # what was rendered last, to save rendering it again
        self.photos = _opened(data) if data.scenes else []

    def __getitem__(self, step: int) -> Batch:
        common, random = _random(self.data.seed, step), _random(self.data.seed, step, self.rank)
        S = _one(self.data.frames, common)
        sequences = max(1, self.data.batch_frames // S)
        draw = self._photos if self.photos else self._rendered
        parts = [draw(step, S, random) for _ in range(sequences)]
        pixels, *truth = (torch.stack(part) for part in zip(*parts, strict=True))
        normal = losses.normalize(Truth(*truth))[0]
        tracks = labels(normal, random) if self.tracks else None
        exact = torch.full((sequences,), not self.photos)  # what is rendered, not what is scanned
        return Batch(pixels, normal, tracks, exact, losses.random_offsets(random))

    def size(self, step: int) -> tuple[int, int]:
        """(height, width) of the images of `step`."""
        aspect = _one(self.data.aspects, _random(self.data.seed, -1 - step // BLOCK))
        return image_size(self.data.pixels, aspect, self.patch)

    def at_hand(self, step: int) -> range:
        """The numbers of the rendered scenes that `step` chooses from: one more every step."""
        block, place = divmod(step, BLOCK)
        newest = FEWEST + place
        first = block * (FEWEST + BLOCK)
        return range(first + max(0, newest - MOST), first + newest)

    def _rendered(self, step: int, S: int, random: Generator) -> tuple[Tensor, ...]:
        """A sequence of a rendered scene, as a camera would record it."""
        numbers = self.at_hand(step)
        self.pool = {n: self.pool[n] if n in self.pool else self._render(n) for n in numbers}
        scene = self.pool[_one(numbers, random)]
        frames = torch.randperm(len(scene.pixels), generator=random)[:S]
        pixels = synthetic.photographed(random, scene.pixels[frames])
        return pixels, *(x[frames] for x in _truth(scene))

    def _render(self, number: int) -> Sample:
        block, place = divmod(number, FEWEST + BLOCK)
        step = block * BLOCK + max(0, place - FEWEST + 1)  # at which it comes
        data, seed = self.data, number * self.count + self.rank
        seed = seed % data.rendered if data.rendered else (data.seed << 20) + seed
        spread = data.near + (1 - data.near) * min(1.0, step / max(1, data.near_steps))
        path = synthetic.Path(max(VIEWS, *data.frames), self.size(step), spread)
        return synthetic.sample(FIRST_SEED + seed, path, self.device)

    def _photos(self, step: int, S: int, random: Generator) -> tuple[Tensor, ...]:
        """A sequence of photos with depth."""
        scene = _one([scene for scene in self.photos if len(scene) >= S], random)
        sample = scene.sample(scene.draw(random, S), self.size(step))
        return sample.pixels, *_truth(sample)


def _opened(data: Data) -> list[Any]:
    from vggt_cli.learning import datasets

    scenes = [datasets.open_scene(folder) for folder in data.scenes]
    largest, longest = max(len(scene) for scene in scenes), max(data.frames)
    if largest < longest:
        raise InputError(
            f"no scene has {longest} photos: the largest of {len(scenes)} has {largest}",
            hint="lower --frames",
        )
    return scenes


def _one(choices: Sequence[Any], random: Generator) -> Any:
    return choices[int(torch.randint(len(choices), (), generator=random))]


def _truth(sample: Sample) -> tuple[Tensor, ...]:
    cameras = sample.cameras
    return cameras.extrinsics, cameras.intrinsics, sample.depth, sample.valid


def batches(stream: Stream, steps: range, workers: int) -> DataLoader[Batch]:
    """The batches of `steps` in order, the same for any number of processes that make them.

    Rendered scenes want one at most: each would render all of them for itself.
    """
    return DataLoader(
        stream,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=8 if workers else None,  # a block begins with twelve scenes to render
        worker_init_fn=_deaf,
    )


def _deaf(worker: int) -> None:
    # Ctrl-C and torchrun reach all processes; the run ends its workers after it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
