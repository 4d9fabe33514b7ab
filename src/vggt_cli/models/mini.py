"""The network in the box: VGGT-Omega's build with a convolutional patch encoder.

The encoder has the shape of XFeat's backbone (Potje et al., CVPR 2024, Apache-2.0) and starts
from its weights; the licence of the weights file says so. Sine positions in the tokens and the
matching start of the inter-frame attention are ours: see docs/training.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vggt_cli.models.layers import Size, add_positions
from vggt_cli.models.omega import Trunk, TrunkConfig


@dataclass(frozen=True)
class MiniConfig(TrunkConfig):
    """Every number that a checkpoint of mini fixes."""

    embed_dim: int = 192
    heads: int = 6
    depth: int = 5
    registers: int = 4
    register_blocks: tuple[int, ...] = ()
    cached_layers: tuple[int, ...] = (1, 2, 3, 4)
    layer_scale: float = 1.0
    head_heads: int = 6
    head_depth: int = 1
    features: int = 64
    level_channels: tuple[int, ...] = (48, 96, 128, 128)


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and ReLU; XFeat's batch norms are folded into its weights."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2), nn.ReLU())


class ConvEncoder(nn.Module):
    """Tokens from local features at 1/8 of the resolution, two by two to a patch of 16."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        assert config.patch_size == 16, config.patch_size
        conv = convolution
        self.block1 = nn.Sequential(conv(1, 4), conv(4, 8, 3, 2), conv(8, 8), conv(8, 24, 3, 2))
        self.skip1 = nn.Conv2d(1, 24, 1)
        self.block2 = nn.Sequential(conv(24, 24), conv(24, 24))
        self.block3 = nn.Sequential(conv(24, 64, 3, 2), conv(64, 64), conv(64, 64, 1))
        self.block4 = nn.Sequential(conv(64, 64, 3, 2), conv(64, 64), conv(64, 64))
        self.block5 = nn.Sequential(
            conv(64, 128, 3, 2), conv(128, 128), conv(128, 128), conv(128, 64, 1)
        )
        self.fusion = nn.Sequential(conv(64, 64), conv(64, 64), nn.Conv2d(64, 64, 1))
        self.proj = nn.Linear(4 * 64 + 3, config.embed_dim)
        self.norm = nn.LayerNorm(config.embed_dim)

    def forward(self, images: Tensor, grid: Size) -> Tensor:  # [b, 3, H, W] -> [b, N, D]
        h, w = grid
        images = images[:, :, : 16 * h, : 16 * w]
        gray = F.instance_norm(images.mean(1, keepdim=True))
        x = self.block1(gray) + self.skip1(F.avg_pool2d(gray, 4))
        fine = self.block3(self.block2(x))  # [b, 64, 2h, 2w]
        middle = self.block4(fine)
        coarse = self.block5(middle)
        both = (F.interpolate(y, fine.shape[-2:], mode="bilinear") for y in (middle, coarse))
        local = F.pixel_unshuffle(self.fusion(fine + sum(both)), 2)  # [b, 256, h, w]
        color = F.avg_pool2d(images, 16)
        tokens = self.norm(self.proj(torch.cat([local, color], 1).flatten(2).mT))
        # Ten times the tenth that dense heads add: attention between frames has no other positions.
        placed = add_positions(torch.zeros_like(tokens).mT.unflatten(-1, grid), w / h) * 10
        out: Tensor = tokens + placed.flatten(2).mT
        return out


class Mini(Trunk):
    """Our small network; fresh, it matches what looks alike between frames and knows no more."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config, ConvEncoder(config))
        self.config = config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        D = config.embed_dim
        with torch.no_grad():
            for block in self.aggregator.inter_frame_blocks:
                weight = block.get_submodule("attn.qkv").get_parameter("weight")
                weight[D : 2 * D] = weight[:D]  # queries meet keys of the same content
            pose = self.camera_head.camera_branch[2]
            assert isinstance(pose, nn.Linear)
            pose.weight.mul_(0.1)
            # Near the identity and 60 degrees from the first step on.
            pose.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1.0]))
