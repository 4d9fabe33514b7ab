"""The training of any network: one loop, read top to bottom.

Plain torch, one process a device; torchrun starts several, which share their gradients.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import logging
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vggt_cli.device import anywhere, attention_kernels, processes
from vggt_cli.errors import OutputError
from vggt_cli.learning import resume
from vggt_cli.learning.journal import Journal
from vggt_cli.learning.objectives import Batch, Teacher, Weights, objective, weights_of
from vggt_cli.learning.stream import Data, Stream, batches, seed_of
from vggt_cli.models import store
from vggt_cli.models import weights as known_weights
from vggt_cli.models.layers import Block
from vggt_cli.models.mini import Mini, MiniConfig
from vggt_cli.models.networks import Network
from vggt_cli.reconstruction.stages import Progress, silent

log = logging.getLogger(__name__)

PARTS = {  # that can be frozen, or learn alone: modules, where the network has them
    "encoder": ("aggregator.patch_embed",),
    "aggregator": ("aggregator",),
    "depth-head": ("depth_head", "dense_head", "match_head"),
}
REST = "all-but-"
HEADS = ("point", "track", "text")  # all are loaded, so that the file at the end has them
# What a run may change where it goes on, because no number of the result depends on it.
FREE = {"out", "max_minutes", "checkpointing", "save_minutes", "look_steps", "workers"}


@dataclass(frozen=True)
class TrainConfig:
    """Every number of a run."""

    out: Path  # run folder
    init: str | None = None  # name or file of weights to go on from; None: a fresh mini
    data: Data = field(default_factory=Data)
    steps: int = 6_000  # length of the run, which the learning rate follows
    max_minutes: float = math.inf  # stop earlier; the run can go on
    learning_rate: float = 5e-4  # at its highest; the patch encoder's is a tenth of it
    warm_up: float = 0.05  # share of the steps
    weight_decay: float = 0.02
    weights: Weights | None = None  # of the terms; None: as the network was trained
    freeze: tuple[str, ...] | None = None  # of PARTS; None: mini's encoder, nothing of others
    checkpointing: bool = False  # less memory, more time, the same numbers
    save_minutes: float = 5.0  # between checkpoints
    log_steps: int = 50  # between rows of metrics.csv, which are means
    look_steps: int = 500  # between looks at held-out scenes
    workers: int = 1  # processes that make batches on the CPU; 0: this one does


class Objective(nn.Module):
    """Network and teacher as one module that returns the loss: what torch can share out."""

    def __init__(self, network: Network, teacher: Teacher, weights: Weights) -> None:
        super().__init__()
        self.network, self.teacher, self.weights = network, teacher, weights

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return objective(self.network, self.teacher, batch, self.weights, progress)


def train(config: TrainConfig, device: torch.device, progress: Progress = silent) -> Path | None:
    """Train, and return the file of averaged weights; None in all processes but the first.

    config.out gets checkpoint.pt, metrics.csv, validation.csv, pictures, TensorBoard's curves,
    config.json and at the end the weights under their name. A run that is there goes on, with the
    losses that it would have had without a stop. SIGINT and SIGTERM act once a step is saved.
    Raises InputError if the folder holds another run, OutputError if it cannot be written.
    """
    with _held_back() as signals, processes(device) as (here, rank, count):
        torch.manual_seed(config.data.seed)
        name, network = _network(config.init, here)
        teacher = Teacher(network.config).to(here)
        freeze(network, config.freeze)
        average = copy.deepcopy(network).eval().requires_grad_(False)
        if config.checkpointing:
            recompute(network.aggregator)
        optimizer = torch.optim.AdamW(groups(network, teacher, config), betas=(0.9, 0.95))
        numbers = _numbers(config, network, count)
        saved = resume.load(config.out / "checkpoint.pt", numbers)
        step: int = saved.pop("step", 0)
        minutes: float = saved.pop("minutes", 0.0)
        sums: dict[str, Tensor] = saved.pop("sums", {})
        parts: dict[str, Any] = {
            "network": network,
            "teacher": teacher,
            "average": average,
            "optimizer": optimizer,
        }
        for key in saved:
            parts[key].load_state_dict(saved[key])
        saved.clear()
        model: nn.Module = Objective(network, teacher, config.weights or weights_of(network))
        if count > 1:  # unused: a mask token, and heads that the objective does not ask
            model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        # An accelerator renders in this process, faster than it could be fed.
        on_cpu = here.type == "cpu" or bool(config.data.scenes)
        maker = torch.device("cpu") if on_cpu else here
        tracks = not isinstance(network, Mini)
        stream = Stream(config.data, network.config.patch_size, maker, rank, count, tracks)
        loader = batches(stream, range(step, config.steps), config.workers if on_cpu else 0)
        journal = _open(config, step, numbers) if rank == 0 else None
        first, began = step, time.monotonic()
        kept, stop = began, False
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * config.learning_rate * schedule(step, config)
            torch.manual_seed(seed_of(config.data.seed, step, rank))
            loss, terms = model(batch.to(here), step / config.steps)
            optimizer.zero_grad()
            loss.backward()
            norms = [
                nn.utils.clip_grad_norm_(part.parameters(), 1.0)
                for part in (*network.children(), teacher)
            ]
            if torch.stack(norms).isfinite().all():  # the same in all processes
                optimizer.step()
                follow(average, network, step)
            step += 1
            for term, value in terms.items():
                sums[term] = value.float() + sums.get(term, 0.0)
            now = time.monotonic()
            spent = (now - began) / 60
            stop = anywhere(bool(signals) or spent > config.max_minutes, here)
            if step % config.log_steps == 0:
                means = {term: float(value) / config.log_steps for term, value in sums.items()}
                sums = {}
                if journal:
                    journal.write("metrics", step, {"minutes": minutes + spent} | means)
                    _tell(config, step, means, spent / (step - first))
            if journal:
                progress("train", step, config.steps)
                if step % config.look_steps == 0 or step == config.steps:
                    journal.look(average, step, max(config.data.frames), stream.size(0))
                if stop or step == config.steps or now - kept > config.save_minutes * 60:
                    state = {key: part.state_dict() for key, part in parts.items()}
                    state |= {"step": step, "minutes": minutes + spent, "sums": sums}
                    resume.save(config.out / "checkpoint.pt", numbers, state)
                    kept = now
            if stop:
                break
        if journal:
            journal.close()
        if journal and step < config.steps:
            log.info("stopped after step %d of %d; the same command goes on", step, config.steps)
        if rank != 0 or signals:
            return None
        return export(average, name, config.out / f"{name}.safetensors")


@contextlib.contextmanager
def _held_back() -> Iterator[list[int]]:
    """The signals that ask the run to end, as they come; they act when the block has ended.

    The second of a kind acts at once.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # only the main thread may have handlers
        return
    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def _network(init: str | None, device: torch.device) -> tuple[str, Network]:
    """The name of the weights to start from, and their network in float32."""
    if init is not None:
        network, used = known_weights.load(init, device, torch.float32, HEADS)
        return used.name, network
    fresh = Mini(MiniConfig())
    folder = store.bundled()
    assert folder is not None  # it comes with the tool
    start = load_file(folder / "encoder.safetensors")
    state = {k: v.float() for k, v in start.items()}
    fresh.aggregator.patch_embed.load_state_dict(state, strict=False)  # XFeat knows no colours
    return "mini", fresh.to(device)


def freeze(network: Network, names: tuple[str, ...] | None = None) -> None:
    """Sets everything to be trained but the parts of those names; without, but mini's encoder.

    mini's encoder learns alone, before the rest, and its depth head last: that costs less, and
    matches decide the rest. With REST before its name a part learns alone.
    """
    network.train().requires_grad_(True)
    if names is None:
        names = ("encoder",) if isinstance(network, Mini) else ()
    for name in names:
        alone = name.startswith(REST)
        if alone:
            network.eval().requires_grad_(False)
        for part in parts_of(network, name.removeprefix(REST)):
            part.train(alone).requires_grad_(alone)


def parts_of(network: Network, name: str) -> list[nn.Module]:
    """The modules of a name of PARTS."""
    modules = dict(network.named_modules())
    return [modules[part] for part in PARTS[name] if part in modules]


def groups(network: Network, teacher: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: patch encoder at a tenth of the rate, decay for matrices only."""
    encoder = {id(p) for p in network.aggregator.patch_embed.parameters()}
    found = defaultdict(list)
    for p in (*network.parameters(), *teacher.parameters()):
        if p.requires_grad:
            decay = config.weight_decay if p.ndim > 1 else 0.0
            found[0.1 if id(p) in encoder else 1.0, decay].append(p)
    return [
        {"params": found[share, decay], "share": share, "weight_decay": decay}
        for share, decay in found
    ]


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the highest rate: linear warm-up, times a cosine that falls to 0.02."""
    rise = min(1.0, (step + 1) / max(1.0, config.warm_up * config.steps))
    return rise * (0.02 + 0.49 * (1 + math.cos(math.pi * step / config.steps)))


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, step: int) -> None:
    """Moves `average` towards `network`: by a thousandth, by more in the first steps."""
    share = 1 - min(0.999, (1 + step) / (10 + step))
    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, share)


def recompute(aggregator: nn.Module) -> None:
    """Lets `aggregator` keep what goes into each block; what is inside is computed once more."""
    for block in aggregator.modules():
        if isinstance(block, Block):
            # The second time attention has to take the kernels of the first.
            again = partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=_same_kernels
            )
            block.forward = again  # type: ignore[method-assign]


def _same_kernels() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return contextlib.nullcontext(), attention_kernels()


def _numbers(config: TrainConfig, network: Network, processes: int) -> dict[str, Any]:
    """All that has to be the same where a run goes on, by name."""
    whole = asdict(config) | {"network": asdict(network.config), "processes": processes}
    flat: dict[str, Any] = {}
    for key, value in whole.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key} {k}".strip(): v for k, v in inner.items() if key not in FREE}
    numbers: dict[str, Any] = json.loads(json.dumps(flat, default=str))
    return numbers


def _open(config: TrainConfig, step: int, numbers: Mapping[str, Any]) -> Journal:
    """The run folder, with config.json."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "config.json").write_text(json.dumps(numbers, indent=1) + "\n")
        return Journal(config.out, step)
    except OSError as error:
        raise OutputError(
            f"cannot write: {config.out} ({error.strerror})", hint="choose another --out"
        ) from error


def _tell(config: TrainConfig, step: int, means: Mapping[str, float], pace: float) -> None:
    """One line of words; `pace` in minutes a step."""
    words = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
    left = (config.steps - step) * pace
    log.info("step %d of %d, %.0f min left: %s", step, config.steps, left, words)


def export(network: Network, name: str, path: Path) -> Path:
    """The file `path` with the weights of `network`, its numbers, and the weights' name.

    mini's are float16, others stay float32, as they were published.
    """
    dtype = torch.float16 if isinstance(network, Mini) else torch.float32
    state = {k: v.to("cpu", dtype).contiguous() for k, v in network.state_dict().items()}
    numbers = asdict(network.config)
    numbers.pop("tracker", None)  # nested, and the same in all that is published
    draft = path.with_suffix(".new")
    save_file(state, draft, {"config": json.dumps(numbers), "weights": name})
    draft.replace(path)
    return path


def smoke(folder: Path, device: torch.device, progress: Progress = silent) -> tuple[float, float]:
    """Mean loss of the first and of the last steps of a short training on eight small scenes."""
    data = Data(frames=(2,), batch_frames=8, pixels=64, aspects=(1.0,), rendered=8)
    train(TrainConfig(folder, data=data, steps=60, log_steps=15, look_steps=60), device, progress)
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return losses[0], losses[-1]
