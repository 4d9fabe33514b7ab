"""What the networks share: blocks of attention, rotations, the pyramid of the dense heads.

B batch, S frames, H x W pixels, h x w patches, N = h w, T tokens per frame, D width of tokens,
R registers. Attributes keep the spelling of the published checkpoints (`ls1`, `resConfUnit1`),
so that loading is strict and needs no table of renames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's sRGB

Size = tuple[int, int]  # (height, width)


class Outputs(NamedTuple):
    """What a network says about B sets of S frames; depth and translations share one scale."""

    pose_passes: Tensor  # [K, B, S, 9] encoded poses of K refinement passes, the last is the result
    depth: Tensor  # [B, S, H, W] z-depth > 0
    confidence: Tensor  # [B, S, H, W] >= 1
    points: Tensor | None = None  # [B, S, H, W, 3] world
    points_confidence: Tensor | None = None  # [B, S, H, W] >= 1
    tokens: Tensor | None = None  # [B, S, 1+R, 2D] camera and register tokens of the last layer
    text: Tensor | None = None  # [B, 2D] unit text embedding of each set


class Rotation(NamedTuple):
    """A rotary position embedding: pairs of channels turned by angles that depend on the token."""

    cos: Tensor  # [T, axes, pairs]
    sin: Tensor

    @classmethod
    def by(cls, angles: Tensor, leading: int, like: Tensor) -> Rotation:
        """The rotation by `angles` [N, axes, pairs]; `leading` tokens before stay as they are."""
        angles = F.pad(angles, (0, 0, 0, 0, leading, 0))
        return cls(angles.cos().to(like), angles.sin().to(like))

    def __call__(self, x: Tensor) -> Tensor:  # [..., n T, head size], n frames in a row
        T, axes, pairs = self.cos.shape
        a, b = x.to(self.cos).reshape(*x.shape[:-2], -1, T, axes, 2, pairs).unbind(-2)
        turned = torch.stack((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -2)
        return turned.flatten(-3).flatten(-3, -2).to(x.dtype)


class HeadNorm(nn.LayerNorm):
    """LayerNorm whose result has the dtype of its weights, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Self-attention; `qkv` is the class of the first linear layer."""

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool, qkv: type[nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = qkv(width, 3 * width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotate: Rotation | None = None) -> Tensor:  # [b, n, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.q_norm(q), self.k_norm(k)  # [b, heads, n, head size]
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        # The norms and the rotation leave float32, which the product would otherwise run in.
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        out: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with exact GELU between."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """One learned factor per channel; float32, so that the residual stream stays so too."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block. Source: spec vggt section 3, vggt_omega section 3."""

    def __init__(
        self, width: int, attention: Attention, *, layer_scale: float, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = attention
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, 4 * width, width)
        self.ls2 = LayerScale(width, layer_scale)

    def forward(self, x: Tensor, rotate: Rotation | None = None) -> Tensor:  # [b, n, D]
        x = x + self.ls1(self.attn(self.norm1(x), rotate))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class PatchEmbed(nn.Module):
    """One token per patch, row by row; what is left at the right and bottom is ignored."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:  # [b, 3, H, W] -> [b, N, D]
        tokens: Tensor = self.proj(images).flatten(2).mT
        return tokens


class ResidualConv(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [b, F, h, w]
        out: Tensor = x + self.conv2(F.relu(self.conv1(F.relu(x))))
        return out


class RectifiedConv(ResidualConv):
    """VGGT's residual convolution, whose identity carries relu(x): its ReLU works in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))


class FusionBlock(nn.Module):
    """Adds a finer level to what comes from the coarser ones and brings it to another size."""

    def __init__(self, features: int, residual: type[ResidualConv], *, coarsest: bool) -> None:
        super().__init__()
        if not coarsest:  # which has nothing to be added to
            self.resConfUnit1 = residual(features)
        self.resConfUnit2 = residual(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, level: Tensor | None, size: Size) -> Tensor:
        if level is not None:
            x = x + self.resConfUnit1(level)
        out: Tensor = self.out_conv(resize(self.resConfUnit2(x), size))
        return out


class Pyramid(nn.Module):
    """One feature map from the tokens of four layers: what every dense head begins with.

    `residual` is the class of the residual convolutions, in which the networks differ.
    Source: spec vggt section 7, vggt_omega section 9, steps 1 to 3.
    """

    def __init__(
        self, width: int, features: int, channels: Sequence[int], residual: type[ResidualConv]
    ) -> None:
        super().__init__()
        c1, c2, _, c4 = channels
        self.norm = nn.LayerNorm(width)
        self.projects = nn.ModuleList(nn.Conv2d(width, c, 1) for c in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(c1, c1, 4, 4),
                nn.ConvTranspose2d(c2, c2, 2, 2),
                nn.Identity(),
                nn.Conv2d(c4, c4, 3, 2, 1),
            ]
        )
        self.scratch = nn.ModuleDict()
        for i, c in enumerate(channels, 1):
            self.scratch[f"layer{i}_rn"] = nn.Conv2d(c, features, 3, padding=1, bias=False)
            self.scratch[f"refinenet{i}"] = FusionBlock(features, residual, coarsest=i == 4)

    def fuse(
        self,
        layers: Sequence[Tensor],  # 4 x [b, N, width]
        grid: Size,
        embed: Callable[[Tensor], Tensor],  # adds a position embedding to a map
        enlarge: int = 1,
    ) -> Tensor:  # [b, F, 4 h, 4 w] times `enlarge`
        levels = []
        for i, tokens in enumerate(layers):
            x = self.projects[i](self.norm(tokens).mT.unflatten(-1, grid))
            levels.append(self.scratch[f"layer{i + 1}_rn"](self.resize_layers[i](embed(x))))
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        fine = (sizes[0][0] * enlarge, sizes[0][1] * enlarge)
        x = self.scratch["refinenet4"](levels[3], None, sizes[2])
        x = self.scratch["refinenet3"](x, levels[2], sizes[1])
        x = self.scratch["refinenet2"](x, levels[1], sizes[0])
        out: Tensor = self.scratch["refinenet1"](x, levels[0], fine)
        return out


def resize(x: Tensor, size: Size) -> Tensor:
    """The map x [b, C, h, w] at another size: bilinear, the corners' centres stay in place."""
    if (x.shape[-2], x.shape[-1]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def add_positions(x: Tensor, aspect: float) -> Tensor:
    """The maps x [b, C, h, w] plus a tenth of a sine embedding of the place in the image.

    aspect: width / height of the image in pixels, which is not that of the grid.
    Source: spec vggt section 7, vggt_omega section 9.
    """
    C, h, w = x.shape[1:]
    diagonal = math.hypot(aspect, 1)
    columns = _sines(w, aspect / diagonal, C // 4).to(x)[:, None, :].expand(-1, h, -1)
    rows = _sines(h, 1 / diagonal, C // 4).to(x)[:, :, None].expand(-1, -1, w)
    return x + 0.1 * torch.cat([columns, rows])


def _sines(count: int, extent: float, frequencies: int) -> Tensor:
    """[2 frequencies, count] sines, then cosines, of centres of pixels across +-extent."""
    end = extent * (count - 1) / count
    places = torch.linspace(-end, end, count, dtype=torch.float64)
    omega = 100 ** (-torch.arange(frequencies, dtype=torch.float64) / frequencies)
    angles = omega[:, None] * places
    return torch.cat([angles.sin(), angles.cos()])


def by_frames(
    head: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
    layers: Sequence[Tensor],
    frames_per_chunk: int,
) -> tuple[Tensor, ...]:
    """The results of a dense head on layers [B, S, N, 2D], each [B, S, ...], chunk by chunk.

    Frames do not meet in a dense head; few at a time bound its memory.
    """
    B, S = layers[0].shape[:2]
    chunks = zip(*(torch.split(x.flatten(0, 1), frames_per_chunk) for x in layers), strict=True)
    results = zip(*(head(chunk) for chunk in chunks), strict=True)
    return tuple(torch.unflatten(torch.cat(parts), 0, (B, S)) for parts in results)


def normalized(images: Tensor) -> Tensor:
    """Images [..., 3, H, W] in [0, 1] with ImageNet's mean and deviation taken out."""
    assert images.shape[-3] == 3, images.shape
    mean, std = (torch.tensor(x).to(images)[:, None, None] for x in (MEAN, STD))
    return (images - mean) / std


def with_special_tokens(special: Sequence[Tensor], patches: Tensor) -> Tensor:
    """Tokens [B, S, T, D]: each special token, then the patches [B, S, N, D].

    special: each [1, 2, n, D]; entry 0 is for the first frame of a sequence, 1 for all others.
    """
    B, S = patches.shape[:2]
    entry = torch.arange(S, device=patches.device).clamp(max=1)
    return torch.cat([*(x[:, entry].expand(B, -1, -1, -1) for x in special), patches], 2)


def to_compute(module: nn.Module, dtype: torch.dtype) -> None:
    """Converts the weights of linear layers and convolutions to `dtype`, in place.

    Norms, layer scales, tokens and tables keep theirs, as the published networks run.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.to(dtype)


def compute(weight: Tensor) -> AbstractContextManager[object]:
    """The context in which layers with weights like this one run: autocast if it is short."""
    if weight.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(weight.device.type, weight.dtype)
    return nullcontext()


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """The context of the heads: the dtype of their own weights, whatever autocast is around."""
    return torch.autocast(like.device.type, enabled=False)


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Fresh linear layers, as the networks were trained from. Source: spec vggt_omega 15."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
