"""The steps of a run as they pass: progress, seconds, memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from vggt_cli import device as devices
from vggt_cli.errors import MemoryExceeded

Progress = Callable[[str, int, int], None]  # stage, done, total (0: not known)


def silent(stage: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass
class Stages:
    """Seconds and peak memory of the steps, as they pass."""

    device: torch.device
    progress: Progress
    work: str = "reading"  # what there is to do, for the words of an error
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The step called `name`. Raises MemoryExceeded where it runs out of memory."""
        self.progress(name, 0, 0)
        start = time.perf_counter()
        try:
            yield
            devices.synchronize(self.device)
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            raise MemoryExceeded(
                f"out of memory on {self.device} at the step '{name}': {self.work}",
                hint="give fewer images, or a smaller --resolution",
            ) from error
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.peak_memory[name] = devices.peak_memory(self.device)
        self.progress(name, 1, 1)
