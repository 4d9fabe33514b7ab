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

from vggt_cli.models.attention import Attention as Attention
from vggt_cli.models.attention import Rotation as Rotation
from vggt_cli.models.attention import Thinned as Thinned
from vggt_cli.models.attention import chosen

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's sRGB

FRAMES = 16  # of the encoder and the frame blocks at a time, where no gradient is asked for
TILE = 8192  # tokens of a block at a time, but for their keys and values
ON_DEVICE = 100  # frames whose cached layers stay on the accelerator; of more they leave it

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

    def forward(
        self, x: Tensor, rotate: Rotation | None = None, keys: Tensor | None = None
    ) -> Tensor:  # [b, n, D]; keys: [m] the tokens that are read, if not all are
        if x.shape[1] > TILE and not torch.is_grad_enabled():
            return self.tiled(x, rotate, keys)
        x = x + self.ls1(self.attn(self.norm1(x), rotate, keys))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out

    def tiled(self, x: Tensor, rotate: Rotation | None, keys: Tensor | None) -> Tensor:
        """The same; all but queries, keys, values and the result is there for few tokens."""
        T = 1 if rotate is None else len(rotate.cos)  # whole frames, as the rotation goes
        tiles = list(x.split(max(TILE // T, 1) * T, 1))
        asked = (self.attn.ask(self.norm1(tile), rotate) for tile in tiles)
        q, k, v = (torch.cat(parts, 2) for parts in zip(*asked, strict=True))
        k, v = chosen(k, v, keys)
        out, start = torch.empty_like(x), 0
        for tile in tiles:
            end = start + tile.shape[1]
            tile = tile + self.ls1(self.attn.meet(q[:, :, start:end], k, v))
            torch.add(tile, self.ls2(self.mlp(self.norm2(tile))), out=out[:, start:end])
            start = end
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
        # The published order is to resize first: the same numbers, of four times the pixels.
        return resize(self.out_conv(self.resConfUnit2(x)), size)


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
            x = self.norm(tokens.to(self.norm.weight))  # cached layers may be elsewhere, and short
            x = self.projects[i](x.mT.unflatten(-1, grid))
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


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) for a function of each entry alone, few at a time unless gradients are needed."""
    if torch.is_grad_enabled() or len(x) <= FRAMES:
        return function(x)
    results, whole, start = map(function, x.split(FRAMES)), None, 0
    for part in results:
        whole = part.new_empty(len(x), *part.shape[1:]) if whole is None else whole
        whole[start : start + len(part)] = part
        start += len(part)
    assert whole is not None
    return whole


def kept(frame: Tensor, tokens: Tensor, *, exact: bool) -> Tensor:
    """A cached layer [B, S, T, 2D] of what the frame block and the one between frames gave.

    Unless gradients are needed it leaves the accelerator if there are many frames, and is short
    where matrices are, except `exact` ones.
    """
    if torch.is_grad_enabled():
        return torch.cat([frame, tokens], -1)
    device, kind = frame.device, frame.device.type
    short = torch.is_autocast_enabled(kind) and not exact
    both = torch.empty(
        (*frame.shape[:-1], 2 * frame.shape[-1]),
        dtype=torch.get_autocast_dtype(kind) if short else frame.dtype,
        device=device if frame.shape[1] <= ON_DEVICE else "cpu",
    )
    both[..., : frame.shape[-1]], both[..., frame.shape[-1] :] = frame, tokens
    return both


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
