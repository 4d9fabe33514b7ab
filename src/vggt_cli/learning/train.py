"""Training of mini on rendered scenes: one loop, read top to bottom.

Plain torch: one process, one device, which is what a network of this size needs.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from vggt_cli.learning import losses, synthetic
from vggt_cli.learning.losses import Truth
from vggt_cli.learning.objectives import MINI_WEIGHTS, Batch, Teacher, Weights, objective
from vggt_cli.models import store
from vggt_cli.models.mini import Mini, MiniConfig

log = logging.getLogger(__name__)

FIRST_SEED = 1_000_000  # below are the seeds of held-out scenes


@dataclass(frozen=True)
class TrainConfig:
    """What `train` does; every number of a run."""

    out: Path  # run folder: checkpoint.pt, metrics.csv, config.json
    init: Path | None = None  # weights of mini to go on from; None: fresh but for the encoder
    minutes: float = 60.0
    steps: int = 100_000  # where the learning rate would reach its end
    batch: int = 6  # sequences of four frames; more of fewer
    frames: tuple[int, ...] = (2, 3, 4)
    pixels: int = 128  # root of the area
    aspects: tuple[float, ...] = (1.0, 0.75, 1.333, 0.667, 1.5)  # height / width
    near: float = 0.4  # spread of the cameras at the beginning
    near_steps: int = 5_000  # until it is 1
    scenes: int = 0  # only this many scenes, to see whether they can be learnt by heart; 0: no end
    learning_rate: float = 5e-4
    warm_up: int = 300
    weight_decay: float = 0.02
    weights: Weights = MINI_WEIGHTS
    checkpoint_minutes: float = 5.0
    workers: int = 1  # processes that render
    seed: int = 0


class Scenes(IterableDataset[Batch]):
    """Batches of rendered sequences without end; each scene serves several, seen otherwise."""

    def __init__(
        self, config: TrainConfig, first_step: int, device: torch.device = synthetic.CPU
    ) -> None:
        self.config, self.first_step, self.device = config, first_step, device

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        config = self.config
        random = torch.Generator().manual_seed(config.seed * 7919 + self.first_step + worker)
        seed = FIRST_SEED + (config.seed << 20) + self.first_step * config.batch + worker
        step, pool, size = self.first_step + worker, deque[synthetic.Sample](maxlen=48), (0, 0)
        while True:
            if (step // workers) % 40 == 0 or not pool:  # another aspect, and fresh scenes for it
                size = _size(config, random)
                pool.clear()
            spread = config.near + (1 - config.near) * min(1.0, step / max(1, config.near_steps))
            while len(pool) < 12 or torch.rand((), generator=random) < 2 / 3:
                number = seed if not config.scenes else FIRST_SEED + seed % config.scenes
                pool.append(synthetic.sample(number, synthetic.Path(6, size, spread), self.device))
                seed += workers
            yield _batch(pool, config, random)
            step += workers


def _size(config: TrainConfig, random: torch.Generator) -> tuple[int, int]:
    aspect = config.aspects[int(torch.randint(len(config.aspects), (), generator=random))]
    sides = config.pixels * math.sqrt(aspect), config.pixels / math.sqrt(aspect)
    h, w = (max(1, round(side / 16)) * 16 for side in sides)
    return h, w


def _batch(pool: deque[synthetic.Sample], config: TrainConfig, random: torch.Generator) -> Batch:
    """Random frames of random scenes of the pool, as a camera would record them."""
    S = config.frames[int(torch.randint(len(config.frames), (), generator=random))]
    chosen = []
    for _ in range(config.batch * 4 // (S + 2)):
        scene = pool[int(torch.randint(len(pool), (), generator=random))]
        frames = torch.randperm(len(scene.pixels), generator=random)[:S]
        cameras = scene.cameras
        truth = (cameras.extrinsics, cameras.intrinsics, scene.depth, scene.valid)
        pixels = synthetic.photographed(random, scene.pixels[frames])
        chosen.append((pixels, *(x[frames] for x in truth)))
    pixels, *rest = (torch.stack(x) for x in zip(*chosen, strict=True))
    return Batch(pixels, losses.normalize(Truth(*rest))[0])


def train(config: TrainConfig, device: torch.device) -> Path:
    """Train mini and return the run folder; an existing one is continued.

    Writes checkpoint.pt (weights, their moving average, optimizer, step) every few minutes and at
    the end, and metrics.csv a line every 50 steps. A crash loses at most one interval.
    """
    torch.manual_seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "config.json").write_text(json.dumps(asdict(config), default=str, indent=1))
    network, step = Mini(MiniConfig()).to(device), 0
    teacher = Teacher(network.config).to(device)
    if config.init:
        network.load_state_dict({k: v.float() for k, v in load_file(config.init).items()})
    else:
        _start_encoder(network)
    # The local features stay as they are, which costs less and forgets nothing.
    network.aggregator.patch_embed.requires_grad_(False)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    optimizer = torch.optim.AdamW(
        _groups(network, teacher, config), config.learning_rate, betas=(0.9, 0.95)
    )
    parts: dict[str, Any] = {
        "network": network,
        "teacher": teacher,
        "average": average,
        "optimizer": optimizer,
    }
    checkpoint = config.out / "checkpoint.pt"
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        step = stored.pop("step")
        for name, part in parts.items():
            part.load_state_dict(stored[name])
    # An accelerator renders faster than it could be fed, in this process.
    workers = config.workers if device.type == "cpu" else 0
    loader = DataLoader(Scenes(config, step, device), batch_size=None, num_workers=workers)
    started = saved = time.monotonic()
    sums: dict[str, float] = {}
    for batch in loader:
        if step >= config.steps or time.monotonic() - started > config.minutes * 60:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, time.monotonic() - started, config)
        loss, terms = objective(network, teacher, batch, config.weights)
        optimizer.zero_grad()
        loss.backward()
        for part in (network.aggregator, network.camera_head, network.dense_head, teacher):
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        if loss.isfinite():
            optimizer.step()
            average.update_parameters(network)
        step += 1
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) / 50
        if step % 50 == 0:
            _log(config, step, (time.monotonic() - started) / 60, sums)
            sums = {}
        if time.monotonic() - saved > config.checkpoint_minutes * 60:
            _save(checkpoint, step, parts)
            saved = time.monotonic()
    _save(checkpoint, step, parts)
    return config.out


def _start_encoder(network: Mini) -> None:
    folder = store.bundled()
    assert folder is not None  # it comes with the tool
    start = load_file(folder / "encoder.safetensors")
    network.aggregator.patch_embed.load_state_dict({k: v.float() for k, v in start.items()})


def _groups(network: Mini, teacher: Teacher, config: TrainConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    every = [p for part in (network, teacher) for p in part.parameters() if p.requires_grad]
    matrices, others = [p for p in every if p.ndim > 1], [p for p in every if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _schedule(step: int, seconds: float, config: TrainConfig) -> float:
    """Share of the peak rate: linear warm-up, then a cosine over the steps or the time allowed."""
    done = min(1.0, max(step / config.steps, seconds / (config.minutes * 60)))
    return min(1.0, (step + 1) / config.warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def _log(config: TrainConfig, step: int, minutes: float, means: dict[str, float]) -> None:
    path = config.out / "metrics.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "minutes", *means])
        writer.writerow([step, f"{minutes:.2f}", *(f"{value:.5f}" for value in means.values())])
    left = config.minutes - minutes
    words = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
    log.info("step %d, %.0f min left: %s", step, left, words)


def _save(path: Path, step: int, parts: dict[str, Any]) -> None:
    draft = path.with_suffix(".new")
    torch.save({"step": step, **{k: part.state_dict() for k, part in parts.items()}}, draft)
    draft.replace(path)


def export(run: Path, target: Path) -> None:
    """Write the averaged weights of a run as float16 safetensors, with the network's numbers."""
    stored = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")["average"]
    prefix = "module."
    state = {
        k.removeprefix(prefix): v.half().contiguous()
        for k, v in stored.items()
        if k.startswith(prefix)
    }
    save_file(state, target, {"config": json.dumps(asdict(MiniConfig()))})
