"""The network in the box: VGGT-Omega's build around matches and a solver.

What a large network finds by attention is given to this small one. Its patch encoder is a small
convolutional one, trained so that its features match from photo to photo; it has the shape of
XFeat's backbone (Potje et al., CVPR 2024, Apache-2.0) and started from its weights, with colours
added; the licence of the weights file says so. After a few blocks a linear layer guesses depth,
`solver` finds the cameras that explain the matches, and the other blocks go on from there. Why,
and what each part is worth, is measured in docs/training.md.

B batch, S frames, H x W pixels, N patches of a frame, T = 1 + R + N tokens, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vggt_cli.geometry import encode_pose
from vggt_cli.models import solver
from vggt_cli.models.layers import (
    Outputs,
    Size,
    add_positions,
    by_frames,
    full_precision,
    normalized,
    with_special_tokens,
)
from vggt_cli.models.omega import Aggregator, CameraHead, Trunk, TrunkConfig
from vggt_cli.models.solver import Matches, Solution

# What stands among the cached layers besides them:
GUESS = -1  # [B, S, N] logarithm of depth at the cells, before the solver
CELL = -2  # [B, S, N] int64 the cell of each patch, of 2 h x 2 w
SOLVED = -3  # [B, S, 9] pose encodings by the solver
LOCAL = -4  # [B, S, 64, 2 h, 2 w] local features


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
    solved_after: int = 2  # pairs of blocks


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


class MiniAggregator(Aggregator):
    """The aggregator on patch tokens of look, place and match, with the solver inside."""

    def __init__(self, config: MiniConfig) -> None:
        assert config.patch_size == 16, config.patch_size
        super().__init__(config, ConvEncoder())
        self.solved_after = config.solved_after
        D = config.embed_dim
        self.proj = nn.Linear(4 * 64 + 3, D)
        self.norm = nn.LayerNorm(D)
        self.match = nn.Linear(7, D)
        self.guess = nn.Linear(2 * D, 1)
        self.pose = nn.Linear(12, D)
        self.place = nn.Linear(8, D)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """The cached layers [B, S, T, 2D] of images [B, S, 3, H, W], and GUESS to LOCAL."""
        B, S, _, H, W = images.shape
        grid = (H // 16, W // 16)
        pixels = normalized(images)[..., : 16 * grid[0], : 16 * grid[1]]
        local = self.patch_embed(pixels.flatten(0, 1)).unflatten(0, (B, S))
        with full_precision(images), torch.no_grad():
            matches = solver.find(local)
        patches = self.look(pixels, local) + self.match(_in_first_frame(matches))
        tokens = with_special_tokens([self.camera_token, self.register_token], patches)
        special = 1 + self.config.registers
        rotate = self.rope_embed(grid, special)
        cached = {CELL: matches.cell, LOCAL: local}
        for i in range(self.config.depth):
            frame = self.frame_blocks[i](tokens.flatten(0, 1), rotate).unflatten(0, (B, S))
            tokens = self.inter_frame_blocks[i](frame.flatten(1, 2)).unflatten(1, (S, -1))
            both = torch.cat([frame, tokens], -1)
            if i in self.config.cached_layers:
                cached[i] = both
            if i + 1 == self.solved_after:
                guess = self.guess(both[:, :, special:])[..., 0].float().clamp(-3, 3)
                with full_precision(images), torch.no_grad():
                    solution = solver.cameras(matches, guess.exp(), grid)
                    solved, pose, place = _facts(matches, guess, solution, (H, W))
                cached |= {GUESS: guess, SOLVED: solved}
                of_camera = F.pad(self.pose(pose)[:, :, None], (0, 0, 0, special - 1))
                tokens = tokens + torch.cat([of_camera, self.place(place)], 2)
        return cached

    def look(self, pixels: Tensor, local: Tensor) -> Tensor:
        """[B, S, N, D] what patches look like and where they are.

        pixels: [B, S, 3, 16 h, 16 w] normalised; local: [B, S, 64, 2 h, 2 w] features.
        """
        B, S = pixels.shape[:2]
        colors = F.avg_pool2d(pixels.flatten(0, 1), 16)
        look = torch.cat([F.pixel_unshuffle(local.flatten(0, 1), 2), colors], 1)
        tokens = self.norm(self.proj(look.flatten(2).mT))  # [B S, N, D]
        h, w = look.shape[-2:]
        placed = add_positions(torch.zeros_like(tokens).mT.unflatten(-1, (h, w)), w / h)
        return torch.unflatten(tokens + placed.flatten(2).mT * 10, 0, (B, S))  # at full strength


def _in_first_frame(matches: Matches) -> Tensor:
    """[B, S, N, 7]: each patch's place in the first frame, certainty, own place, difference."""
    there = (matches.target == 0)[..., None]  # [B, S, K, 1]
    place = (matches.place * there[..., None]).sum(2)
    certainty = (matches.certainty * there).sum(2)
    place = torch.cat([matches.own[:, :1], place[:, 1:]], 1)
    certainty = torch.cat([torch.ones_like(certainty[:, :1]), certainty[:, 1:]], 1)
    return torch.cat([place, certainty[..., None], matches.own, place - matches.own], -1)


def _facts(
    matches: Matches, guess: Tensor, solution: Solution, size: Size
) -> tuple[Tensor, Tensor, Tensor]:
    """What the solver found: pose encodings [B, S, 9], and facts of cameras and of patches.

    The facts are [B, S, 12] (encoding, two of agreement, focal length) and [B, S, N, 8] (log
    depth, how far it is from the guess, place in the world, two of agreement, certainty).
    """
    B, S = guess.shape[:2]
    lens = torch.zeros(B, S, 3, 3).to(guess)
    lens[..., 0, 0] = lens[..., 1, 1] = (solution.focal * (max(size) // 16 * 8))[:, None]
    extrinsics = torch.cat([solution.rotation, solution.translation[..., None]], -1)
    encoding = encode_pose(extrinsics, lens, size)
    rays = solver.rays(matches.own, solution.focal) * solution.depth[..., None]
    world = (rays - solution.translation[:, :, None]) @ solution.rotation
    depth = solution.depth.log()[..., None]
    fit, best = solution.agreement.mean(2)[..., None], solution.agreement.amax(2)[..., None]
    sure = matches.certainty.mean(2)[..., None]
    place = torch.cat([depth, depth - guess[..., None], world, fit, best, sure], -1)
    focal = solution.focal[:, None, None].expand(B, S, 1)
    pose = torch.cat([encoding, fit.mean(2), best.mean(2), focal], -1)
    return encoding, pose.clamp(-5, 5), place.clamp(-5, 5)


class Corrections(CameraHead):
    """The camera head of corrections to the solver's poses."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config)
        self.camera_branch[2] = nn.Linear(config.embed_dim, 11)

    def correct(self, tokens: Tensor, solved: Tensor) -> Tensor:
        """[B, S, 9] pose encodings of tokens [B, S, 1+R, 2D] and the solver's [B, S, 9].

        Translation and rotation of the solver count as much as the head trusts them.
        """
        S = tokens.shape[1]
        x = self.token_norm(tokens).flatten(1, 2)
        for trunk_block in self.trunk:
            x = trunk_block(x)
        x = self.camera_branch(self.trunk_norm(x.unflatten(1, (S, -1))[:, :, 0]))
        trust = torch.sigmoid(x[..., 9:] + 2)
        t, q, lens = solved.split_with_sizes([3, 4, 2], -1)
        out = torch.cat([t * trust[..., :1], q * trust[..., 1:], lens], -1) + x[..., :9]
        return torch.cat([out[..., :7], F.relu(out[..., 7:] - 0.01) + 0.01], -1)


class Mini(Trunk):
    """Our small network."""

    camera_head: Corrections

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config, MiniAggregator(config))
        self.config = config
        self.camera_head = Corrections(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        # Nothing to correct, and depth of one, at first.
        for last in (self.camera_head.camera_branch[2], self.aggregator.guess):
            assert isinstance(last, nn.Linear)
            nn.init.normal_(last.weight, std=0.002)
            nn.init.zeros_(last.bias)

    def read(self, cached: dict[int, Tensor], size: Size, frames_per_chunk: int = 8) -> Outputs:
        """What the heads make of the cached layers of images of that size."""
        special = 1 + self.config.registers
        layers = [cached[i][:, :, special:] for i in self.config.cached_layers]
        tokens = cached[self.config.cached_layers[-1]][:, :, :special]
        dense = partial(self.dense_head, size=size)
        with full_precision(tokens):
            pose = self.camera_head.correct(tokens.float(), cached[SOLVED])
            depth, confidence = by_frames(dense, layers, frames_per_chunk)
        return Outputs(pose[None], depth, confidence, tokens=tokens)
