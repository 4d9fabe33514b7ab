"""Self-attention of the networks: rotary positions, norms of q and k, and the product itself.

b sequences of n tokens of width D; head size D / heads; T tokens per frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 2048  # keys from which bfloat16 on a CPU goes by rows of ...
ROWS = 256  # ... so many queries, because its own kernel is slower


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

    def forward(
        self, x: Tensor, rotate: Rotation | None = None, keys: Tensor | None = None
    ) -> Tensor:  # [b, n, D]; keys: [m] the tokens that are read, if not all are
        q, k, v = self.ask(x, rotate)
        return self.meet(q, *chosen(k, v, keys))

    def ask(self, x: Tensor, rotate: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [b, heads, n, head size] of tokens [b, n, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.q_norm(q), self.k_norm(k)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        # The norms and the rotation leave float32, which the product would otherwise run in.
        return q.to(v.dtype), k.to(v.dtype), v

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Tokens [b, n, D] of queries [b, heads, n, ...] that read keys and values of others."""
        out: Tensor = self.proj(attended(q, k, v).transpose(1, 2).flatten(2))
        return out


def chosen(k: Tensor, v: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values [b, heads, n, ...] of some tokens [m], or of all."""
    return (k, v) if keys is None else (k[:, :, keys], v[:, :, keys])


@dataclass(frozen=True)
class Thinned:
    """Blocks between frames that read the keys and values of fewer patches: of many frames faster.

    All tokens of the first frame and the camera and register tokens of all are read, and of the
    patches of other frames one of stride x stride, another in each frame. It is an approximation.
    """

    layers: tuple[int, ...]
    stride: int

    @classmethod
    def of(cls, depth: int) -> Thinned:
        """In the later blocks of `depth`, as AVGGT (arXiv 2512.02541) does: 9 to 23 of 24."""
        return cls(tuple(range(-(-3 * depth // 8), depth)), stride=4)

    def keys(self, S: int, grid: tuple[int, int], special: int) -> Tensor:
        """The tokens [m] that are read, of S frames of `special` tokens and a grid of patches."""
        read = torch.zeros(S, *grid, dtype=torch.bool)
        for s in range(S):
            read[
                s, s % self.stride :: self.stride, s // self.stride % self.stride :: self.stride
            ] = True
        read[0] = True
        always = torch.ones(S, special, dtype=torch.bool)
        return torch.cat([always, read.flatten(1)], 1).flatten().nonzero()[:, 0]


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head size)) v of queries [b, heads, n, ...], keys and values."""
    plain = torch.is_grad_enabled() or k.shape[-2] < MANY
    if plain or (q.device.type, q.dtype) != ("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v)
    # PyTorch's kernel multiplies bfloat16 no faster than float32 here. Products leave the matrix
    # multiplication in bfloat16, whose steps grow with the number: what is about the largest of
    # the row, as some of the keys tell, is subtracted inside, so that those that count are small.
    out = torch.empty_like(q)
    q = q * q.shape[-1] ** -0.5
    for head in np.ndindex(*q.shape[:2]):
        keys, most = k[head].mT, (q[head] @ k[head][::16].mT).amax(-1, keepdim=True)
        tiles = zip(q[head].split(ROWS), most.split(ROWS), out[head].split(ROWS), strict=True)
        for rows, shift, result in tiles:
            result.copy_(torch.addmm(-shift, rows, keys).softmax(-1) @ v[head])
    return out
