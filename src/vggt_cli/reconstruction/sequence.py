"""A set of any length through a network: at once, or in windows that fit into memory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch.nn import functional as F

from vggt_cli import device as devices
from vggt_cli.errors import MemoryExceeded
from vggt_cli.formats import motion, room
from vggt_cli.models.networks import Network
from vggt_cli.reconstruction import loops, plan, windows
from vggt_cli.reconstruction.predict import predict
from vggt_cli.reconstruction.stages import Progress, Stages
from vggt_cli.scene import ImageSet, Prediction

log = logging.getLogger(__name__)

KEYFRAMES = 3  # at least: of fewer, windows would share too little
DENSE = 5  # frames for each keyframe, at least; fewer come in a row, as steps are wide enough
Predicted = tuple[Prediction, dict[str, Any] | None]


def predicted(network: Network, images: ImageSet, work: plan.Work, stages: Stages) -> Predicted:
    """What `network` says of all frames; and how well windows hold together, if there are some.

    In memory, float32, unless the work is on disk. Where memory does not suffice, in windows of
    half as many frames; raises MemoryExceeded if that is too much as well.
    """
    most = min(work.window, len(images))
    try:
        return _in_windows(network, images, dataclasses.replace(work, window=most), stages.progress)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error) or most // 2 < plan.LEAST:
            raise
    log.warning("out of memory with %d frames at once; going on with %d", most, most // 2)
    devices.give_back(stages.device)
    half = dataclasses.replace(work, window=most // 2)
    try:
        return _in_windows(network, images, half, stages.progress)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        few = max(plan.LEAST, most // 8)
        fits = plan.foresee(dataclasses.replace(work, window=few)).peak_memory
        raise MemoryExceeded(
            f"out of memory on {stages.device} with {most} and with {most // 2} frames at once",
            hint=f"--window {few} needs about {fits / 1e9:.1f} GB; or a smaller --resolution",
        ) from error


def _in_windows(
    network: Network, images: ImageSet, work: plan.Work, progress: Progress
) -> Predicted:
    most = work.window
    if len(images) <= most:
        return predict(network, windows.exact(images)), None
    main, between = _parts(images, most)
    count = len(main) + len(between)
    log.info("%d frames in %d windows of %d", len(images), count, most)
    said = partial(progress, "predict")
    joined = windows.predict_windows(partial(predict, network), images, main, between, said)
    if work.on_disk:
        return joined.prediction, joined.drift
    return joined.in_memory, joined.drift


def _parts(images: ImageSet, most: int) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of at most `most` frames, and those for the frames between.

    The former are of a dense sequence's keyframes: frames in a row that are all but the same have
    too short a baseline.
    """
    half = most // 2
    looks = loops.descriptors((images[some], None) for some in room.chunks(images))
    if not windows.follows(looks):
        return windows.by_looks(looks, most, half), []
    keyframes = motion.keyframes(_views(images))
    if not KEYFRAMES <= len(keyframes) <= len(images) / DENSE:
        keyframes = list(range(len(images)))
    parts = windows.in_order(len(keyframes), most, half)
    main = [[keyframes[k] for k in part] for part in parts]
    return main, windows.between(len(images), keyframes, most, half)


def _views(images: ImageSet) -> Iterator[motion.View]:
    H, W = images.size
    scale = motion.LONGEST / max(H, W)
    small = tuple(max(motion.BLOCK, round(side * scale)) for side in (H, W))
    for some in room.chunks(images):
        gray = 255 * images.pixels[some].float().mean(1, keepdim=True)
        for one in F.interpolate(gray, small, mode="area")[:, 0].numpy():
            yield motion.View.of(one)
