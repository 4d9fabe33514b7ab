"""The network in the box: VGGT-Omega's build around matches and a solver.

What a large network finds by attention is given to this small one. Its patch encoder is a small
convolutional one, trained so that its features match from photo to photo; it has the shape of
XFeat's backbone (Potje et al., CVPR 2024, Apache-2.0) and started from its weights, with colours
added; the licence of the weights file says so. Matches with the first frame go into the tokens.
From what the tokens say of depth and poses `solver` finds the cameras that explain all matches;
what it found goes into the tokens, and from these the dense head reads depth. A plane sweep about
that depth says where the other frames look alike, and a few convolutions make the depth heed it.
Why, and what each part is worth, is measured in docs/training.md.

B batch, S frames, H x W pixels, N patches of a frame, T = 1 + R + N tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vggt_cli.geometry import compose, decode_pose, encode_pose, invert
from vggt_cli.models import matching, solver, sweep
from vggt_cli.models.layers import (
    Outputs,
    Rotation,
    Size,
    add_positions,
    by_frames,
    compute,
    full_precision,
    initialize,
    normalized,
)
from vggt_cli.models.matching import Matches, MatchHead
from vggt_cli.models.omega import Aggregator, CameraHead, DenseHead, TrunkConfig, block
from vggt_cli.models.solver import Solution

SHARPNESS = 20.0  # of the likeness of features that match: they are trained with it
ENOUGH = 4000  # matched cells of a sequence: more cost the solver's time
SPREAD = 2  # cells that a matched cell's depth reaches, one deviation
TARGETS = 4  # frames that a plane sweep looks into
FACTS = 25  # numbers of what the solver found at a patch
SWEPT = 5  # numbers of a cell beside the evidence of the plane sweep


@dataclass(frozen=True)
class MiniConfig(TrunkConfig):
    """Every number that a checkpoint of mini fixes."""

    patch_size: int = 32  # 16 in the tokens' image
    fine: int = 2  # how much finer than the tokens' image the one is that is matched
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
    late_depth: int = 2  # blocks that read what the solver found
    sweep_width: int = 64  # channels of the convolutions that read the plane sweep


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
    """What the heads read. The tokens' image is that of the input, made smaller."""

    layers: list[Tensor]  # four times [B, S, T, 2D]
    local: Tensor  # [B, S, 64, 2 h, 2 w] features of the encoder
    pixels: Tensor  # [B, S, 3, H, W] normalised
    grid: Size  # (h, w) of patches


class Guess(NamedTuple):
    """What the tokens say before the solver has spoken."""

    depth: Tensor  # [B, S, 2 h, 2 w] of the cells
    pose: Tensor  # [B, S, 9] pose encodings
    context: Tensor  # [B, S, 128, 2 h, 2 w] features to match, in the light of all frames


class Settled(NamedTuple):
    """What the solver found, in the scale of the guess; without gradient."""

    pose: Tensor  # [B, S, 9] pose encodings
    matches: Matches
    depth: Tensor  # [B, S, N] of the matched cells
    weight: Tensor  # [B, S, N] how well their matches agree, in [0, 1]
    facts: Tensor  # [B, S, h w, FACTS] for the tokens


class Refiner(nn.Module):
    """What a plane sweep says, read by a few convolutions among the cells."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        width = config.sweep_width
        self.mix = nn.Conv2d(sweep.PLANES + SWEPT, width, 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=far, dilation=far) for far in (1, 2, 4, 1)
        )
        self.last = nn.Conv2d(width, 3 * 16, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.get_parameter("bias"))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What to add to the logarithms of depth and of doubt [b, 4 h, 4 w], of maps of cells.

        inputs: of each plane how likely it is [b, P, h, w], and [b, SWEPT, h, w] of which the first
        is the change of log depth that this asks for. Features are none of them: with these 160
        scenes were learnt by heart.
        """
        x = self.mix(torch.cat([*inputs], 1))
        for convolution in self.convolutions:
            x = x + convolution(F.relu(x))
        change, trust, doubt = self.last(F.relu(x)).chunk(3, 1)
        change = change + trust * inputs[1][:, :1]
        return F.pixel_shuffle(change, 4)[:, 0], F.pixel_shuffle(doubt, 4)[:, 0]


class DepthHead(nn.Module):
    """Omega's dense head, after blocks in which a frame's patches hear what the solver found."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.special = 1 + config.registers
        self.found = nn.Linear(FACTS, config.embed_dim)
        self.blocks = nn.ModuleList(block(config, qk_norm=True) for _ in range(config.late_depth))
        self.dense_head = DenseHead(replace(config, patch_size=16))  # of the tokens' image
        self.refiner = Refiner(config)

    def forward(
        self, rotate: Rotation, size: Size, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Depth and confidence [b, H, W] of four layers [b, T, 2D] and facts [b, N, FACTS]."""
        *layers, last, facts = inputs
        frame, tokens = last.chunk(2, -1)
        tokens = tokens + F.pad(self.found(facts), (0, 0, self.special, 0))
        for late_block in self.blocks:
            tokens = late_block(tokens, rotate)
        with full_precision(tokens):
            layers.append(torch.cat([frame, tokens], -1))
            depth, confidence = self.dense_head([x[:, self.special :] for x in layers], size)
        return depth, confidence


class Mini(nn.Module):
    """Our small network."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        assert config.patch_size == 16 * config.fine, config
        self.config = config
        D = config.embed_dim
        self.aggregator = Aggregator(config, ConvEncoder())
        self.look = nn.Linear(4 * 64 + 3, D)
        self.look_norm = nn.LayerNorm(D)
        self.match = nn.Linear(7, D)
        self.context = nn.Linear(2 * D, 4 * 64)
        self.cell_depth = nn.Linear(2 * D, 4)
        self.match_head = MatchHead(128)
        self.camera_head = CameraHead(config)
        self.depth_head = DepthHead(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                initialize(module)
                nn.init.xavier_uniform_(module.weight)
        pose = self.camera_head.camera_branch[2]
        assert isinstance(pose, nn.Linear)
        with torch.no_grad():
            self.cell_depth.weight.mul_(0.1)
            self.depth_head.found.weight.zero_()
            pose.weight.mul_(0.1)
            # Near the identity and 60 degrees from the first step on.
            pose.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1.0]))

    def forward(self, images: Tensor, frames_per_chunk: int = 8) -> Outputs:
        """Cameras and depth of images [B, S, 3, H, W] in [0, 1]."""
        return self.read(self.aggregate(images), frames_per_chunk)

    def aggregate(self, images: Tensor) -> Seen:
        """The matches and the tokens of images [B, S, 3, H, W] in [0, 1]."""
        images = images.to(self.aggregator.camera_token.device)
        B, S, _, H, W = images.shape
        h, w = grid = (H // self.config.patch_size, W // self.config.patch_size)
        pixels = normalized(images)[..., : h * self.config.patch_size, : w * self.config.patch_size]
        with compute(self._matrix):
            small = F.avg_pool2d(pixels.flatten(0, 1), self.config.fine)
            local = self.aggregator.patch_embed(small)
            with full_precision(images), torch.no_grad():
                first = torch.zeros(B, S, 1, dtype=torch.int64, device=images.device)
                matches = matching.find(local.unflatten(0, (B, S)), first, SHARPNESS, 2)
            look = torch.cat([F.pixel_unshuffle(local, 2), F.avg_pool2d(small, 16)], 1)
            tokens = self.look_norm(self.look(look.flatten(2).mT))  # [B S, N, D]
            placed = add_positions(torch.zeros_like(tokens).mT.unflatten(-1, grid), w / h)
            tokens = tokens + placed.flatten(2).mT * 10  # at full strength
            place, certainty = matches.place[:, :, 0], matches.certainty[:, :, 0, :, None]
            facts = torch.cat([place, certainty, matches.own, place - matches.own], -1)
            tokens = tokens.unflatten(0, (B, S)) + self.match(facts)
            cached = self.aggregator.attend(tokens, grid)
        layers = [cached[i] for i in self.config.cached_layers]
        layers[-1] = layers[-1].to(images.device)
        return Seen(layers, local.unflatten(0, (B, S)), pixels, grid)

    @property
    def _matrix(self) -> Tensor:
        """One of the matrices whose products are computed in short numbers."""
        return self.aggregator.get_parameter("frame_blocks.0.attn.proj.bias")

    def read(self, seen: Seen, frames_per_chunk: int = 8) -> Outputs:
        """What the heads and the solver make of it; two passes of poses, before and after."""
        guess = self.guess(seen)
        matches, features = self.find(seen, guess)
        settled = self.settle(seen, guess, self.refined(matches, features))
        depth, confidence, scale = self.dense(seen, settled, features, frames_per_chunk)
        pose = torch.cat([settled.pose[..., :3] * scale, settled.pose[..., 3:]], -1)
        tokens = seen.layers[-1][:, :, : 1 + self.config.registers]
        return Outputs(torch.stack([guess.pose, pose]), depth, confidence, tokens=tokens)

    def guess(self, seen: Seen) -> Guess:
        """What the tokens say."""
        special = 1 + self.config.registers
        last = seen.layers[-1]
        with full_precision(last):
            pose = self.camera_head(last[:, :, :special].float())
            patches = last[:, :, special:].float()
            depth, context = (
                F.pixel_shuffle(layer(patches).mT.unflatten(-1, seen.grid), 2)
                for layer in (self.cell_depth, self.context)
            )
        return Guess(depth[:, :, 0].exp(), pose, _both(seen.local, context))

    def find(
        self, seen: Seen, guess: Guess, per_patch: int | None = None
    ) -> tuple[Matches, Tensor]:
        """Matches between frames by features of fine cells, so many of each patch; the features.

        per_patch: None: four, where they are few.
        """
        h, w = seen.grid
        B, S = seen.local.shape[:2]
        if per_patch is None:
            per_patch = max(1, min(4, ENOUGH // (S * h * w)))
        some = seen.pixels.flatten(0, 1).split(matching.CHUNK)  # at a time, for memory
        with compute(self._matrix), torch.no_grad():
            fine = torch.cat([self.aggregator.patch_embed(pixels) for pixels in some])
        with full_precision(fine), torch.no_grad():
            context = _enlarged(guess.context[:, :, 64:], self.config.fine)
            features = _both(fine.unflatten(0, (B, S)), context)
            side = 2 * self.config.fine
            target = matching.others(features, side)
            return matching.find(features, target, 2 * SHARPNESS, side, per_patch), features

    def refined(self, matches: Matches, features: Tensor) -> Matches:
        """Matches as the head of matches sees them."""
        with full_precision(features), torch.no_grad():
            return matching.refine(matches, features, self.match_head)

    def settle(self, seen: Seen, guess: Guess, matches: Matches) -> Settled:
        """What the solver finds from a guess and refined matches."""
        H, W = seen.pixels.shape[-2:]
        with full_precision(guess.depth), torch.no_grad():
            depth = _enlarged(guess.depth[:, :, None], self.config.fine)[:, :, 0]
            extrinsics, lenses = decode_pose(guess.pose, (H, W))
            focal = lenses[..., 0, 0].mean(1) / (max(H, W) / 2)
            # In the world of the first camera, which the head only nearly is.
            extrinsics = compose(extrinsics, invert(extrinsics[:, :1]).expand_as(extrinsics))
            start = extrinsics[..., :3], extrinsics[..., 3]
            found = solver.cameras(matches, depth, start, focal)
            weight, guessed = found.agreement.amax(2), solver.at_cells(depth, matches)
            scale = _factor(found.depth, guessed, weight)[:, None, None]
            found = found._replace(translation=found.translation * scale, depth=found.depth * scale)
            facts = _facts(matches, found, guessed, (depth.shape[-1], 2 * self.config.fine))
            facts = facts[:, :, : seen.grid[0] * seen.grid[1]]  # those of the surest come first
            return Settled(_encoded(found, (H, W)), matches, found.depth, weight, facts)

    def dense(
        self, seen: Seen, settled: Settled, features: Tensor, frames_per_chunk: int = 8
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Depth and its confidence [B, S, H, W], and the scale [B, 1, 1] of the poses to it.

        features: [B, S, 128, h, w] of the cells, by which the matches were found.
        """
        fine = self.config.fine
        small = tuple(n // fine for n in seen.pixels.shape[-2:])
        rotate = self.aggregator.rope_embed(seen.grid, 1 + self.config.registers)
        read = partial(self.depth_head, rotate, small)
        with compute(self._matrix):
            depth, confidence = by_frames(read, [*seen.layers, settled.facts], frames_per_chunk)
        with full_precision(depth):
            depth, confidence = (
                _enlarged(x[:, :, None], fine)[:, :, 0] for x in (depth, confidence)
            )
            depth, scale = _followed(depth, settled)
            maps = depth, confidence
            depth, confidence = self.reread(maps, settled, features, scale, frames_per_chunk)
        return depth, confidence, scale

    def reread(
        self,
        maps: tuple[Tensor, Tensor],
        settled: Settled,
        features: Tensor,
        scale: Tensor,
        frames_per_chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """Maps of depth and confidence [B, S, H, W], after a plane sweep about the depth."""
        depth, confidence = maps
        with torch.no_grad():
            inputs = _swept(depth, settled, features, scale)
        said = by_frames(self.depth_head.refiner, inputs, frames_per_chunk)
        deeper, doubt = (_enlarged(x[:, :, None], 2)[:, :, 0].exp() for x in said)
        return depth * deeper, 1 + (confidence - 1) / doubt


def _both(local: Tensor, context: Tensor) -> Tensor:
    """Features of the encoder and of the last layer; each half counts as much as the other."""
    return torch.cat([F.normalize(x.float(), dim=2) for x in (local, context)], 2)


def _enlarged(maps: Tensor, scale: int) -> Tensor:
    """Maps [B, S, C, h, w] so many times finer."""
    if scale == 1:
        return maps
    larger = F.interpolate(maps.flatten(0, 1), scale_factor=scale, mode="bilinear")
    return torch.unflatten(larger, 0, maps.shape[:2])


def _followed(depth: Tensor, settled: Settled) -> tuple[Tensor, Tensor]:
    """Maps [B, S, H, W] that go through the solver's depths, and the scale [B, 1, 1] of its poses.

    The way from a map to the matched cells, as far as their matches agree, spreads over those
    around (by a Gaussian) and is taken by every pixel.
    """
    cells = F.avg_pool2d(depth, 8)
    there = solver.at_cells(cells, settled.matches)
    scale = _factor(settled.depth, there, settled.weight)[:, None, None]
    steps = torch.arange(-3 * SPREAD, 3 * SPREAD + 1).to(depth)
    bell = torch.exp(-(steps**2) / (2 * SPREAD**2))
    kernel = (bell[:, None] * bell)[None, None]
    total, count = (
        F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=3 * SPREAD)[:, 0].view_as(x)
        for x in _ways(cells, settled, scale)
    )
    change = F.interpolate(total / (count + 0.2), depth.shape[-2:], mode="bilinear")
    return depth * change.exp(), scale


def _ways(cells: Tensor, settled: Settled, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted way in log depth from cells [B, S, h, w] to the solver's; its weight, or 0."""
    change = settled.depth * scale / solver.at_cells(cells, settled.matches)
    change = change.log().clamp(-1, 1)
    flat = torch.zeros_like(cells).flatten(2)
    way, weight = (
        flat.scatter(2, settled.matches.cell, x).view_as(cells)
        for x in (change * settled.weight, settled.weight)
    )
    return way, weight


def _swept(depth: Tensor, settled: Settled, features: Tensor, scale: Tensor) -> list[Tensor]:
    """What the refiner reads [B, S, ..., h, w]: belief in the planes, the rest, and features.

    depth: [B, S, H, W] in the scale that the poses are brought to.
    """
    extrinsics, lenses = decode_pose(settled.pose, (depth.shape[-2], depth.shape[-1]))
    focal = lenses[:, 0, 0, 0] / (max(depth.shape[-2:]) / 2)
    cameras = sweep.Cameras(extrinsics[..., :3], extrinsics[..., 3] * scale, focal)
    certainty = settled.matches.certainty.sum(3)
    surest = certainty.topk(min(TARGETS, certainty.shape[2]), 2).indices
    target = settled.matches.target.gather(2, surest)
    cells = F.avg_pool2d(depth, 8)
    evidence = sweep.evidence(features, target, cameras, cells, 2 * SHARPNESS)
    belief = sweep.believed(evidence)
    relief = cells.log() - cells.log().mean((-1, -2), keepdim=True)
    way, weight = _ways(cells, settled, scale)
    rest = [belief.change * 2, belief.doubt * 2, weight, way * 2, relief]
    return [belief.chance, torch.stack(rest, 2)]


def _factor(depth: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """[B]: what brings depth [B, S, N] to that wanted in the weighted mean of logarithms."""
    apart = ((wanted / depth).log() * weight).sum((1, 2))
    return (apart / weight.sum((1, 2)).clamp(min=1e-6)).exp()


def _facts(matches: Matches, found: Solution, guessed: Tensor, cells: tuple[int, int]) -> Tensor:
    """[B, S, N, FACTS]: depth, trust, place in the patch, ray, world, camera.

    cells: how many a row of an image and of a patch has.
    """
    R, t = found.rotation, found.translation
    rays = solver.rays(matches.own, found.focal)
    world = (rays * found.depth[..., None] - t[:, :, None]) @ R
    deeper = (found.depth / guessed).log().clamp(-3, 3)
    agreement = torch.stack([found.agreement.amax(2), found.agreement.mean(2)], -1)
    row, column = matches.cell // cells[0], matches.cell % cells[0]
    corner = (torch.stack([row, column], -1) % cells[1] + 0.5).to(rays) / cells[1] - 0.5
    center = -(R.mT @ t[..., None])[..., 0].clamp(-10, 10)
    focal = found.focal.log()[:, None, None].expand(*R.shape[:2], 1)
    camera = torch.cat([R.flatten(2), center, focal], -1)[:, :, None]
    camera = camera.expand(-1, -1, row.shape[-1], -1)
    depth = torch.stack([found.depth.log().clamp(-3, 3), deeper, deeper * agreement[..., 0]], -1)
    return torch.cat([depth, agreement, corner, rays[..., :2], world.clamp(-10, 10), camera], -1)


def _encoded(solution: Solution, size: Size) -> Tensor:
    """[B, S, 9] pose encodings of a solution, for images of that size."""
    S = solution.depth.shape[1]
    focal = solution.focal * (max(size) / 2)
    lens = torch.diag_embed(torch.stack([focal, focal, torch.ones_like(focal)], -1))
    extrinsics = torch.cat([solution.rotation, solution.translation[..., None]], -1)
    return encode_pose(extrinsics, lens[:, None].expand(-1, S, -1, -1), size)
