"""The network in the box: VGGT-Omega's build on local features and their matches.

The patch encoder has the shape of XFeat's backbone (Potje et al., CVPR 2024, Apache-2.0) and its
weights; the licence of the weights file says so. Sine positions and matches with the first frame
go into the patch tokens: what a large network finds by attention is given to this small one. Why,
and what it is worth, is measured in docs/training.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vggt_cli.models.layers import Size, add_positions
from vggt_cli.models.omega import Aggregator, Trunk, TrunkConfig

FACTS = 12  # of a patch: (x, y) in the first frame and certainty of each of its four cells


@dataclass(frozen=True)
class MiniConfig(TrunkConfig):
    """Every number that a checkpoint of mini fixes."""

    embed_dim: int = 192
    heads: int = 6
    depth: int = 5
    registers: int = 4
    register_blocks: tuple[int, ...] = ()
    cached_layers: tuple[int, ...] = (1, 2, 3, 4)
    layer_scale: float = 0.3
    head_heads: int = 6
    head_depth: int = 1
    features: int = 64
    level_channels: tuple[int, ...] = (48, 96, 128, 128)


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and ReLU; XFeat's batch norms are folded into its weights."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2), nn.ReLU())


class ConvEncoder(nn.Module):
    """Local features at 1/8 of the resolution, made of the gray image."""

    def __init__(self) -> None:
        super().__init__()
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

    def forward(self, images: Tensor) -> Tensor:  # [b, 3, H, W] -> [b, 64, H / 8, W / 8]
        gray = F.instance_norm(images.mean(1, keepdim=True))
        x = self.block1(gray) + self.skip1(F.avg_pool2d(gray, 4))
        fine = self.block3(self.block2(x))
        middle = self.block4(fine)
        coarse = self.block5(middle)
        both = (F.interpolate(y, fine.shape[-2:], mode="bilinear") for y in (middle, coarse))
        out: Tensor = self.fusion(fine + sum(both))
        return out


def matched_places(features: Tensor, first: Tensor) -> Tensor:
    """[b, 3, h, w]: for each cell its match (x, y) in the first frame and how certain it is.

    features: [b, C, h, w]; first: [b, C, h, w] of the first frame. Places are relative to the
    centre, in halves of the longer side. Of the cells around the most alike one the mean place,
    weighted by likeness; certain (1) where both cells are each other's only candidate.
    """
    h, w = features.shape[-2:]
    a, b = (F.normalize(x.float().flatten(2), dim=1) for x in (features, first))
    alike = a.mT @ b * 40  # [b, cell, cell of the first frame]
    certain, best = (alike.softmax(-1) * alike.softmax(-2)).max(-1)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    cells = torch.stack([columns, rows], -1).flatten(0, 1).to(a)  # [h w, 2]
    near = (cells[best][:, :, None] - cells).abs().amax(-1) <= 1  # [b, cell, cell]
    weight = alike.masked_fill(~near, -torch.inf).softmax(-1)
    size = torch.tensor([w, h]).to(a)
    places = ((weight @ cells) + 0.5 - size / 2) / (max(h, w) / 2)
    return torch.unflatten(torch.cat([places, certain[..., None]], -1).mT, -1, (h, w))


class MiniAggregator(Aggregator):
    """The aggregator on patch tokens of local features, colour, place and match."""

    def __init__(self, config: MiniConfig) -> None:
        assert config.patch_size == 16, config.patch_size
        super().__init__(config, ConvEncoder())
        self.proj = nn.Linear(4 * 64 + 3, config.embed_dim)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.match = nn.Linear(2 * FACTS, config.embed_dim)

    def embed(self, images: Tensor, grid: Size) -> Tensor:  # [B, S, 3, H, W] -> [B, S, N, D]
        B, S = images.shape[:2]
        h, w = grid
        images = images[..., : 16 * h, : 16 * w].flatten(0, 1)
        local = self.patch_embed(images).unflatten(0, (B, S))
        with torch.no_grad():
            found = [matched_places(local[:, s], local[:, 0]) for s in range(S)]
            own = matched_places(local[:, 0], local[:, 0])[:, None].expand(-1, S, -1, -1, -1)
            match = torch.stack(found, 1)
        facts = torch.cat([match, match - own], 2).flatten(0, 1)  # place, and how far it moved
        look = torch.cat([F.pixel_unshuffle(local.flatten(0, 1), 2), F.avg_pool2d(images, 16)], 1)
        tokens = self.norm(self.proj(look.flatten(2).mT))
        tokens = tokens + self.match(F.pixel_unshuffle(facts, 2).flatten(2).mT)
        blank = torch.zeros_like(tokens).mT.unflatten(-1, grid)
        placed = add_positions(blank, w / h) * 10  # that is, at full strength
        return torch.unflatten(tokens + placed.flatten(2).mT, 0, (B, S))


class Mini(Trunk):
    """Our small network."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config, MiniAggregator(config))
        self.config = config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        pose = self.camera_head.camera_branch[2]
        assert isinstance(pose, nn.Linear)
        with torch.no_grad():
            pose.weight.mul_(0.1)
            # Near the identity and 60 degrees from the first step on.
            pose.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1.0]))
