"""Linear layers in 8 bits, for CPUs: faster than bfloat16, and less exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vggt_cli.models.layers import Block
from vggt_cli.models.omega import MaskedLinear

ROWS = 2048  # tokens at a time: products are 32 bits wide for a while


class Int8Linear(nn.Module):
    """A linear layer whose products are of 8-bit integers.

    Each output channel of the weight has a scale of its own, and so has each token: camera and
    register tokens, which are larger than patches, cost these nothing.
    """

    weight: Tensor  # [outputs, inputs] int8
    scale: Tensor  # [outputs] float32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, bias = linear.weight.detach().float(), linear.bias.detach()
        if isinstance(linear, MaskedLinear):
            bias = bias * linear.bias_mask
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(bias.to(linear.bias.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs]
        return torch.cat([self.multiply(part) for part in x.flatten(0, -2).split(ROWS)]).view(
            *x.shape[:-1], -1
        )

    def multiply(self, x: Tensor) -> Tensor:  # [n, inputs] -> [n, outputs]
        step = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127
        product = torch._int_mm((x / step).round_().to(torch.int8), self.weight.T)
        return torch.addcmul(self.bias.float(), product * step, self.scale).to(self.bias.dtype)


@torch.no_grad()
def to_int8(aggregator: nn.Module) -> None:
    """Makes the linear layers of all blocks of `aggregator` 8 bits wide, in place, on the CPU.

    The heads and the embedding of patches stay. What it costs is in docs/speed.md.
    """
    for block in aggregator.modules():
        if isinstance(block, Block):
            for parent in (block.attn, block.mlp):
                for name, layer in parent.named_children():
                    if isinstance(layer, nn.Linear):
                        setattr(parent, name, Int8Linear(layer))
