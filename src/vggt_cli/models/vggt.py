"""VGGT from top to bottom, but for its track head. Source: spec vggt; Wang et al., CVPR 2025.

B batch, S frames, H x W pixels, h x w patches, N = h w, D width of tokens, R registers,
T = 1 + R + N tokens per frame: camera, registers, patches; K refinement passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_cli.models.layers import (
    Attention,
    Block,
    Mlp,
    Outputs,
    PatchEmbed,
    Pyramid,
    RectifiedConv,
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
    resize,
    with_special_tokens,
)
from vggt_cli.models.tracker import Followed, TrackConfig, TrackHead


@dataclass(frozen=True)
class VGGTConfig:
    """Every number that a checkpoint fixes; a head that is off has no keys and is not run."""

    patch_size: int = 14  # pixels
    trained_grid: int = 37  # patches along each side of the stored position embedding
    embed_dim: int = 1024  # D; the heads are 2D wide
    heads: int = 16
    encoder_depth: int = 24
    encoder_registers: int = 4
    depth: int = 24  # pairs of frame and global blocks
    registers: int = 4  # R
    cached_layers: tuple[int, ...] = (4, 11, 17, 23)  # read by the dense heads; the last by all
    layer_scale: float = 0.01  # before training
    camera_heads: int = 16
    camera_depth: int = 4
    camera_passes: int = 4  # K
    features: int = 256  # of the dense heads
    level_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    point_head: bool = True
    track_head: bool = True
    tracker: TrackConfig = field(default_factory=TrackConfig)
    # Keys do not tell: VGGT_tracker_fixed was trained with it, the other checkpoints without.
    track_position_embedding: bool = False


class PatchEncoder(nn.Module):
    """DINOv2's vision transformer with registers: spec section 4."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        D, self.trained_grid = config.embed_dim, config.trained_grid
        self.cls_token = nn.Parameter(torch.randn(1, 1, D) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.trained_grid**2, D) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(1, config.encoder_registers, D) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, D))  # only in checkpoints
        self.patch_embed = PatchEmbed(config.patch_size, D)
        self.blocks = nn.ModuleList(
            Block(D, Attention(D, config.heads, qk_norm=False), layer_scale=1.0, eps=1e-6)
            for _ in range(config.encoder_depth)
        )
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, images: Tensor, grid: Size) -> Tensor:  # [b, 3, H, W] -> [b, N, D]
        place_of_cls, places = self.positions(grid).split_with_sizes([1, grid[0] * grid[1]], 1)
        special = torch.cat([self.cls_token + place_of_cls, self.register_tokens], 1)
        patches = self.patch_embed(images) + places
        tokens = torch.cat([special.expand(len(images), -1, -1), patches], 1)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens)[:, special.shape[1] :]
        return out

    def positions(self, grid: Size) -> Tensor:
        """The position embedding [1, 1+N, D] of the cls token and a grid of patches."""
        if grid == (self.trained_grid, self.trained_grid):
            return self.pos_embed
        stored = self.pos_embed[0, 1:].mT.reshape(1, -1, self.trained_grid, self.trained_grid)
        # On the CPU, because not every device has this kernel, whose antialiasing matters.
        resized = F.interpolate(stored.cpu(), grid, mode="bicubic", antialias=True).to(stored)
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).mT], 1)


class Aggregator(nn.Module):
    """Attention within frames and between all frames in turn: spec section 5."""

    thinned: Thinned | None = None  # an option for many frames

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        D, heads = config.embed_dim, config.heads
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, D) * 1e-3)
        self.register_token = nn.Parameter(torch.randn(1, 2, config.registers, D) * 1e-3)
        self.patch_embed = PatchEncoder(config)
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(
                Block(D, Attention(D, heads, qk_norm=True), layer_scale=config.layer_scale)
                for _ in range(config.depth)
            )
            for _ in range(2)
        )

    def forward(self, images: Tensor) -> dict[int, Tensor]:  # [B, S, 3, H, W] -> [B, S, T, 2D]
        B, S, _, H, W = images.shape
        p = self.config.patch_size
        assert (H % p, W % p) == (0, 0), f"{H} x {W} is not made of patches of {p}"
        grid = (H // p, W // p)

        def embed(some: Tensor) -> Tensor:
            patches: Tensor = self.patch_embed(normalized(some.to(self.camera_token.device)), grid)
            return patches

        patches = in_chunks(embed, images.flatten(0, 1)).unflatten(0, (B, S))
        tokens = with_special_tokens([self.camera_token, self.register_token], patches)
        rotate = self.rotation(grid)
        special = 1 + self.config.registers
        keys = self.thinned and self.thinned.keys(S, grid, special).to(tokens.device)
        cached: dict[int, Tensor] = {}
        for i in range(self.config.depth):
            frame = in_chunks(partial(self.frame_blocks[i], rotate=rotate), tokens.flatten(0, 1))
            frame = frame.unflatten(0, (B, S))
            few = keys if self.thinned and i in self.thinned.layers else None
            tokens = self.global_blocks[i](frame.flatten(1, 2), rotate, few).unflatten(1, (S, -1))
            if i in self.config.cached_layers:
                # The camera head reads the last layer, to the last bit.
                cached[i] = kept(frame, tokens, exact=i == self.config.cached_layers[-1])
        return cached

    def rotation(self, grid: Size) -> Rotation:
        """Rows turn the first half of each head, columns the second; from 1 on: spec section 3."""
        pairs = self.config.embed_dim // self.config.heads // 4
        rows, columns = (torch.arange(1, n + 1, dtype=torch.float64) for n in grid)
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        frequencies = 100 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angles = places[..., None] * frequencies  # [N, 2, pairs]
        return Rotation.by(angles, 1 + self.config.registers, self.camera_token)


class CameraHead(nn.Module):
    """Poses from camera tokens, refined in passes: spec section 6."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.passes = config.camera_passes
        width, heads = 2 * config.embed_dim, config.camera_heads
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, 9))
        self.token_norm = nn.LayerNorm(width)
        self.embed_pose = nn.Linear(9, width)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.adaln_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.trunk = nn.ModuleList(
            Block(width, Attention(width, heads, qk_norm=False), layer_scale=config.layer_scale)
            for _ in range(config.camera_depth)
        )
        self.trunk_norm = nn.LayerNorm(width)
        self.pose_branch = Mlp(width, config.embed_dim, 9)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, S, 2D] -> [K, B, S, 9]
        camera = self.token_norm(tokens)
        fed = self.empty_pose_tokens.expand(*tokens.shape[:2], -1)
        pose, passes = torch.zeros_like(fed), []
        for _ in range(self.passes):
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(fed)).chunk(3, -1)
            x = camera + gate * (self.adaln_norm(camera) * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x)
            pose = pose + self.pose_branch(self.trunk_norm(x))
            passes.append(torch.cat([pose[..., :7], F.relu(pose[..., 7:])], -1))
            # What is fed back is the pose before its activation, and carries no gradient.
            fed = pose = pose.detach()
        return torch.stack(passes)


class DenseHead(Pyramid):
    """A map of the images' size; the last of its `outputs` channels is the confidence's logit.

    Source: spec section 7.
    """

    def __init__(self, config: VGGTConfig, outputs: int) -> None:
        width, features = 2 * config.embed_dim, config.features
        super().__init__(width, features, config.level_channels, RectifiedConv)
        self.patch_size = config.patch_size
        self.scratch["output_conv1"] = nn.Conv2d(features, features // 2, 3, padding=1)
        self.scratch["output_conv2"] = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, outputs, 1)
        )

    def forward(self, layers: Sequence[Tensor], size: Size) -> Tensor:
        """Logits [b, outputs, H, W] of patch tokens, four times [b, N, 2D], of images of `size`."""
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        embed = partial(add_positions, aspect=size[1] / size[0])
        x = self.scratch["output_conv1"](self.fuse(layers, grid, embed, enlarge=2))
        out: Tensor = self.scratch["output_conv2"](embed(resize(x, size)))
        return out


class DepthHead(DenseHead):
    """Depth and confidence [b, H, W]."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__(config, outputs=2)

    def read(self, layers: Sequence[Tensor], size: Size) -> tuple[Tensor, Tensor]:
        depth, confidence = self(layers, size).unbind(1)
        return depth.exp(), 1 + confidence.exp()


class PointHead(DenseHead):
    """World points [b, H, W, 3] and confidence [b, H, W]."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__(config, outputs=4)

    def read(self, layers: Sequence[Tensor], size: Size) -> tuple[Tensor, Tensor]:
        logits = self(layers, size).movedim(1, -1)
        points, confidence = logits[..., :3], logits[..., 3]
        return points.sign() * points.abs().expm1(), 1 + confidence.exp()


class VGGT(nn.Module):
    """VGGT. Source: spec vggt, and its golden numbers."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(config)
        self.depth_head = DepthHead(config)
        self.point_head = PointHead(config) if config.point_head else None
        self.track_head = None
        if config.track_head:
            fixed = config.track_position_embedding
            pyramid = Pyramid(
                2 * config.embed_dim, config.tracker.width, config.level_channels, RectifiedConv
            )
            self.track_head = TrackHead(config.tracker, pyramid, config.patch_size, fixed)
        for part in (self.aggregator, self.camera_head):
            part.apply(initialize)

    def forward(self, images: Tensor, frames_per_chunk: int = 8) -> Outputs:
        """Cameras, depth and points of images [B, S, 3, H, W] in [0, 1]; H, W multiples of 14."""
        size = (images.shape[-2], images.shape[-1])
        return self.read(self.aggregate(images), size, frames_per_chunk)

    def aggregate(self, images: Tensor) -> dict[int, Tensor]:
        """The cached layers [B, S, T, 2D] by their number, of images [B, S, 3, H, W] in [0, 1]."""
        with compute(self.aggregator.get_parameter("frame_blocks.0.attn.proj.bias")):
            cached: dict[int, Tensor] = self.aggregator(images)
        return cached

    def read(self, cached: dict[int, Tensor], size: Size, frames_per_chunk: int = 8) -> Outputs:
        """What the heads, but for the track head, make of the cached layers of such images."""
        layers = self.patch_layers(cached)
        points, sureness = None, None
        tokens = cached[self.config.cached_layers[-1]][:, :, : 1 + self.config.registers]
        tokens = tokens.to(self.aggregator.camera_token.device)
        with full_precision(tokens):
            passes = self.camera_head(tokens[:, :, 0])
            head = partial(self.depth_head.read, size=size)
            depth, confidence = by_frames(head, layers, frames_per_chunk)
            if self.point_head is not None:
                head = partial(self.point_head.read, size=size)
                points, sureness = by_frames(head, layers, frames_per_chunk)
        return Outputs(passes, depth, confidence, points, sureness, tokens)

    def track(
        self,
        cached: dict[int, Tensor],
        size: Size,
        query_points: Tensor,  # [B, M, 2] (x, y) network pixels of the first frame
        frames_per_chunk: int = 8,
    ) -> Followed:
        """Points of the first frame in all frames; both sides of the images at least 140.

        Coordinates are as VGGT counts them: the centre of the top left pixel is (0, 0).
        """
        assert self.track_head is not None, "this network was built without its track head"
        layers = self.patch_layers(cached)
        with full_precision(query_points):
            features = partial(self.track_head.features, size=size)
            (maps,) = by_frames(features, layers, frames_per_chunk)
            followed: Followed = self.track_head.tracker(maps, query_points)
        return followed

    def patch_layers(self, cached: dict[int, Tensor]) -> list[Tensor]:
        """The patch tokens of the cached layers, each [B, S, N, 2D]."""
        return [cached[i][:, :, 1 + self.config.registers :] for i in self.config.cached_layers]
