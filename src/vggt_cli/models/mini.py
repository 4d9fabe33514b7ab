"""The network in the box: VGGT-Omega's build around matches and a solver.

What a large network finds by attention is given to this small one. Its patch encoder is a small
convolutional one, trained so that its features match from photo to photo; it has the shape of
XFeat's backbone (Potje et al., CVPR 2024, Apache-2.0) and started from its weights, with colours
added; the licence of the weights file says so. Matches with the first frame go into the tokens.
The heads' depth and poses are the first guess of `solver`, which finds the cameras that explain
all matches. Why, and what each part is worth, is measured in docs/training.md.

B batch, S frames, H x W pixels, N patches of a frame, T = 1 + R + N tokens, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vggt_cli.geometry import compose, decode_pose, encode_pose, invert
from vggt_cli.models import solver
from vggt_cli.models.layers import (
    Outputs,
    Size,
    add_positions,
    by_frames,
    compute,
    full_precision,
    initialize,
    normalized,
)
from vggt_cli.models.omega import Aggregator, CameraHead, DenseHead, TrunkConfig
from vggt_cli.models.solver import Matches, Solution

SHARPNESS = 20.0  # of the likeness of features that match: they are trained with it


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
    """Local features at 1/8 of the resolution: XFeat's, of the gray image, and colours'."""

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
        self.colors = nn.Sequential(
            conv(3, 24, 3, 2), conv(24, 48, 3, 2), conv(48, 64, 3, 2), nn.Conv2d(64, 64, 1)
        )
        nn.init.zeros_(self.colors[3].get_parameter("weight"))  # at first it is XFeat
        nn.init.zeros_(self.colors[3].get_parameter("bias"))

    def forward(self, images: Tensor) -> Tensor:  # [b, 3, H, W] -> [b, 64, H / 8, W / 8]
        gray = F.instance_norm(images.mean(1, keepdim=True))
        x = self.block1(gray) + self.skip1(F.avg_pool2d(gray, 4))
        fine = self.block3(self.block2(x))
        middle = self.block4(fine)
        coarse = self.block5(middle)
        both = (F.interpolate(y, fine.shape[-2:], mode="bilinear") for y in (middle, coarse))
        out: Tensor = self.fusion(fine + sum(both)) + self.colors(images)
        return out


class Seen(NamedTuple):
    """What the heads read."""

    layers: list[Tensor]  # four times [B, S, T, 2D]
    local: Tensor  # [B, S, 64, 2 h, 2 w] features of the encoder
    size: Size  # of the images


class Guess(NamedTuple):
    """What the heads say before the solver has spoken."""

    depth: Tensor  # [B, S, H, W]
    confidence: Tensor  # [B, S, H, W]
    pose: Tensor  # [B, S, 9] pose encodings
    context: Tensor  # [B, S, 128, 2 h, 2 w] features to match, in the light of all frames


class Mini(nn.Module):
    """Our small network."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        assert config.patch_size == 16, config.patch_size
        self.config = config
        D = config.embed_dim
        self.aggregator = Aggregator(config, ConvEncoder())
        self.look = nn.Linear(4 * 64 + 3, D)
        self.look_norm = nn.LayerNorm(D)
        self.match = nn.Linear(7, D)
        self.context = nn.Linear(2 * D, 4 * 64)
        self.camera_head = CameraHead(config)
        self.dense_head = DenseHead(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                initialize(module)
                nn.init.xavier_uniform_(module.weight)
        pose = self.camera_head.camera_branch[2]
        assert isinstance(pose, nn.Linear)
        with torch.no_grad():
            pose.weight.mul_(0.1)
            # Near the identity and 60 degrees from the first step on.
            pose.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1.0]))

    def forward(self, images: Tensor, frames_per_chunk: int = 8) -> Outputs:
        """Cameras and depth of images [B, S, 3, H, W] in [0, 1]."""
        return self.read(self.aggregate(images), frames_per_chunk)

    def aggregate(self, images: Tensor) -> Seen:
        """The matches and the tokens of images [B, S, 3, H, W] in [0, 1]."""
        B, S, _, H, W = images.shape
        h, w = grid = (H // 16, W // 16)
        with compute(self.aggregator.get_parameter("frame_blocks.0.attn.proj.weight")):
            pixels = normalized(images)[..., : 16 * h, : 16 * w].flatten(0, 1)
            local = self.aggregator.patch_embed(pixels)
            with full_precision(images), torch.no_grad():
                first = torch.zeros(B, S, 1, dtype=torch.int64, device=images.device)
                matches = solver.find(local.unflatten(0, (B, S)), first, SHARPNESS)
            look = torch.cat([F.pixel_unshuffle(local, 2), F.avg_pool2d(pixels, 16)], 1)
            tokens = self.look_norm(self.look(look.flatten(2).mT))  # [B S, N, D]
            placed = add_positions(torch.zeros_like(tokens).mT.unflatten(-1, grid), w / h)
            tokens = tokens + placed.flatten(2).mT * 10  # at full strength
            place, certainty = matches.place[:, :, 0], matches.certainty[:, :, 0, :, None]
            facts = torch.cat([place, certainty, matches.own, place - matches.own], -1)
            tokens = tokens.unflatten(0, (B, S)) + self.match(facts)
            cached = self.aggregator.attend(tokens, grid)
        layers = [cached[i] for i in self.config.cached_layers]
        return Seen(layers, local.unflatten(0, (B, S)), (H, W))

    def read(self, seen: Seen, frames_per_chunk: int = 8) -> Outputs:
        """What the heads and the solver make of it; two passes of poses, before and after."""
        guess = self.guess(seen, frames_per_chunk)
        pose, depth = self.settle(seen, guess)
        tokens = seen.layers[-1][:, :, : 1 + self.config.registers]
        passes = torch.stack([guess.pose, pose])
        return Outputs(passes, depth, guess.confidence, tokens=tokens)

    def guess(self, seen: Seen, frames_per_chunk: int = 8) -> Guess:
        """What the heads say."""
        special = 1 + self.config.registers
        dense = partial(self.dense_head, size=seen.size)
        with full_precision(seen.layers[-1]):
            patches = [layer[:, :, special:] for layer in seen.layers]
            depth, confidence = by_frames(dense, patches, frames_per_chunk)
            pose = self.camera_head(seen.layers[-1][:, :, :special].float())
            context = self.context(patches[-1].float()).flatten(0, 1).mT
            cells = context.unflatten(-1, (seen.size[0] // 16, seen.size[1] // 16))
            context = F.pixel_shuffle(cells, 2).unflatten(0, seen.local.shape[:2])
            # Each half counts as much as the other, and as sharply as alone.
            both = [F.normalize(x, dim=2) for x in (seen.local.float(), context)]
        return Guess(depth, confidence, pose, torch.cat(both, 2))

    def settle(self, seen: Seen, guess: Guess) -> tuple[Tensor, Tensor]:
        """Pose encodings [B, S, 9] and depth [B, S, H, W] by the solver, without gradient."""
        with full_precision(guess.depth), torch.no_grad():
            matches = solver.find(guess.context, solver.others(guess.context), 2 * SHARPNESS)
            solution, change = _solved(matches, guess.depth, guess.pose, seen.size)
            closer = F.interpolate(change, guess.depth.shape[-2:], mode="bilinear").exp()
            return _encoded(solution, seen.size), guess.depth * closer


def _solved(matches: Matches, depth: Tensor, pose: Tensor, size: Size) -> tuple[Solution, Tensor]:
    """The solution in the scale of depth [B, S, H, W], and the change of log depth [B, S, h, w].

    The change is that of the patches with matches that agree, smoothed over their neighbours.
    """
    h, w = grid = (size[0] // 16, size[1] // 16)
    coarse = F.avg_pool2d(depth[..., : 16 * h, : 16 * w], 8).flatten(2).gather(2, matches.cell)
    extrinsics, lenses = decode_pose(pose, (16 * h, 16 * w))
    focal = lenses[..., 0, 0].mean(1) / (8 * max(grid))
    # In the world of the first camera, which the head only nearly is.
    extrinsics = compose(extrinsics, invert(extrinsics[:, :1]).expand_as(extrinsics))
    found = solver.cameras(matches, coarse, (extrinsics[..., :3], extrinsics[..., 3]), focal, grid)
    weight = found.agreement.amax(2)  # [B, S, N]
    change = (found.depth / coarse).log()
    scale = -(change * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)
    found = found._replace(
        translation=found.translation * scale.exp()[:, None, None],
        depth=found.depth * scale.exp()[:, None, None],
    )
    change = (change + scale[:, None, None]).clamp(-1, 1)
    smooth = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1)
    total, count = (smooth(x.unflatten(-1, grid)) for x in (change * weight, weight))
    return found, total / (count + 0.1)


def _encoded(solution: Solution, size: Size) -> Tensor:
    """[B, S, 9] pose encodings of a solution, for images of that size."""
    S = solution.depth.shape[1]
    focal = solution.focal * (max(size) // 16 * 8)
    lens = torch.diag_embed(torch.stack([focal, focal, torch.ones_like(focal)], -1))
    extrinsics = torch.cat([solution.rotation, solution.translation[..., None]], -1)
    return encode_pose(extrinsics, lens[:, None].expand(-1, S, -1, -1), size)
