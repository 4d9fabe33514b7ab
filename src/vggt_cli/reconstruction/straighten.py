"""One undistortion for all that a lens bent: photos, depth, confidence, masks, observations."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vggt_cli.formats.images import frame_of
from vggt_cli.geometry import (
    distort,
    keep_points,
    pixel_centers,
    reframe,
    resize,
    sample,
    straight_intrinsics,
    undistort,
)
from vggt_cli.scene import Cameras, ImageSet, Prediction, Setup, Tracks

SAME_SURFACE = 1.03  # largest of four neighbouring depths, of the least: they may be averaged


def straightened(
    images: ImageSet, prediction: Prediction, tracks: Tracks, setup: Setup
) -> tuple[ImageSet, Prediction, Tracks, Cameras]:
    """The same scene through lenses without radial term, and its cameras in source pixels.

    Sizes, `source_from_network` and z-depth at a ray stay; focal lengths change as
    `straight_intrinsics` says, and observations that the new image does not show are left out,
    with the points that keep fewer than two. Frames of radial 0 stay as they are, bit for bit.
    prediction: its cameras are those of `setup` in network pixels.
    """
    bent = setup.radial != 0
    if not bool(bent.any()):
        return images, prediction, tracks, setup.cameras
    before, size = setup.cameras, setup.cameras.image_size
    after = straight_intrinsics(before.intrinsics, setup.radial, size)
    cameras = Cameras(before.extrinsics, after, size)
    pixels, valid = images.pixels.clone(), images.valid.clone()
    depth, confidence = prediction.depth.clone(), prediction.confidence.clone()
    for frame in bent.nonzero()[:, 0].tolist():
        inner = (frame, *frame_of(images, frame))  # without padding
        xy = _seen(images, setup, after[frame], frame)
        nearest, smooth = _depth(depth[inner], valid[inner], xy)
        depth[inner] = smooth
        confidence[inner] = confidence[inner].flatten()[nearest]
        h, w = nearest.shape
        inside = ((xy >= 0) & (xy <= torch.tensor([w, h]))).all(-1)  # NaN is not
        valid[inner] = valid[inner].flatten()[nearest] & inside
        rows, columns = inner[1:]
        pixels[frame, :, rows, columns] = sample(pixels[frame, :, rows, columns], xy).clamp(0, 1)
    network = prediction.cameras
    moved = resize(cameras, torch.linalg.inv(images.source_from_network), network.image_size)
    intrinsics = torch.where(
        bent[:, None, None], moved.intrinsics.to(network.intrinsics), network.intrinsics
    )
    return (
        dataclasses.replace(images, pixels=pixels, valid=valid),
        dataclasses.replace(
            prediction,
            cameras=Cameras(network.extrinsics, intrinsics, network.image_size),
            depth=depth,
            confidence=confidence,
        ),
        straight_tracks(tracks, setup, after),
        cameras,
    )


def _seen(images: ImageSet, setup: Setup, straight: Tensor, frame: int) -> Tensor:
    """Where each pixel of the new network image lies in the old, [h, w, 2], without padding."""
    rows, columns = frame_of(images, frame)
    corner = torch.tensor([columns.start, rows.start])
    to_source = images.source_from_network[frame]
    scale, shift = torch.diagonal(to_source)[:2], to_source[:2, 2]
    centers = pixel_centers((rows.stop - rows.start, columns.stop - columns.start), to_source)
    lens = setup.cameras.intrinsics[frame].double()
    xy = reframe((centers + corner) * scale + shift, straight.double(), lens)
    return (distort(xy, lens, setup.radial[frame].double()) - shift) / scale - corner


def _depth(depth: Tensor, valid: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest pixel to each of `xy` [h, w, 2], a flat index, and the depth at it, [h, w] each.

    Depth is that of the four neighbours where they are one surface (1 / z is linear on a plane),
    else of the nearest: a mean over an edge would float between near and far.
    """
    h, w = depth.shape
    low = (xy.nan_to_num(0.0) - 0.5).floor()
    part = xy.nan_to_num(0.0) - 0.5 - low  # in [0, 1)
    column, row = ((low[..., axis, None] + torch.tensor([0, 1])).long() for axis in (0, 1))
    four = row.clamp(0, h - 1)[..., :, None] * w + column.clamp(0, w - 1)[..., None, :]
    share = torch.stack([1 - part, part], -1)  # [h, w, xy, low or high]
    weight = share[..., 1, :, None] * share[..., 0, None, :]
    four, weight = four.flatten(-2), weight.flatten(-2)
    nearest = four.gather(-1, weight.argmax(-1, keepdim=True))[..., 0]
    z = depth.flatten()[four]
    alike = (z.amin(-1) > 0) & (z.amax(-1) <= SAME_SURFACE * z.amin(-1))
    alike &= valid.flatten()[four].all(-1)
    mean = 1 / (weight / z).sum(-1)
    return nearest, torch.where(alike, mean.to(depth), depth.flatten()[nearest])


def straight_tracks(tracks: Tracks, setup: Setup, straight: Tensor) -> Tracks:
    """The tracks in pixels of the pinhole intrinsics `straight` [S, 3, 3] instead of the photos'.

    Observations outside the new images are left out, and points that keep fewer than two.
    """
    frame = tracks.frame.long()
    lens, term = setup.cameras.intrinsics.double()[frame], setup.radial.double()[frame]
    xy = reframe(undistort(tracks.xy.double(), lens, term), lens, straight.double()[frame])
    xy = torch.where((term == 0)[:, None], tracks.xy, xy.to(tracks.xy))
    size = setup.cameras.image_size.flip(-1)[frame]
    rows = (term == 0) | ((xy > 0) & (xy < size)).all(-1)  # NaN is not
    enough = torch.bincount(tracks.point[rows], minlength=len(tracks.xyz)) >= 2
    shown = Tracks(tracks.xyz, tracks.point[rows], tracks.frame[rows], xy[rows])
    return keep_points(shown, enough)
