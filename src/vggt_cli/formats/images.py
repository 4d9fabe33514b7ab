"""Photos as a network takes them: at its size, stacked, with the way back to their files."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats import room
from vggt_cli.formats.decode import read
from vggt_cli.formats.files import KINDS, name_in
from vggt_cli.scene import ImageSet, Photo, Shaping

log = logging.getLogger(__name__)

AT_ONCE = 64  # photos whose pixels wait to be stacked


@dataclass(frozen=True, eq=False)
class Loaded:
    """Readable photos with their images, and why others were left out."""

    images: ImageSet
    photos: tuple[Photo, ...]
    unreadable: tuple[tuple[str, str], ...]  # (name, reason)


def network_size(size: tuple[int, int], shaping: Shaping) -> tuple[int, int]:
    """(height, width) at which a network sees an image of `size`; the aspect is kept.

    Source: spec vggt section 11 (mode "pad" without the padding), vggt_omega section 12
    (mode "balanced" without the crop beyond 2:1). Python rounds half to even, as they do.
    """
    H, W = size
    p, resolution = shaping.patch_size, shaping.resolution
    if shaping.mode == "balanced":
        patches = (resolution / p) ** 2
        columns = math.sqrt(patches / (H / W))
        return max(1, round(patches / columns)) * p, max(1, round(columns)) * p
    longer = max(1, round(resolution / p)) * p  # --resolution may be any number
    if W >= H:
        return max(1, round(H * (longer / W) / p)) * p, longer
    return longer, max(1, round(W * (longer / H) / p)) * p


def load(
    root: Path,
    paths: Sequence[Path],
    shaping: Shaping,
    progress: Callable[[int], None] = lambda done: None,
    masks: Sequence[Path | None] = (),
    on_disk: tuple[int, int] | None = None,
) -> Loaded:
    """The images of `paths` as a network takes them; files that cannot be read are left out.

    Mixed sizes are padded with white to the largest, centred; padding is not valid.
    progress: called with the number of files decoded so far.
    masks: of each path, see `masks.matching`; what they leave out is not valid.
    on_disk: (height, width) of the largest by their headers; then pixels lie in a file, as float16,
        and memory does not grow with them.
    Raises InputError if no file can be read, or a mask does not fit its photo; OutputError where
    the disk is full.
    """
    unreadable: list[tuple[str, str]] = []
    shape = partial(network_size, shaping=shaping)
    decoded = _decoded_in_turn(root, paths, shape, masks, unreadable, progress)
    loaded = _to_disk(decoded, len(paths), on_disk) if on_disk else _together(list(decoded))
    if loaded is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in unreadable[:3])
        raise InputError(f"none of {len(paths)} images can be read: {reasons}", hint=KINDS)
    return replace(loaded, unreadable=tuple(unreadable))


def _decoded_in_turn(
    root: Path,
    paths: Sequence[Path],
    shape: Callable[[tuple[int, int]], tuple[int, int]],
    masks: Sequence[Path | None],
    unreadable: list[tuple[str, str]],
    progress: Callable[[int], None],
) -> Iterator[tuple[Photo, Tensor]]:
    """See `decode.read`; what cannot be read goes to `unreadable`."""
    names = [name_in(root, path) for path in paths]
    every = list(zip(paths, names, masks or [None] * len(paths), strict=True))
    done = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, len(every), AT_ONCE):
            some = every[start : start + AT_ONCE]
            results = threads.map(lambda one: read(one[0], one[1], shape, one[2]), some)
            for (path, name, _), result in zip(some, results, strict=True):
                done += 1
                if isinstance(result, str):
                    unreadable.append((name, result))
                    log.warning("left out, cannot be read: %s (%s)", path, result)
                else:
                    yield result
                progress(done)


def load_sized(
    paths: Sequence[Path],
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    masks: Sequence[Path | None],
) -> Loaded:
    """The photos called `names`, each at its own network size. Raises InputError for a bad one."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        known = [lambda _, size=size: size for size in sizes]
        results = list(threads.map(read, paths, names, known, masks))
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, str):
            raise InputError(f"cannot be read: {path} ({result})", hint=KINDS)
    loaded = _together([x for x in results if not isinstance(x, str)])
    assert loaded is not None, "no photos"
    return loaded


def _together(decoded: Sequence[tuple[Photo, Tensor]]) -> Loaded | None:
    if not decoded:
        return None
    photos = tuple(photo for photo, _ in decoded)
    source_size = torch.tensor([photo.size for photo in photos])
    images = stack([photo.name for photo in photos], [x for _, x in decoded], source_size)
    return Loaded(images, photos, ())


def _to_disk(
    decoded: Iterator[tuple[Photo, Tensor]], count: int, size: tuple[int, int]
) -> Loaded | None:
    """The same, as it comes; at most `count` photos, padded to `size`."""
    H, W = size
    pixels = room.on_disk((count, 3, H, W), torch.float16)
    valid = room.on_disk((count, H, W), torch.bool)
    photos, maps = [], []
    for i, (photo, rgba) in enumerate(decoded):
        maps.append(_place(rgba, photo.size, pixels[i], valid[i]))
        photos.append(photo)
        if len(photos) % AT_ONCE == 0:
            room.let_go()
    if not photos:
        return None
    n, source_size = len(photos), torch.tensor([photo.size for photo in photos])
    names = tuple(photo.name for photo in photos)
    images = ImageSet(names, pixels[:n], valid[:n], torch.stack(maps), source_size)
    return Loaded(images, tuple(photos), ())


def stack(names: Sequence[str], rgba: Sequence[Tensor], source_size: Tensor) -> ImageSet:
    """One ImageSet of images [4, h, w] uint8, padded with white around their centres.

    source_size: [S, 2] (height, width) of the upright sources.
    """
    H, W = (max(x.shape[axis] for x in rgba) for axis in (1, 2))
    pixels = torch.empty(len(rgba), 3, H, W)
    valid = torch.empty(len(rgba), H, W, dtype=torch.bool)
    sizes = [(int(h), int(w)) for h, w in source_size]
    maps = [
        _place(x, size, *into) for x, size, *into in zip(rgba, sizes, pixels, valid, strict=True)
    ]
    return ImageSet(tuple(names), pixels, valid, torch.stack(maps), source_size)


def _place(rgba: Tensor, source: tuple[int, int], pixels: Tensor, valid: Tensor) -> Tensor:
    """Puts [4, h, w] uint8 into the middle of `pixels` [3, H, W] and `valid` [H, W].

    Returns the map [3, 3] float64 from there to the upright photo, which has size `source`.
    """
    h, w = rgba.shape[1:]
    top, left = ((n - m) // 2 for n, m in zip(valid.shape, (h, w), strict=True))
    if (h, w) != valid.shape:
        pixels.fill_(1)
        valid.fill_(False)
    pixels[:, top : top + h, left : left + w] = rgba[:3].float() / 255
    valid[top : top + h, left : left + w] = rgba[3] >= 128
    scale = torch.tensor(source[::-1], dtype=torch.float64) / torch.tensor([w, h])
    to_source = torch.eye(3, dtype=torch.float64)
    to_source[:2, :2] = torch.diag(scale)
    to_source[:2, 2] = -scale * torch.tensor([left, top])
    return to_source


def frame_of(images: ImageSet, frame: int) -> tuple[slice, slice]:
    """Rows and columns of the network's image that hold the photo, without padding."""
    scale = torch.diagonal(images.source_from_network[frame])[:2]
    left, top = (-images.source_from_network[frame, :2, 2] / scale).round().long().tolist()
    w, h = (images.source_size[frame].flip(0) / scale).round().long().tolist()
    return slice(top, top + h), slice(left, left + w)
