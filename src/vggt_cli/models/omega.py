"""VGGT-Omega from top to bottom. Source: spec vggt_omega; Wang et al., arXiv 2605.15195.

B batch, S frames, H x W pixels, h x w patches, N = h w, D width of tokens, R registers,
T = 1 + R + N tokens per frame: camera, registers, patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_cli.models.layers import (
    Attention,
    Block,
    Outputs,
    PatchEmbed,
    Pyramid,
    ResidualConv,
    Rotation,
    Size,
    Thinned,
    add_positions,
    by_frames,
    compute,
    full_precision,
    in_chunks,
    initialize,
    kept,
    normalized,
    with_special_tokens,
)


@dataclass(frozen=True)
class TrunkConfig:
    """Every number of the aggregator and the heads that a checkpoint fixes."""

    patch_size: int = 16  # pixels
    embed_dim: int = 1024  # D; the heads are 2D wide
    heads: int = 16
    depth: int = 24  # pairs of frame and inter-frame blocks
    registers: int = 16  # R
    register_blocks: tuple[int, ...] = (2, 6, 9, 14, 20)
    cached_layers: tuple[int, ...] = (4, 11, 17, 23)  # read by the dense head; the last by all
    layer_scale: float = 1e-5  # before training
    head_heads: int = 16
    head_depth: int = 4
    features: int = 256  # of the dense head
    level_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    text_head: bool = False


@dataclass(frozen=True)
class OmegaConfig(TrunkConfig):
    """Every number that a checkpoint of VGGT-Omega fixes."""

    encoder_depth: int = 24
    storage_tokens: int = 4


class MaskedLinear(nn.Linear):
    """The q, k, v layer: the keys' part of its bias is masked by a buffer of the checkpoint."""

    bias_mask: Tensor

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs)
        third = torch.ones(outputs // 3)
        self.register_buffer("bias_mask", torch.cat([third, torch.zeros_like(third), third]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class AxialRope(nn.Module):
    """Rotary embedding of the patches' centres, both axes over the longer side: spec section 4."""

    periods: Tensor

    def __init__(self, head_size: int) -> None:
        super().__init__()
        exponents = torch.arange(head_size // 4, dtype=torch.float64) / (head_size // 4)
        self.register_buffer("periods", (100**exponents).float())

    def forward(self, grid: Size, leading: int) -> Rotation:
        h, w = (torch.arange(n, dtype=torch.float64) + 0.5 for n in grid)
        rows, columns = torch.meshgrid(h, w, indexing="ij")
        places = 2 * torch.stack([rows, columns], -1).flatten(0, 1) / max(grid) - 1  # [N, 2]
        angles = 2 * math.pi * places[..., None] / self.periods.cpu().double()
        # A channel of the first half of a head pairs with its place in the second half.
        return Rotation.by(angles.flatten(1)[:, None], leading, self.periods)


def block(config: TrunkConfig, *, qk_norm: bool = False) -> Block:
    """A block of the patch encoder (without norms of q and k) or of the aggregator."""
    D = config.embed_dim
    attention = Attention(D, config.heads, qk_norm=qk_norm, qkv=MaskedLinear)
    return Block(D, attention, layer_scale=config.layer_scale)


def head_block(config: TrunkConfig) -> Block:
    """A block of the camera and text heads: twice as wide, no position, no norms of q and k."""
    width = 2 * config.embed_dim
    attention = Attention(width, config.head_heads, qk_norm=False, qkv=MaskedLinear)
    return Block(width, attention, layer_scale=config.layer_scale)


class PatchEncoder(nn.Module):
    """DINOv3's vision transformer: spec section 5."""

    def __init__(self, config: OmegaConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.cls_token = nn.Parameter(torch.randn(1, 1, D) * 0.02)
        self.storage_tokens = nn.Parameter(torch.randn(1, config.storage_tokens, D) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, D))  # only in checkpoints
        self.patch_embed = PatchEmbed(config.patch_size, D)
        self.rope_embed = AxialRope(D // config.heads)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.encoder_depth))
        self.norm = nn.LayerNorm(D)

    def forward(self, images: Tensor, grid: Size) -> Tensor:  # [b, 3, H, W] -> [b, N, D]
        patches = self.patch_embed(images)
        special = torch.cat([self.cls_token, self.storage_tokens], 1).expand(len(images), -1, -1)
        tokens, leading = torch.cat([special, patches], 1), special.shape[1]
        rotate = self.rope_embed(grid, leading)
        for encoder_block in self.blocks:
            tokens = encoder_block(tokens, rotate)
        out: Tensor = self.norm(tokens)[:, leading:]
        return out


class Aggregator(nn.Module):
    """Attention within frames and between frames in turn: spec section 6.

    patch_embed: maps normalised images [B S, 3, H, W] and the grid (h, w) to [B S, N, D].
    """

    thinned: Thinned | None = None  # an option for many frames

    def __init__(self, config: TrunkConfig, patch_embed: nn.Module) -> None:
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, D) * 1e-3)
        self.register_token = nn.Parameter(torch.randn(1, 2, config.registers, D) * 1e-3)
        self.patch_embed = patch_embed
        self.rope_embed = AxialRope(D // config.heads)
        blocks = [[block(config, qk_norm=True) for _ in range(config.depth)] for _ in range(2)]
        self.frame_blocks, self.inter_frame_blocks = map(nn.ModuleList, blocks)

    def forward(self, images: Tensor) -> dict[int, Tensor]:  # [B, S, 3, H, W] -> [B, S, T, 2D]
        B, S, _, H, W = images.shape
        grid = (H // self.config.patch_size, W // self.config.patch_size)

        def embed(some: Tensor) -> Tensor:
            patches: Tensor = self.patch_embed(normalized(some.to(self.camera_token.device)), grid)
            return patches

        return self.attend(in_chunks(embed, images.flatten(0, 1)).unflatten(0, (B, S)), grid)

    def attend(self, patches: Tensor, grid: Size) -> dict[int, Tensor]:
        """The cached layers [B, S, T, 2D] by their number, of patch tokens [B, S, N, D]."""
        B, S = patches.shape[:2]
        tokens = with_special_tokens([self.camera_token, self.register_token], patches)
        special = 1 + self.config.registers
        rotate = self.rope_embed(grid, special)
        keys = self.thinned and self.thinned.keys(S, grid, special).to(tokens.device)
        cached: dict[int, Tensor] = {}
        for i in range(self.config.depth):
            frame = in_chunks(partial(self.frame_blocks[i], rotate=rotate), tokens.flatten(0, 1))
            frame = frame.unflatten(0, (B, S))
            # Register attention leaves the patches out of the whole block.
            meeting = special if i in self.config.register_blocks else frame.shape[2]
            thin = self.thinned and i in self.thinned.layers and meeting > special
            met = self.inter_frame_blocks[i](
                frame[:, :, :meeting].flatten(1, 2), keys=keys if thin else None
            )
            tokens = met.unflatten(1, (S, -1))
            if meeting < frame.shape[2]:
                tokens = torch.cat([tokens, frame[:, :, meeting:]], 2)
            if i in self.config.cached_layers:
                # The camera head reads the last layer, to the last bit.
                cached[i] = kept(frame, tokens, exact=i == self.config.cached_layers[-1])
        return cached


class CameraHead(nn.Module):
    """Poses from camera and register tokens in one pass: spec section 7."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        width = 2 * config.embed_dim
        self.token_norm = nn.LayerNorm(width)
        self.trunk = nn.ModuleList(head_block(config) for _ in range(config.head_depth))
        self.trunk_norm = nn.LayerNorm(width)
        hidden = config.embed_dim
        self.camera_branch = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 9)
        )

    def forward(self, tokens: Tensor) -> Tensor:  # [B, S, 1+R, 2D] -> [B, S, 9]
        S = tokens.shape[1]
        x = self.token_norm(tokens).flatten(1, 2)
        for trunk_block in self.trunk:
            x = trunk_block(x)
        x = self.camera_branch(self.trunk_norm(x.unflatten(1, (S, -1))[:, :, 0]))
        return torch.cat([x[..., :7], F.relu(x[..., 7:]) + 0.01], -1)


class DenseHead(Pyramid):
    """Depth and its confidence from a quarter of the resolution: spec section 9."""

    def __init__(self, config: TrunkConfig) -> None:
        width = 2 * config.embed_dim
        super().__init__(width, config.features, config.level_channels, ResidualConv)
        self.patch_size = config.patch_size
        subpixels = (config.patch_size // 4) ** 2
        self.proj = nn.Conv2d(config.features, subpixels, 1)
        self.proj_conf = nn.Conv2d(config.features, subpixels, 1)
        nn.init.zeros_(self.proj_conf.weight)
        nn.init.constant_(self.proj_conf.get_parameter("bias"), math.log(0.05))

    def forward(self, layers: Sequence[Tensor], size: Size) -> tuple[Tensor, Tensor]:
        """Depth and confidence [b, H, W] of patch tokens, four times [b, N, 2D].

        size: of the images; the maps leave out what the patches did.
        """
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        embed = partial(add_positions, aspect=size[1] / size[0])
        x = embed(self.fuse(layers, grid, embed))  # [b, F, 4 h, 4 w]
        logits = (F.pixel_shuffle(p(x), self.patch_size // 4) for p in (self.proj, self.proj_conf))
        depth, confidence = (logit[:, 0].exp() for logit in logits)
        return depth, 1 + confidence


class TextHead(nn.Module):
    """A unit embedding of the whole set that a language model understands: spec section 10."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        width, hidden = 2 * config.embed_dim, config.embed_dim
        self.language_token = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02)
        )
        self.token_norm = nn.LayerNorm(width)
        self.readout_blocks = nn.ModuleList(head_block(config) for _ in range(config.head_depth))
        self.language_token_norm = nn.LayerNorm(width)
        self.embedding_projector = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:  # [B, S, 1+R, 2D] -> [B, 2D]
        language = self.language_token.expand(len(tokens), -1, -1)
        x = torch.cat([language, self.token_norm(tokens).flatten(1, 2)], 1)
        for readout_block in self.readout_blocks:
            x = readout_block(x)
        x = self.embedding_projector(self.language_token_norm(x[:, 0]))
        return F.normalize(x, dim=-1)


class Trunk(nn.Module):
    """A network from a patch encoder on: the aggregator and its heads."""

    def __init__(self, config: TrunkConfig, aggregator: Aggregator) -> None:
        super().__init__()
        self.aggregator = aggregator
        self.camera_head = CameraHead(config)
        self.dense_head = DenseHead(config)
        self.text_alignment_head = TextHead(config) if config.text_head else None
        for part in (self.aggregator, self.camera_head, self.text_alignment_head):
            if part is not None:
                part.apply(initialize)

    def forward(self, images: Tensor, frames_per_chunk: int = 8) -> Outputs:
        """Cameras, depth and more of images [B, S, 3, H, W] in [0, 1]."""
        size = (images.shape[-2], images.shape[-1])
        return self.read(self.aggregate(images), size, frames_per_chunk)

    def aggregate(self, images: Tensor) -> dict[int, Tensor]:
        """The cached layers [B, S, T, 2D] by their number, of images [B, S, 3, H, W] in [0, 1]."""
        with compute(self.aggregator.get_parameter("frame_blocks.0.attn.proj.bias")):
            cached: dict[int, Tensor] = self.aggregator(images)
        return cached

    def read(self, cached: dict[int, Tensor], size: Size, frames_per_chunk: int = 8) -> Outputs:
        """What the heads make of the cached layers of images of that size."""
        config = self.aggregator.config
        special = 1 + config.registers
        layers = [cached[i][:, :, special:] for i in config.cached_layers]
        tokens = cached[config.cached_layers[-1]][:, :, :special]
        tokens = tokens.to(self.aggregator.camera_token.device)
        dense = partial(self.dense_head, size=size)
        with full_precision(tokens):
            pose = self.camera_head(tokens)
            depth, confidence = by_frames(dense, layers, frames_per_chunk)
            text = None if self.text_alignment_head is None else self.text_alignment_head(tokens)
        return Outputs(pose[None], depth, confidence, tokens=tokens, text=text)


class VGGTOmega(Trunk):
    """VGGT-Omega. Source: spec vggt_omega, and its golden numbers."""

    def __init__(self, config: OmegaConfig) -> None:
        super().__init__(config, Aggregator(config, PatchEncoder(config)))
        self.config = config
