"""What mini's trunk makes of equal minutes: its size, its encoder, its curriculum, its weights.

python benchmarks/choices.py [--minutes N] [--jobs N] [--out FOLDER]

Writes choices.json there (benchmarks/results) and prints its table. Minutes are of one thread and
of training alone; scenes are rendered beside.
"""

import argparse
import copy
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from ablation_variants import bundled
from common import circumstances, write
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from vggt_cli.learning.evaluate import evaluate
from vggt_cli.learning.objectives import MINI_WEIGHTS, Teacher, Weights, objective
from vggt_cli.learning.stream import Data, Stream
from vggt_cli.learning.train import TrainConfig, follow, freeze, groups, schedule
from vggt_cli.models.catalog import entry
from vggt_cli.models.layers import Outputs
from vggt_cli.models.mini import Mini, MiniConfig, Seen

FIGURES = ("rotation", "direction", "AUC@5", "AUC@30", "AbsRel", "field of view")
HELD_OUT = 24  # scenes
ENCODER = "aggregator.patch_embed."
SHAPING = entry("mini").shaping


@dataclass(frozen=True)
class Choice:
    """A network and its training."""

    name: str
    config: MiniConfig = field(default_factory=MiniConfig)
    published: bool = False  # encoder: XFeat's as published, not trained further
    near: float = 0.7  # spread of the cameras at first
    weights: Weights = MINI_WEIGHTS


def sized(width: int, depth: int) -> MiniConfig:
    last = depth - 1
    layers = (last // 4, last // 2, 3 * last // 4, last)
    heads = width // 32
    return replace(
        MiniConfig(),
        embed_dim=width,
        heads=heads,
        head_heads=heads,
        depth=depth,
        cached_layers=layers,
    )


CHOICES = (
    Choice("as it is: 5 pairs, 192 wide"),
    Choice("3 pairs, 256 wide", sized(256, 3)),
    Choice("9 pairs, 128 wide", sized(128, 9)),
    Choice("encoder as published", published=True),
    Choice("wide baselines from the first step on", near=1.0),
    Choice(
        "camera 5, point 2, matching 1",
        weights=replace(MINI_WEIGHTS, camera=5, point=2, matching=1),
    ),
)


class Early(Mini):
    """mini before its depth head: depth is that of the cells."""

    def read(self, seen: Seen, frames_per_chunk: int = 8) -> Outputs:
        guess = self.guess(seen)
        settled = self.settle(seen, guess, self.find(seen, guess)[0])
        size = (seen.pixels.shape[-2], seen.pixels.shape[-1])
        depth = F.interpolate(guess.depth, size, mode="bilinear")
        return Outputs(settled.pose[None], depth, torch.ones_like(depth))


def run(choice: Choice, minutes: float) -> dict[str, Any]:
    """One training and its figures on held-out scenes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, teacher = Early(choice.config), Teacher(choice.config)
    encoder = load_file(bundled() / "mini.safetensors")
    start = {k.removeprefix(ENCODER): v for k, v in encoder.items() if k.startswith(ENCODER)}
    if choice.published:
        start = load_file(bundled() / "encoder.safetensors")
    floats = {k: v.float() for k, v in start.items()}
    network.aggregator.patch_embed.load_state_dict(floats, strict=False)  # XFeat knows no colours
    freeze(network, ("encoder", "depth-head"))
    average, steps, spent = copy.deepcopy(network), 0, 0.0
    data = Data(near=choice.near, near_steps=round(100 * minutes))
    stream = Stream(data, choice.config.patch_size, torch.device("cpu"))
    config = TrainConfig(Path(), steps=1000, learning_rate=7e-4)
    optimizer = torch.optim.AdamW(groups(network, teacher, config), betas=(0.9, 0.95))
    while spent < minutes:
        batch = stream[steps]
        began = time.thread_time()
        for group in optimizer.param_groups:
            share = schedule(round(config.steps * spent / minutes), config)
            group["lr"] = group["share"] * config.learning_rate * share
        loss, _ = objective(network, teacher, batch, choice.weights)
        optimizer.zero_grad()
        loss.backward()
        for part in (*network.children(), teacher):
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        follow(average, network, steps)
        steps += 1
        spent += (time.thread_time() - began) / 60
    rows = {row["prediction"]: row for row in evaluate(average.eval(), listed(), shaping=SHAPING)}
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    figures = {name: rows["network"][name] for name in FIGURES}
    done = {"choice": choice.name, "minutes": minutes, "steps": steps, "parameters": trained}
    return {**done, **figures, **circumstances()}


def listed() -> dict[str, Any]:
    """The first held-out scenes, with four frames."""
    held: dict[str, Any] = json.loads((bundled() / "heldout.json").read_text())
    return held | {"seeds": held["seeds"][:HELD_OUT], "frames": [4]}


def table(runs: Sequence[dict[str, Any]]) -> str:
    head = ("choice", "steps", *FIGURES)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for done in runs:
        cells = [done["choice"], str(done["steps"])]
        cells += [f"{done[n]:.3f}" if n == "AbsRel" else f"{done[n]:.1f}" for n in FIGURES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context) as pool:
        runs = list(pool.map(run, CHOICES, [options.minutes] * len(CHOICES)))
    write("choices", runs, options.out)
    print(table(runs))


if __name__ == "__main__":
    main()
