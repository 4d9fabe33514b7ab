"""A small scene whose every number is known: cameras side by side before a wall."""

import torch

from vggt_cli.reconstruction.fuse import FuseOptions
from vggt_cli.scene import Cameras, ImageSet, Prediction

H, W, S = 24, 32, 4
EVERYTHING = FuseOptions(points=10_000, confidence=0)


def wall(depth: float = 2.0) -> tuple[Prediction, ImageSet]:
    """S cameras side by side before a wall, sixteen pixels' worth apart in all."""
    extrinsics = torch.eye(3, 4).repeat(S, 1, 1)
    extrinsics[:, 0, 3] = -torch.arange(S) * depth / 30 * 4
    intrinsics = torch.tensor([[30.0, 0, W / 2], [0, 30.0, H / 2], [0, 0, 1]]).repeat(S, 1, 1)
    cameras = Cameras(extrinsics, intrinsics, torch.tensor([[H, W]]).repeat(S, 1))
    random = torch.Generator().manual_seed(0)
    confidence = 1 + torch.rand(S, H, W, generator=random)
    prediction = Prediction(cameras, torch.full((S, H, W), depth), confidence)
    to_source = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)).repeat(S, 1, 1)
    images = ImageSet(
        tuple("abcd"),
        torch.rand(S, 3, H, W, generator=random),
        torch.ones(S, H, W, dtype=torch.bool),
        to_source,
        torch.tensor([[2 * H, 2 * W]]).repeat(S, 1),
    )
    return prediction, images
