"""The papers' claims in miniature: variants of a small network, trained alike and measured.

python benchmarks/ablation.py [--steps N] [--seeds N] [--jobs N] [--root FOLDER]

Writes docs/ablation.md, docs/ablation.png and benchmarks/results/ablation.json under the root.
Finished runs stay in the last, so a command that was stopped goes on. Batches are rendered once
per seed into runs/ablation, which may be deleted afterwards.
"""

import argparse
import copy
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ablation_report import FIGURES, report
from common import circumstances, write
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from vggt_cli.geometry import compose, decode_pose, invert
from vggt_cli.learning import losses, synthetic
from vggt_cli.learning.evaluate import evaluate
from vggt_cli.learning.losses import Truth
from vggt_cli.learning.objectives import MINI_WEIGHTS, Batch, Teacher, Weights, objective
from vggt_cli.learning.stream import Data, Stream, seed_of
from vggt_cli.learning.train import TrainConfig, follow, freeze, groups, schedule
from vggt_cli.models import store
from vggt_cli.models.layers import (
    Block,
    Outputs,
    Rotation,
    Size,
    add_positions,
    by_frames,
    full_precision,
    resize,
    with_special_tokens,
)
from vggt_cli.models.mini import Mini, MiniConfig, Seen
from vggt_cli.models.omega import Aggregator, DenseHead

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = replace(
    MiniConfig(),
    embed_dim=96,
    heads=3,
    depth=3,
    cached_layers=(0, 1, 2, 2),
    features=32,
    level_channels=(24, 48, 64, 64),
)

Run = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    steps: int = 1000
    pixels: int = 80  # height and width
    spread: float = 0.4  # of the cameras, in training and in the measure
    frames: tuple[int, ...] = (2, 3, 4)  # of a sequence in training; measured with the most
    batch_frames: int = 8
    held_out: int = 24  # scenes that are measured
    config: MiniConfig = SMALL

    def stream(self, seed: int) -> Stream:
        """The batches of all runs of a seed."""
        data = Data(
            frames=self.frames,
            batch_frames=self.batch_frames,
            pixels=self.pixels,
            aspects=(1.0,),
            near=self.spread,
            near_steps=10**9,  # the spread stays what it is
            seed=seed,
        )
        return Stream(data, self.config.patch_size, CPU)

    def listed(self) -> dict[str, Any]:
        """The first held-out scenes, as these networks see them."""
        listed = json.loads((_bundled() / "heldout.json").read_text())
        size = (self.pixels, self.pixels)
        seeds = listed["seeds"][: self.held_out]
        return {"seeds": seeds, "frames": [max(self.frames)], "size": size, "spread": self.spread}


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
    block: Block | nn.Module, tokens: Tensor, meet: bool, rotate: Rotation | None = None
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
            self.dense_head = ConvolutionHead(self.config)
        del self.camera_head.trust_branch  # nobody to trust

    def read(self, seen: Seen, frames_per_chunk: int = 8) -> Outputs:
        """What the heads make of it; one pass of poses."""
        special = 1 + self.config.registers
        tokens = seen.layers[-1][:, :, :special]
        dense = partial(self.dense_head, size=seen.size)
        with full_precision(tokens):
            patches = [layer[:, :, special:] for layer in seen.layers]
            depth, confidence = by_frames(dense, patches, frames_per_chunk)
            _, pose = self.camera_head.look(tokens.float())
        return Outputs(pose[None], depth, confidence, tokens=tokens)


def build(variant: Variant, config: MiniConfig, seed: int) -> tuple[Small, Teacher]:
    """A network to be trained and its teacher; of one seed, what has the same shape is the same."""
    torch.manual_seed(seed)
    fresh, teacher = Mini(config).state_dict(), Teacher(config)
    network = Small(config, variant)
    state = network.state_dict()
    fits = {k: v for k, v in fresh.items() if k in state and v.shape == state[k].shape}
    network.load_state_dict(state | fits)
    encoder = load_file(_bundled() / "encoder.safetensors")
    floats = {k: v.float() for k, v in encoder.items()}
    network.aggregator.patch_embed.load_state_dict(floats, strict=False)  # it may know no colours
    freeze(network)
    if not variant.matches:
        network.match.requires_grad_(False)
        for value in network.match.parameters():
            value.zero_()
    return network, teacher


def _bundled() -> Path:
    folder = store.bundled()
    assert folder is not None  # it comes with the tool
    return folder


def render(seed: int, setting: Setting, folder: Path) -> Path:
    """The file with all batches of a seed; rendered unless it is there."""
    torch.set_num_threads(1)
    path = folder / f"batches-{seed}-{seed_of(*map(ord, repr(setting)))}.pt"
    if not path.exists():
        stream = setting.stream(seed)
        batches = (stream[step] for step in range(setting.steps))
        kept = [((b.pixels * 255).round().to(torch.uint8), *b.truth) for b in batches]
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".new")
        torch.save(kept, draft)
        draft.replace(path)
    return path


def batches(path: Path) -> Iterator[Batch]:
    """What `render` has written, with the pixels that it had: they have eight bits."""
    for pixels, *truth in torch.load(path, mmap=True):  # processes share the pages
        yield Batch(pixels / 255, Truth(*truth))


def train(
    network: Small, teacher: Teacher, path: Path, variant: Variant, steps: int
) -> tuple[Small, Teacher]:
    """The moving averages of network and teacher after such steps as `vggt train` makes."""
    config = TrainConfig(Path(), steps=steps)
    averages = copy.deepcopy(network), copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(groups(network, teacher, config), betas=(0.9, 0.95))
    for step, batch in enumerate(batches(path)):
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * config.learning_rate * schedule(step, config)
        loss, _ = objective(network, teacher, batch, variant.weights)
        optimizer.zero_grad()
        loss.backward()
        norms = [
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            for part in (*network.children(), teacher)
        ]
        if torch.stack(norms).isfinite().all():
            optimizer.step()
            follow(averages[0], network, step)
            follow(averages[1], teacher, step)
    return averages


def run(variant: Variant, seed: int, setting: Setting, path: Path) -> Run:
    """One training and its figures."""
    torch.set_num_threads(1)
    network, teacher = build(variant, setting.config, seed)
    began = time.monotonic()
    trained, taught = train(network, teacher, path, variant, setting.steps)
    minutes = (time.monotonic() - began) / 60
    rows = {str(row["prediction"]): row for row in evaluate(trained, setting.listed())}
    figures = {way: {name: row[name] for name in FIGURES} for way, row in rows.items()}
    done: Run = {
        "variant": variant.name,
        "seed": seed,
        "steps": setting.steps,
        "minutes": round(minutes, 2),
        "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "megabytes": round(kept_bytes(network) / 1e6, 1),
        "figures": figures["network"],
        "constant": figures["constant"],
        **circumstances(),
    }
    if variant.name == "baseline":
        done["points"] = point_errors(trained, taught, setting)
    return done


@torch.inference_mode()
def point_errors(network: Small, teacher: Teacher, setting: Setting) -> dict[str, float]:
    """Mean distance of points to the true ones, both of depth and camera and of the point layer.

    At the middles of patches, in units of the mean distance of the scene's points to the first
    camera, after the medians of the distances have been made equal.
    """
    listed, errors = setting.listed(), {"depth and camera": 0.0, "point layer": 0.0}
    for seed in listed["seeds"]:
        sample = synthetic.sample(
            seed, synthetic.Path(listed["frames"][0], listed["size"], setting.spread)
        )
        pixels = synthetic.photographed(torch.Generator().manual_seed(seed), sample.pixels)
        cameras = sample.cameras
        parts = (cameras.extrinsics, cameras.intrinsics, sample.depth, sample.valid)
        truth, _ = losses.normalize(Truth(*(x[None] for x in parts)))
        seen = network.aggregate(pixels[None])
        outputs = network.read(seen)
        extrinsics, lenses = decode_pose(outputs.pose_passes[-1], seen.size)
        extrinsics = compose(extrinsics, invert(extrinsics[:, :1]).expand_as(extrinsics))
        said = Truth(extrinsics, lenses, outputs.depth, truth.valid)
        patch = setting.config.patch_size
        true, valid = losses.patch_points(truth, patch)
        patches = seen.layers[-1][:, :, 1 + network.config.registers :]
        found = {
            "depth and camera": losses.patch_points(said, patch)[0],
            "point layer": teacher.points(patches).unflatten(2, true.shape[2:4]),
        }
        for way, points in found.items():
            a, b = points[valid], true[valid]
            scale = b.norm(dim=-1).median() / a.norm(dim=-1).median()
            errors[way] += float((scale * a - b).norm(dim=-1).mean()) / len(listed["seeds"])
    return errors


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


def ablate(
    variants: Sequence[Variant], seeds: int, setting: Setting, jobs: int, root: Path
) -> list[Run]:
    """All runs, those that are already in the results file as they stand there."""
    folder, numbers = root / "benchmarks/results", json.loads(json.dumps(asdict(setting)))
    file, runs = folder / "ablation.json", []
    if file.exists():
        runs = json.loads(file.read_text())["figures"]
        if any(done["setting"] != numbers for done in runs):
            raise SystemExit(f"runs of another setting: {file}\ntake another --root, or remove it")
    there = {(done["variant"], done["seed"]) for done in runs}
    wanted = [(v, s) for s in range(seeds) for v in variants if (v.name, s) not in there]
    # A forked process may inherit locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        missing = sorted({s for _, s in wanted})
        made = {s: pool.submit(render, s, setting, root / "runs/ablation") for s in missing}
        files = {s: future.result() for s, future in made.items()}
        futures = [pool.submit(run, v, s, setting, files[s]) for v, s in wanted]
        for count, future in enumerate(as_completed(futures), 1):
            done = future.result() | {"setting": numbers}
            runs.append(done)
            write("ablation", runs, folder)
            words = f"{done['variant']}, seed {done['seed']}: {done['minutes']} min"
            print(f"{count} of {len(wanted)}: {words}", flush=True)
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--root", type=Path, default=ROOT, help="where results and docs go")
    options = parser.parse_args(arguments)
    setting = Setting(steps=options.steps)
    runs = ablate(VARIANTS, options.seeds, setting, options.jobs, options.root)
    print(report(runs, {v.name: v.beside for v in VARIANTS}, options.root / "docs"))


if __name__ == "__main__":
    main()
