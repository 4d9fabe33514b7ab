"""What a network is trained for: the terms of `losses`, weighted and added up for a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vggt_cli.learning import losses
from vggt_cli.learning.losses import Truth
from vggt_cli.models.layers import full_precision
from vggt_cli.models.mini import Mini, MiniConfig


@dataclass(frozen=True)
class Batch:
    """Sequences of one size."""

    pixels: Tensor  # [B, S, 3, H, W]
    truth: Truth


@dataclass(frozen=True)
class Weights:
    """What each term counts."""

    camera: float = 5.0
    depth: float = 5.0
    point: float = 2.0
    matching: float = 0.3


PUBLISHED = Weights()


class Teacher(nn.Module):
    """What only training needs: heads for points and matches on the last layer's patches."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.points = nn.Linear(2 * config.embed_dim, 3)
        self.features = nn.Linear(2 * config.embed_dim, 64)


def objective(
    network: Mini, teacher: Teacher, batch: Batch, weights: Weights
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its terms: camera, depth, points and matches of patches."""
    B, S, _, H, W = batch.pixels.shape
    patch = network.config.patch_size
    # The short sequences of training go through the plain kernel faster than through the fused.
    with torch.autocast(batch.pixels.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        cached = network.aggregate(batch.pixels)
    outputs = network.read(cached, (H, W), B * S)
    patches = cached[network.config.cached_layers[-1]][:, :, 1 + network.config.registers :]
    with full_precision(patches):
        camera = losses.camera_parts(outputs.pose_passes[-1], batch.truth)
        depth = losses.depth_parts(outputs.depth, outputs.confidence, batch.truth)
        true, valid = losses.patch_points(batch.truth, patch)
        points = teacher.points(patches).unflatten(2, true.shape[2:4])
        point = (points - true).abs().clamp(max=10)[valid].mean()
        matching, found = losses.matching_loss(teacher.features(patches), batch.truth, patch)
    total = (
        weights.camera * losses.camera_sum(camera)
        + weights.depth * torch.stack(list(depth.values())).sum()
        + weights.point * point
        + weights.matching * matching
    )
    terms = {"loss": total, **camera, **depth, "point": point, "matching": matching, "found": found}
    return total, {name: value.detach() for name, value in terms.items()}
