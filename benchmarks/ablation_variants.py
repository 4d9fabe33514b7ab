"""The variants of the ablation's small network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from vggt_cli.learning.objectives import MINI_WEIGHTS, Teacher, Weights
from vggt_cli.learning.train import freeze
from vggt_cli.models import store
from vggt_cli.models.layers import (
    Rotation,
    Size,
    add_positions,
    resize,
    with_special_tokens,
)
from vggt_cli.models.matching import Matches
from vggt_cli.models.mini import FACTS, Guess, Mini, MiniConfig, Seen, Settled
from vggt_cli.models.omega import Aggregator, DenseHead

SMALL = replace(
    MiniConfig(),
    patch_size=16,
    fine=1,
    late_depth=0,
    embed_dim=96,
    heads=3,
    depth=3,
    cached_layers=(0, 1, 2, 2),
    features=32,
    level_channels=(24, 48, 64, 64),
)


@dataclass(frozen=True)
class Variant:
    """One network and its training, and the one to compare it with."""

    name: str
    beside: str = "baseline"
    meet: tuple[bool, bool] = (False, True)  # frames, in frame blocks and in inter-frame blocks
    matches: bool = True  # of local features go into the tokens
    registers: int = 4
    convolutions: bool = False  # at full resolution in the dense head
    weights: Weights = MINI_WEIGHTS


EVERYWHERE, NOWHERE = (True, True), (False, False)
VARIANTS = (
    Variant("baseline"),
    Variant("global only", meet=EVERYWHERE),
    Variant("frame only", meet=NOWHERE),
    Variant("no matches", matches=False),
    Variant("no matches, global only", "no matches", EVERYWHERE, matches=False),
    Variant("no matches, frame only", "no matches", NOWHERE, matches=False),
    Variant("no camera term", weights=replace(MINI_WEIGHTS, camera=0.0)),
    Variant("no depth term", weights=replace(MINI_WEIGHTS, depth=0.0)),
    Variant("no point term", weights=replace(MINI_WEIGHTS, point=0.0)),
    Variant("no matching term", weights=replace(MINI_WEIGHTS, matching=0.0)),
    Variant("0 registers", registers=0),
    Variant("16 registers", registers=16),
    Variant("full-resolution convolutions", convolutions=True),
)


class MeetingAggregator(Aggregator):
    """The aggregator with a choice, for either kind of block, of whether frames meet in it.

    Nothing else changes: the frame blocks turn queries and keys by place, the others do not.
    """

    def __init__(self, config: MiniConfig, patch_embed: nn.Module, meet: tuple[bool, bool]) -> None:
        super().__init__(config, patch_embed)
        self.meet = meet

    def attend(self, patches: Tensor, grid: Size) -> dict[int, Tensor]:
        """The cached layers [B, S, T, 2D] by their number, of patch tokens [B, S, N, D]."""
        tokens = with_special_tokens([self.camera_token, self.register_token], patches)
        rotate = self.rope_embed(grid, 1 + self.config.registers)
        cached: dict[int, Tensor] = {}
        pairs = zip(self.frame_blocks, self.inter_frame_blocks, strict=True)
        for i, (frame_block, inter_frame_block) in enumerate(pairs):
            frame = _through(frame_block, tokens, self.meet[0], rotate)
            tokens = _through(inter_frame_block, frame, self.meet[1])
            if i in self.config.cached_layers:
                cached[i] = torch.cat([frame, tokens], -1)
        return cached


def _through(
    block: nn.Module, tokens: Tensor, meet: bool, rotate: Rotation | None = None
) -> Tensor:
    """Tokens [B, S, T, D] after a block, in which the frames of a sequence meet or do not."""
    flat = tokens.flatten(1, 2) if meet else tokens.flatten(0, 1)
    out: Tensor = block(flat, rotate)
    return out.view_as(tokens)


class ConvolutionHead(DenseHead):
    """VGGT's way from features to maps: enlarged by interpolation, then convolved at full size."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config)
        del self.proj, self.proj_conf
        half = config.features // 2
        self.narrow = nn.Conv2d(config.features, half, 3, padding=1)
        self.refine = nn.Conv2d(half, 32, 3, padding=1)
        self.logits = nn.Conv2d(32, 2, 1)
        with torch.no_grad():  # the confidence begins as it does in the other head
            self.logits.weight[1] = 0
            self.logits.get_parameter("bias")[1] = math.log(0.05)

    def forward(self, layers: Sequence[Tensor], size: Size) -> tuple[Tensor, Tensor]:
        """Depth and confidence [b, H, W] of patch tokens, four times [b, N, 2D]."""
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        embed = partial(add_positions, aspect=size[1] / size[0])
        x = embed(resize(self.narrow(self.fuse(layers, grid, embed, enlarge=2)), size))
        depth, confidence = self.logits(F.relu(self.refine(x))).exp().unbind(1)
        return depth, 1 + confidence


class Small(Mini):
    """mini without its solver, which would find the cameras whatever attention had found."""

    def __init__(self, config: MiniConfig, variant: Variant) -> None:
        super().__init__(replace(config, registers=variant.registers))
        encoder = self.aggregator.patch_embed
        self.aggregator = MeetingAggregator(self.config, encoder, variant.meet)
        if variant.convolutions:
            self.depth_head.dense_head = ConvolutionHead(self.config)
        del self.depth_head.refiner

    def settle(self, seen: Seen, guess: Guess, matches: Matches) -> Settled:
        """What the heads say, and no facts."""
        none = torch.zeros_like(matches.own[..., 0])
        facts = none.new_zeros(*none.shape[:2], seen.grid[0] * seen.grid[1], FACTS)
        return Settled(guess.pose, matches, none + 1, none, facts)

    def reread(
        self,
        maps: tuple[Tensor, Tensor],
        settled: Settled,
        features: Tensor,
        scale: Tensor,
        frames_per_chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """As they are: a plane sweep finds matches, too."""
        return maps


def build(variant: Variant, config: MiniConfig, seed: int) -> tuple[Small, Teacher]:
    """A network to be trained and its teacher; of one seed, what has the same shape is the same."""
    torch.manual_seed(seed)
    fresh, teacher = Mini(config).state_dict(), Teacher(config)
    network = Small(config, variant)
    state = network.state_dict()
    fits = {k: v for k, v in fresh.items() if k in state and v.shape == state[k].shape}
    network.load_state_dict(state | fits)
    encoder = load_file(bundled() / "encoder.safetensors")
    floats = {k: v.float() for k, v in encoder.items()}
    network.aggregator.patch_embed.load_state_dict(floats, strict=False)  # it may know no colours
    freeze(network)
    if not variant.matches:
        network.match.requires_grad_(False)
        for value in network.match.parameters():
            value.zero_()
    return network, teacher


def bundled() -> Path:
    folder = store.bundled()
    assert folder is not None  # it comes with the tool
    return folder


def kept_bytes(network: Small) -> int:
    """Bytes that autograd keeps of eight frames of 128 x 128 pixels; not the parameters."""
    storages: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            seen = network.aggregate(torch.zeros(2, 4, 3, 128, 128))
        outputs = network.read(seen)  # holds what was kept until it is counted
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    assert outputs.depth.requires_grad
    return sum(size for place, size in storages.items() if place not in own)
