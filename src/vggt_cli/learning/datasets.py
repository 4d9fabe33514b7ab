"""Photos with cameras and depth as training data: scenes of `vggt reconstruct` and of COLMAP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Generator, Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats import decode
from vggt_cli.formats.colmap import Model
from vggt_cli.formats.colmap_read import UNDISTORT, locate, read, read_map
from vggt_cli.geometry import pixel_centers, resize
from vggt_cli.learning.places import uniform
from vggt_cli.learning.synthetic import Sample
from vggt_cli.scene import Cameras

# Beside what is known a model of somebody's own may lie, and is no truth.
TRUTH = ("reference", "sparse/0", "sparse")
DEPTHS = (
    "depth/{}.npy",
    "stereo/depth_maps/{}.geometric.bin",
    "stereo/depth_maps/{}.photometric.bin",
)
LEAST_SURE = 0.2  # of a frame's pixels; what `vggt reconstruct` leaves out by default
OVERLAP = 0.1  # frames that share this much of the points of either belong together
LARGEST_ZOOM = 1.25


@dataclass(frozen=True, eq=False)
class PhotoScene:
    """A COLMAP model with its photos and, where there are some, maps of depth and confidence."""

    folder: Path
    model: Model
    depths: tuple[Path | None, ...]  # [S]
    confidences: tuple[Path | None, ...]  # [S]
    photos: str = "images"  # folder in `folder` that the names refer to

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Files in `root`."""
        return self.model.names

    @property
    def root(self) -> Path:
        """The folder of the photos."""
        return self.folder / self.photos

    def path(self, frame: int) -> Path:
        """The photo of a frame."""
        return self.root / self.names[frame]

    def sample(
        self, frames: Sequence[int], size: tuple[int, int], random: Generator | None = None
    ) -> Sample:
        """`frames` at `size`, cut to its aspect around their principal points, as far as they go.

        The world stays that of the model. Depth is that of the nearest pixel; it is not valid
        where it is unknown, among the least sure or transparent.
        random: to see a smaller part, by one factor for all frames.
        Raises InputError for frames with distortion and files that cannot be read.
        """
        zoom = 1.0 if random is None else float(uniform(random, 1, low=1, high=LARGEST_ZOOM))
        maps = torch.stack([self._window(frame, size) for frame in frames])
        maps = maps @ _zoomed(size, zoom)
        pixels, depths, valids = [], [], []
        for frame, source_from_pixel in zip(frames, maps, strict=True):
            seen, opaque = self.pixels(frame, source_from_pixel, size)
            depth, valid = self.depth(frame, source_from_pixel, size)
            pixels.append(seen)
            valids.append(valid & opaque)
            depths.append(torch.where(valids[-1], depth, 1.0))
        chosen, full = list(frames), self.model.cameras
        cameras = Cameras(full.extrinsics[chosen], full.intrinsics[chosen], full.image_size[chosen])
        small = resize(cameras, maps.inverse(), torch.tensor([size]).repeat(len(chosen), 1))
        small = Cameras(small.extrinsics.float(), small.intrinsics.float(), small.image_size)
        return Sample(torch.stack(pixels), small, torch.stack(depths), torch.stack(valids))

    def _window(self, frame: int, size: tuple[int, int]) -> Tensor:
        """[3, 3] from pixels of `size` to the largest window around the principal point."""
        if self.model.lenses[frame].distorted:
            lens = self.model.lenses[frame].model
            raise InputError(f"a photo with distortion ({lens}): {self.path(frame)}", UNDISTORT)
        h, w = self.model.cameras.image_size[frame].tolist()
        cx, cy = self.model.cameras.intrinsics[frame, :2, 2].tolist()
        scale = 2 * min(cx / size[1], (w - cx) / size[1], cy / size[0], (h - cy) / size[0])
        if scale <= 0:
            raise InputError(f"the principal point lies outside the photo: {self.path(frame)}")
        left, top = cx - scale * size[1] / 2, cy - scale * size[0] / 2
        rows = [[scale, 0, left], [0, scale, top], [0, 0, 1]]
        return torch.tensor(rows, dtype=torch.float64)

    def pixels(
        self, frame: int, source_from_pixel: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Pixels [3, H, W] and opaque [H, W] of a frame through a map of scale and shift."""
        h, w = self.model.cameras.image_size[frame].tolist()
        corners = torch.tensor([[0.0, 0, 1], [size[1], size[0], 1]], dtype=torch.float64)
        (left, top), (right, bottom) = (corners @ source_from_pixel.mT)[:, :2].tolist()
        box = max(left, 0.0), max(top, 0.0), min(right, float(w)), min(bottom, float(h))
        return decode.window(self.path(frame), (h, w), box, size)

    def depth(
        self, frame: int, source_from_pixel: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Depth [H, W] of the nearest pixel through a map of scale and shift, and where known."""
        path = self.depths[frame]
        if path is None:
            return torch.zeros(size), torch.zeros(size, dtype=torch.bool)
        xy = pixel_centers(size, source_from_pixel) @ source_from_pixel[:2, :2].mT
        xy, source_size = xy + source_from_pixel[:2, 2], self.model.cameras.image_size[frame]
        depth = nearest(read_map(path), xy, source_size)
        sure = self.confidences[frame]
        if sure is None:
            return depth, depth > 0
        confidence = read_map(sure)
        threshold = confidence.flatten().kthvalue(1 + int(LEAST_SURE * confidence.numel())).values
        return depth, (depth > 0) & (nearest(confidence, xy, source_size) >= threshold)

    @cached_property
    def overlap(self) -> Tensor:
        """[S, S] share of the points of the one that sees fewer which two frames both see.

        1 everywhere if the model has no points, as nothing is known then.
        """
        tracks = self.model.tracks
        if not len(tracks.point):
            return torch.ones(len(self), len(self))
        ones, place = torch.ones(len(tracks.point)).numpy(), (tracks.frame, tracks.point)
        seen = csr_array((ones, place), shape=(len(self), len(tracks.xyz)))
        both = torch.from_numpy((seen @ seen.T).toarray())
        each = both.diagonal()
        return both / torch.minimum(each[:, None], each).clamp(min=1)

    def draw(self, random: Generator, count: int) -> list[int]:
        """`count` random frames with depth, each of which overlaps with one drawn before it.

        Raises InputError if there are not as many.
        """
        usable = torch.tensor([path is not None for path in self.depths])
        linked = (self.overlap >= OVERLAP) & usable & usable[:, None]
        _, group = connected_components(linked.numpy())
        labels = torch.from_numpy(group).long()
        large = usable & (torch.bincount(labels)[labels] >= count)
        if not large.any():
            found = f"no {count} frames with depth that overlap: {self.folder}"
            raise InputError(found, "vggt reconstruct writes depth")
        chosen = [_one_of(random, large)]
        while len(chosen) < count:
            near = linked[chosen].any(0)
            near[chosen] = False
            chosen.append(_one_of(random, near))
        return chosen


def open_scene(folder: Path) -> PhotoScene:
    """The scene in `folder`: images/ with a model in reference/, sparse/0/ or sparse/.

    Depth is found where `vggt reconstruct` writes it (depth/NAME.npy, with
    confidence/NAME.npy) and where COLMAP does (stereo/depth_maps/NAME.geometric.bin or
    .photometric.bin), of any size; photos may lack it.
    Raises InputError if there is no model, or it cannot be read, or a photo is missing.
    """
    there = locate(folder, TRUTH)
    model = read(there)
    for name in model.names:
        if not (folder / "images" / name).is_file():
            raise InputError(f"no such photo, which {there} names: {folder / 'images' / name}")
    depths = [_first(folder, DEPTHS, name) for name in model.names]
    confidences = [
        _first(folder, ("confidence/{}.npy",), name) if depth and depth.suffix == ".npy" else None
        for name, depth in zip(model.names, depths, strict=True)
    ]
    return PhotoScene(folder, model, tuple(depths), tuple(confidences))


def _first(folder: Path, patterns: Sequence[str], name: str) -> Path | None:
    paths = (folder / pattern.format(name) for pattern in patterns)
    return next((path for path in paths if path.is_file()), None)


def _zoomed(size: tuple[int, int], zoom: float) -> Tensor:
    """[3, 3] from pixels of `size` to the same pixels, `zoom` times as near to the middle."""
    middle = torch.tensor([size[1] / 2, size[0] / 2], dtype=torch.float64)
    around = torch.eye(3, dtype=torch.float64)
    around[:2, :2] /= zoom
    around[:2, 2] = middle * (1 - 1 / zoom)
    return around


def nearest(values: Tensor, xy: Tensor, source_size: Tensor) -> Tensor:
    """The map [h, w] of a photo of `source_size` at its pixels `xy` [H, W, 2]; 0 outside."""
    h, w = values.shape
    x, y = (xy * (torch.tensor([w, h]) / source_size.flip(0).double())).floor().long().unbind(-1)
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    return torch.where(inside, values[y.clamp(0, h - 1), x.clamp(0, w - 1)], 0.0)


def _one_of(random: Generator, mask: Tensor) -> int:
    """The place of a random True in `mask` [S]."""
    places = mask.nonzero()[:, 0]
    return int(places[torch.randint(len(places), (1,), generator=random)])
