"""A set of any length through a network: at once, or in windows that fit into memory."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import Any

from vggt_cli import device as devices
from vggt_cli.errors import MemoryExceeded
from vggt_cli.formats import room
from vggt_cli.models.networks import Network
from vggt_cli.reconstruction import loops, plan, windows
from vggt_cli.reconstruction.predict import predict
from vggt_cli.reconstruction.stages import Progress, Stages
from vggt_cli.scene import ImageSet, Prediction

log = logging.getLogger(__name__)

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
    looks = loops.descriptors((images[some], None) for some in room.chunks(images))
    if windows.follows(looks):
        parts = windows.in_order(len(images), most, most // 2)
    else:
        parts = windows.by_looks(looks, most, most // 2)
    log.info("%d frames in %d windows of %d", len(images), len(parts), most)
    said = partial(progress, "predict")
    joined = windows.predict_windows(partial(predict, network), images, parts, said)
    if work.on_disk:
        return joined.prediction, joined.drift
    return joined.in_memory, joined.drift
