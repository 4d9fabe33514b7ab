"""A rendered scene that no flip survives: true depth and cameras, one photo narrower."""

from pathlib import Path as File

import torch
from disturb import from_first
from PIL import Image

from vggt_cli.formats.images import stack
from vggt_cli.learning.synthetic import Path, Sample, sample
from vggt_cli.reconstruction.fuse import FuseOptions, fuse
from vggt_cli.scene import Cameras, Photo, Prediction, Provenance, Scene

MADE_BY = Provenance("truth", "0" * 64, "none", True, "cpu", "float32", {"confidence": 0.0})
NARROW = 2  # the frame that lacks MARGIN columns on either side, and is padded there
MARGIN = 16
SCALE = 2  # pixels of the files in one of the maps


def truth(frames: int = 6, size: tuple[int, int] = (96, 128), seed: int = 3) -> Sample:
    """A room, its first camera at the origin."""
    found = sample(seed, Path(frames=frames, size=size, spread=0.5))
    cameras = found.cameras
    moved = from_first(cameras.extrinsics.double()).float()
    cameras = Cameras(moved, cameras.intrinsics, cameras.image_size)
    return Sample(found.pixels, cameras, found.depth, found.valid)


def scene_of(true: Sample, folder: File) -> Scene:
    """The scene of a network that is never wrong, its photos in `folder`."""
    folder.mkdir()
    photos, rgba, sizes = [], [], []
    for i, pixels in enumerate(true.pixels):
        cut = slice(MARGIN, -MARGIN) if i == NARROW else slice(None)
        one = (pixels[:, :, cut] * 255).round().byte()
        h, w = one.shape[1] * SCALE, one.shape[2] * SCALE
        path = folder / f"p{i}.png"
        image = Image.fromarray(one.permute(1, 2, 0).numpy())
        image.resize((w, h), Image.Resampling.NEAREST).save(path)
        photos.append(Photo(path, path.name, (h, w)))
        rgba.append(torch.cat([one, torch.full_like(one[:1], 255)]))
        sizes.append((h, w))
    images = stack([photo.name for photo in photos], rgba, torch.tensor(sizes))
    prediction = Prediction(true.cameras, true.depth, torch.full_like(true.depth, 2.0))
    everything = FuseOptions(points=20_000, confidence=0)
    cloud = fuse(prediction, images, everything)
    assert cloud.observations is not None
    groups = tuple(int(i == NARROW) for i in range(len(photos)))
    dense = fuse(prediction, images, everything, observe=False)
    return Scene(
        tuple(photos), images, prediction, groups, cloud.observations, cloud.rgb, dense, MADE_BY
    )
