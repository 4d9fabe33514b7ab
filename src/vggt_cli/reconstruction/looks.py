"""What photos say without any geometry: which are blurred, and which are copies of each other."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.formats.colmap import Array
from vggt_cli.formats.decode import gray
from vggt_cli.formats.images import frame_of
from vggt_cli.scene import ImageSet, Photo

LONGEST = 1000  # pixels: blur is looked for at this size, where that of a lens's last pixel is gone
STRONG = 0.95  # quantile of gradients: edges count, not walls, noise or a soft background
FINEST = 0.5  # grey levels: the least that a gradient of 8-bit values can be told from none
# Of the sharpness of the other photos. Unspoilt photos of our sets lie above 0.74, those blurred by
# two pixels or more below 0.63: docs/diagnosis.md.
BLURRED = 0.67
THUMBNAIL = 96  # pixels along each side
# Pixels of the thumbnail, 0.3 % of the photo's side: copies that were encoded anew or made smaller
# differ by less, and photos from two places that are of any use by more.
SAME = 0.3


def sharpness(photos: Sequence[Photo]) -> list[float]:
    """Of each photo, from its file, by `edge_ratio`. Raises InputError if one cannot be read."""
    small = partial(gray, longest=LONGEST)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(lambda photo: edge_ratio(small(photo.path)), photos))


def edge_ratio(luma: Array) -> float:
    """How strong the edges of an image [h, w] uint8 are beside those of the same image at a fourth
    of its size: about 0.5 for photos, and less for blur along any direction.

    A smooth wall has weak edges at both sizes, so it is not taken for blurred. Noise hides blur.
    """
    fine = torch.from_numpy(luma.astype(np.float32))
    if min(fine.shape) < 16:
        return math.nan
    coarse = F.avg_pool2d(fine[None], 4)[0]
    pairs = zip(_differences(fine, 3), _differences(coarse, 1), strict=True)
    ratios = [_strong(a) / max(_strong(b), FINEST) for a, b in pairs]
    return min(ratios)


def _differences(x: Tensor, step: int) -> list[Tensor]:
    """Gradients across, down and along both diagonals, at every `step`-th pixel."""
    a, right = x[:-1:step, :-1:step], x[:-1:step, 1::step]
    down, both = x[1::step, :-1:step], x[1::step, 1::step]
    aslant = 1 / math.sqrt(2)
    return [right - a, down - a, aslant * (both - a), aslant * (down - right)]


def _strong(gradient: Tensor) -> float:
    values = gradient.abs().flatten()
    return float(values.kthvalue(max(1, round(STRONG * len(values)))).values)


def blurred(sharpness: Sequence[float]) -> list[int]:
    """The frames that are much less sharp than the median of the others."""
    found = []
    values = torch.tensor(sharpness, dtype=torch.float64)
    for i, value in enumerate(sharpness):
        others = torch.cat([values[:i], values[i + 1 :]])
        others = others[others.isfinite()]
        if len(others) and value < BLURRED * float(others.median()):  # of two the lower
            found.append(i)
    return found


def copies(images: ImageSet) -> list[list[int]]:
    """Groups of frames with the same content, also if encoded, sized or exposed otherwise."""
    looks = thumbnails(images)
    rough = torch.stack([_roughness(x) for x in looks])
    flat = looks.flatten(1)
    # Of two unit vectors a and b, |a - b|^2 = 2 - 2 a b; by |a - b| = roughness * shift.
    difference = (2 - 2 * flat @ flat.mT).clamp(min=0).sqrt()
    same = difference < SAME * torch.minimum(rough[:, None], rough[None])
    return [group for group in components(same) if len(group) > 1]


def thumbnails(images: ImageSet) -> Tensor:
    """[S, THUMBNAIL, THUMBNAIL] float64 grey values with mean 0 and length 1, without padding."""
    found = []
    for i in range(len(images)):
        rows, columns = frame_of(images, i)
        gray = images.pixels[i, :, rows, columns].mean(0, keepdim=True)
        small = F.interpolate(gray[None], (THUMBNAIL, THUMBNAIL), mode="area")[0, 0].double()
        small = small - small.mean()
        found.append(small / small.norm().clamp(min=1e-9))
    return torch.stack(found)


def _roughness(thumbnail: Tensor) -> Tensor:
    """How far a shift by one pixel takes the thumbnail [h, w] from itself: the weaker axis."""
    across = (thumbnail[:, 1:] - thumbnail[:, :-1]).norm()
    return torch.minimum(across, (thumbnail[1:] - thumbnail[:-1]).norm())


def components(linked: Tensor) -> list[list[int]]:
    """Frames that are linked [S, S] bool, directly or through others, in either direction.

    Largest group first, among equals that with the first frame.
    """
    either = linked | linked.mT
    label = torch.arange(len(linked))
    while True:  # labels spread along links until none changes
        least = torch.where(either, label, len(linked)).amin(1, keepdim=False)
        spread = torch.minimum(label, least)
        if torch.equal(spread, label):
            break
        label = spread
    groups = [(label == n).nonzero()[:, 0].tolist() for n in label.unique().tolist()]
    return sorted(groups, key=len, reverse=True)
