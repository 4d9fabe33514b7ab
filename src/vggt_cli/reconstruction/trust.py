"""Which pixels of depth maps to trust: sure enough, and at no edge between two surfaces.

Works frames at a time, of maps that may lie on disk in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_cli.device import one_thread_each
from vggt_cli.errors import GeometryError
from vggt_cli.formats import room
from vggt_cli.scene import ImageSet, Prediction

DEPTH_EDGE = 0.03  # of the depth, within 3 x 3 pixels (spec vggt_omega section 8)
SAMPLED = 2_000_000  # values for a percentile; of fewer all
USUAL_OF = 200  # frames that tell how rough depth usually is; of fewer all


def confident_pixels(prediction: Prediction, images: ImageSet, percent: float) -> Tensor:
    """[S, H, W] bool: valid, with usable depth, and not among the least sure `percent` of these.

    Raises GeometryError if there is none.
    """
    short = prediction.depth.dtype == torch.float16  # on disk, and so is this
    usable = (room.on_disk if short else torch.empty)(prediction.depth.shape, dtype=torch.bool)
    for some in room.chunks(prediction):
        depth, confidence = prediction.depth[some], prediction.confidence[some]
        usable[some] = images.valid[some] & depth.isfinite() & (depth > 0) & confidence.isfinite()
    step = usable.numel() // SAMPLED | 1  # odd: no column is left out
    of_usable = prediction.confidence.flatten()[::step][usable.flatten()[::step]]
    if len(of_usable) == 0:
        valid = int(images.valid.sum())
        finite = prediction.confidence[prediction.confidence.isfinite()]
        span = f"{finite.min():.3g} to {finite.max():.3g}" if len(finite) else "nowhere finite"
        raise GeometryError(
            f"no pixel has a usable depth: 0 of {valid} valid pixels, confidence {span}",
            hint="are the images empty or fully transparent? do the weights fit the network?",
        )
    rank = min(int(len(of_usable) * percent / 100), len(of_usable) - 1)
    threshold = of_usable.kthvalue(rank + 1).values
    for some in room.chunks(prediction):
        usable[some] &= prediction.confidence[some] >= threshold
    return usable


def depth_edges(depth: Tensor, valid: Tensor) -> Tensor:
    """[S, H, W] bool: pixels between a near and a far surface, which belong to neither.

    There the depth [S, H, W] varies within 3 x 3 pixels by more than 3 % of itself, and by more
    than three times what is usual among the `valid` pixels: a rough depth map is no reason to
    drop all of it.
    """
    limit = _edge_limit(depth, valid)
    edges = torch.empty(depth.shape, dtype=torch.bool)
    for some in room.chunks(depth):
        edges[some] = _varies(depth[some]) > limit
    return edges


def _edge_limit(depth: Tensor, valid: Tensor) -> float:
    some = slice(None, None, -(-len(depth) // USUAL_OF))
    usual, step = _varies(depth[some]).flatten(), valid[some].numel() // SAMPLED | 1
    return max(DEPTH_EDGE, 3 * float(usual[::step][valid[some].flatten()[::step]].median()))


def _varies(depth: Tensor) -> Tensor:
    """[S, H, W] how much depth [S, H, W] differs within 3 x 3 pixels, of itself."""
    result = torch.empty(depth.shape)

    def fill(frame: int) -> None:
        there = depth[frame].float()
        torch.add(_largest_around(there), _largest_around(-there), out=result[frame]).div_(there)

    with one_thread_each() as pool:
        list(pool.map(fill, range(len(depth))))
    return result


def _largest_around(image: Tensor) -> Tensor:
    """[H, W] the largest within 3 x 3 pixels of `image` [H, W]."""
    for axis in (0, 1):
        found, n = image.clone(), image.shape[axis] - 1
        for to, of in ((0, 1), (1, 0)):
            part = found.narrow(axis, to, n)
            torch.maximum(part, image.narrow(axis, of, n), out=part)
        image = found
    return image


def marked(prediction: Prediction, confident: Tensor) -> Tensor:
    """[S, H, W] uint8: 0, 1 where a pixel is `confident`, 2 where it lies at no edge besides.

    In the memory of `confident`, which is gone: for thousands of frames one mask is gigabytes.
    """
    limit = _edge_limit(prediction.depth, confident)
    marks = confident.view(torch.uint8)
    for some in room.chunks(prediction):
        marks[some] *= 2 - (_varies(prediction.depth[some]) > limit).byte()
    return marks
