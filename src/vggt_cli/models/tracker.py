"""VGGT's track head: points of the first frame, followed through all. Source: spec vggt 9.

B batch, S frames, M points, C channels of the features, h x w pixels of the feature maps, which
are half the network's; K iterations. Tokens are [B, M, S, ...]: points meet in the space blocks,
frames in the time blocks. There is no order of frames but for the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_cli.models.layers import Mlp, Pyramid, Size, add_positions, resize

STRIDE = 2  # network pixels per feature pixel
FLOW_SCALE = 518  # feature pixels, by which flows are divided where they are numbers themselves


@dataclass(frozen=True)
class TrackConfig:
    """Every number of the track head that a checkpoint fixes."""

    width: int = 128  # C
    hidden: int = 384  # width of the update transformer
    heads: int = 8
    depth: int = 6  # time blocks, and as many space stages
    virtual_tracks: int = 64
    levels: int = 7  # of the correlation pyramid
    radius: int = 4  # of its windows, feature pixels of the level
    iterations: int = 4  # K

    @property
    def tokens(self) -> int:
        """Channels of a token: flow, correlation and feature."""
        return 3 * self.width + 4


class Followed(NamedTuple):
    """Where M points of the first frame are in every frame."""

    xy: Tensor  # [K, B, S, M, 2] network pixels after each iteration, the last is the result
    visibility: Tensor  # [B, S, M] in [0, 1]
    confidence: Tensor  # [B, S, M] in [0, 1]


class SelfBlock(nn.Module):
    """A block whose residual starts from the normed input, as it was trained."""

    def __init__(self, config: TrackConfig) -> None:
        super().__init__()
        width = config.hidden
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [b, n, hidden]
        z = self.norm1(x)
        x = z + self.attn(z, z, z, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class CrossBlock(nn.Module):
    """The same, with keys and values from a context."""

    def __init__(self, config: TrackConfig) -> None:
        super().__init__()
        width = config.hidden
        self.norm1 = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.cross_attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # [b, n, hidden], [b, m, hidden]
        z, c = self.norm1(x), self.norm_context(context)
        x = z + self.cross_attn(z, c, c, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class UpdateTransformer(nn.Module):
    """Changes of coordinates and features [B, M, S, 2+C] from tokens [B, M, S, 3C+4]."""

    def __init__(self, config: TrackConfig) -> None:
        super().__init__()
        hidden, depth = config.hidden, range(config.depth)
        # Spelt as in the checkpoints.
        self.virual_tracks = nn.Parameter(torch.randn(1, config.virtual_tracks, 1, hidden))
        self.input_norm = nn.LayerNorm(config.tokens)
        self.input_transform = nn.Linear(config.tokens, hidden)
        self.time_blocks = nn.ModuleList(SelfBlock(config) for _ in depth)
        self.space_virtual2point_blocks = nn.ModuleList(CrossBlock(config) for _ in depth)
        self.space_virtual_blocks = nn.ModuleList(SelfBlock(config) for _ in depth)
        self.space_point2virtual_blocks = nn.ModuleList(CrossBlock(config) for _ in depth)
        self.output_norm = nn.LayerNorm(hidden)
        self.flow_head = nn.Linear(hidden, 2 + config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        B, M, S, _ = tokens.shape
        start = self.input_transform(self.input_norm(tokens))
        x = torch.cat([start, self.virual_tracks.expand(B, -1, S, -1)], 1)
        stages = zip(
            self.time_blocks,
            self.space_virtual2point_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
            strict=True,
        )
        for time, gather, mix, scatter in stages:
            x = time(x.flatten(0, 1)).unflatten(0, (B, -1))
            frames = x.transpose(1, 2).flatten(0, 1)  # [B S, M + virtual, hidden]
            virtual = mix(gather(frames[:, M:], frames[:, :M]))
            points = scatter(frames[:, :M], virtual)
            x = torch.cat([points, virtual], 1).reshape(B, S, -1, x.shape[-1]).transpose(1, 2)
        out: Tensor = self.flow_head(self.output_norm(x[:, :M] + start))
        return out


class Tracker(nn.Module):
    """Correlates, updates, and again: coordinates and features of points, from feature maps."""

    def __init__(self, config: TrackConfig) -> None:
        super().__init__()
        self.config = config
        C, window = config.width, (2 * config.radius + 1) ** 2
        self.query_ref_token = nn.Parameter(torch.randn(1, 2, config.tokens))
        self.corr_mlp = Mlp(config.levels * window, config.hidden, C)
        self.updateformer = UpdateTransformer(config)
        self.fmap_norm = nn.LayerNorm(C)
        self.ffeat_norm = nn.LayerNorm(C)
        self.ffeat_updater = nn.Sequential(nn.Linear(C, C), nn.GELU())
        self.vis_predictor = nn.Sequential(nn.Linear(C, 1))
        self.conf_predictor = nn.Sequential(nn.Linear(C, 1))

    def forward(self, maps: Tensor, query_points: Tensor) -> Followed:
        """maps: [B, S, C, h, w]; query_points: [B, M, 2] network pixels of the first frame."""
        S, size = maps.shape[1], (maps.shape[-2], maps.shape[-1])
        maps = self.fmap_norm(maps.movedim(2, -1)).movedim(-1, 2)
        levels = self.pyramid(maps.flatten(0, 1))
        query = query_points[:, :, None] / STRIDE  # [B, M, 1, 2]
        xy = query.expand(-1, -1, S, -1)
        features = sample(maps[:, 0], query, "border").expand(-1, -1, S, -1)  # [B, M, S, C]
        known = sines_at(query, size, self.config.tokens) + self.roles(S)  # [B, M, S, 3C+4]
        passes = []
        for _ in range(self.config.iterations):
            xy = xy.detach()
            correlated = self.corr_mlp(self.correlate(levels, features, xy))
            flow = embed_flow(xy - xy[:, :, :1], self.config.width)
            change = self.updateformer(torch.cat([flow, correlated, features], -1) + known)
            features = features + self.ffeat_updater(self.ffeat_norm(change[..., 2:]))
            # The first frame is where the points were asked for.
            xy = torch.cat([query, (xy + change[..., :2])[:, :, 1:]], 2)
            passes.append(xy.transpose(1, 2) * STRIDE)
        final = features.transpose(1, 2)  # [B, S, M, C]
        visible, sure = self.vis_predictor(final), self.conf_predictor(final)
        return Followed(torch.stack(passes), visible.sigmoid()[..., 0], sure.sigmoid()[..., 0])

    def pyramid(self, maps: Tensor) -> list[Tensor]:
        """The maps [B S, C, h, w] and their halves, quarters, ..."""
        smallest = 2 ** (self.config.levels - 1)
        assert min(maps.shape[-2:]) >= smallest, f"feature maps under {smallest}: {maps.shape}"
        levels = [maps]
        for _ in range(self.config.levels - 1):
            levels.append(F.avg_pool2d(levels[-1], 2))
        return levels

    def roles(self, S: int) -> Tensor:
        """[1, 1, S, 3C+4] what tells the first frame from the others."""
        first, other = self.query_ref_token[:, None].split_with_sizes([1, 1], 2)
        return torch.cat([first, other.expand(-1, -1, S - 1, -1)], 2)

    def correlate(self, levels: Sequence[Tensor], features: Tensor, xy: Tensor) -> Tensor:
        """[B, M, S, levels windows] products of features with the maps around xy [B, M, S, 2].

        The maps are sampled before the product with the features, which is linear: the maps of
        products would be h w numbers for every point.
        """
        B, _, S, C = features.shape
        steps = torch.arange(-self.config.radius, self.config.radius + 1).to(xy)
        window = torch.cartesian_prod(steps, steps)  # x first, y fastest
        features, xy = (v.transpose(1, 2).flatten(0, 1) for v in (features, xy))  # [B S, M, ...]
        products = [
            torch.einsum(
                "bmc,bmkc->bmk", features, sample(maps, xy[:, :, None] / 2**i + window, "zeros")
            )
            for i, maps in enumerate(levels)
        ]
        together: Tensor = torch.cat(products, -1) / math.sqrt(C)
        return together.reshape(B, S, -1, together.shape[-1]).transpose(1, 2)


class TrackHead(nn.Module):
    """Feature maps of half the images' size, and the tracker that reads them."""

    def __init__(
        self, config: TrackConfig, pyramid: Pyramid, patch_size: int, positions: bool
    ) -> None:
        super().__init__()
        self.patch_size, self.positions = patch_size, positions
        C = config.width
        self.feature_extractor = pyramid
        pyramid.scratch["output_conv1"] = nn.Conv2d(C, C, 3, padding=1)
        self.tracker = Tracker(config)

    def features(self, layers: Sequence[Tensor], size: Size) -> tuple[Tensor]:
        """Maps [b, C, H/2, W/2] of patch tokens, four times [b, N, 2D], of images of `size`."""
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        embed = (
            partial(add_positions, aspect=size[1] / size[0]) if self.positions else nn.Identity()
        )
        x = self.feature_extractor.fuse(layers, grid, embed, enlarge=2)
        x = self.feature_extractor.scratch["output_conv1"](x)
        return (embed(resize(x, (size[0] // STRIDE, size[1] // STRIDE))),)


def sample(maps: Tensor, xy: Tensor, padding: str) -> Tensor:
    """Bilinear samples [b, m, k, C] of maps [b, C, h, w] at xy [b, m, k, 2]; (0, 0) is a centre."""
    h, w = maps.shape[-2:]
    last = torch.tensor([max(w - 1, 1), max(h - 1, 1)]).to(xy)
    grid = 2 * xy / last - 1
    sampled = F.grid_sample(maps, grid, padding_mode=padding, align_corners=True)
    return sampled.movedim(1, -1)


def embed_flow(flow: Tensor, width: int) -> Tensor:
    """[..., width + 4] sines and cosines of a flow [..., 2] in feature pixels, and itself twice."""
    frequencies = torch.arange(0, width // 2, 2).to(flow) * (1000 / (width // 2))
    angles = flow[..., None] * frequencies  # [..., 2, width / 4]
    waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)
    return torch.cat([waves, flow / FLOW_SCALE, flow / FLOW_SCALE], -1)


def sines_at(xy: Tensor, size: Size, channels: int) -> Tensor:
    """[..., channels] sine table of a map of that size, sampled bilinearly at xy [..., 2].

    A column's entries depend on x alone and a row's on y, so that no table is made.
    """
    quarter = channels // 4
    omega = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    last = torch.tensor([size[1] - 1, size[0] - 1], dtype=torch.float64)
    # In float64 on the CPU, for devices without it.
    place = torch.minimum(xy.detach().cpu().double().clamp(min=0), last)[..., None]
    low = place.floor()
    below, above = (torch.cat([a.sin(), a.cos()], -1) for a in (low * omega, (low + 1) * omega))
    return below.lerp(above, place - low).flatten(-2).to(xy)
