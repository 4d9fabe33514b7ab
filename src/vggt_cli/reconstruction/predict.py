"""One forward pass: images in, cameras and depth out, on the CPU."""

from __future__ import annotations

import math

import torch

from vggt_cli.device import exact_convolutions
from vggt_cli.errors import GeometryError
from vggt_cli.geometry import decode_pose, from_first_camera
from vggt_cli.models.networks import Network
from vggt_cli.scene import Cameras, ImageSet, Prediction

# VGGT's field of view may come out as 0, which is no camera (spec vggt section 6).
FIELD_OF_VIEW = (math.radians(1), math.radians(175))


def predict(network: Network, images: ImageSet, frames_per_chunk: int | None = None) -> Prediction:
    """What `network` says about `images`, in the world of frame 0.

    frames_per_chunk: how many frames the dense head takes at a time, memory, not numbers: 8 on an
    accelerator, 1 on the CPU, which is no faster with more.
    Raises GeometryError if a camera is not finite.
    """
    device = next(network.parameters()).device
    frames_per_chunk = frames_per_chunk or (1 if device.type == "cpu" else 8)
    with torch.inference_mode(), exact_convolutions():
        outputs = network(images.pixels[None], frames_per_chunk)
    encoding = outputs.pose_passes[-1, 0].cpu().double()
    if not encoding.isfinite().all():
        frame = int((~encoding.isfinite().all(-1)).nonzero()[0])
        raise GeometryError(
            f"the predicted camera is not finite: {images.names[frame]}",
            hint="do the weights fit the network? see vggt weights verify",
        )
    encoding[:, 7:].clamp_(*FIELD_OF_VIEW)
    extrinsics, intrinsics = decode_pose(encoding, images.size)
    size = torch.tensor(images.size).expand(len(images), 2)
    return from_first_camera(
        Prediction(
            Cameras(extrinsics.float(), intrinsics.float(), size),
            outputs.depth[0].float().cpu(),
            outputs.confidence[0].float().cpu(),
            None if outputs.tokens is None else outputs.tokens[0].float().cpu(),
            None if outputs.text is None else outputs.text[0].float().cpu(),
        )
    )
