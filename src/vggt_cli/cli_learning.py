"""`vggt train` and `vggt evaluate`: how mini was made, and how good a network is."""

from __future__ import annotations

import enum
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vggt_cli.errors import InputError, MemoryExceeded
from vggt_cli.terminal import Progress, speak

if TYPE_CHECKING:
    import torch


class Part(enum.StrEnum):
    """What stays as it is."""

    encoder = "encoder"
    aggregator = "aggregator"
    nothing = "nothing"


def train(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder; a run there goes on.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Name or file of weights to go on from; default: a fresh mini."),
    ] = None,
    scenes: Annotated[
        list[Path] | None,
        typer.Option(help="Scene of photos with depth, instead of rendered ones; repeatable."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Length of the run, which the learning rate follows.")
    ] = 6_000,
    max_minutes: Annotated[
        float, typer.Option(min=0, help="Stop and save after so many; the run can go on.")
    ] = math.inf,
    rate: Annotated[
        float | None,
        typer.Option(help="Highest learning rate; default: 5e-4, with --init 5e-5."),
    ] = None,
    frames: Annotated[
        tuple[int, int], typer.Option(min=2, help="Fewest and most frames of a sequence.")
    ] = (2, 4),
    batch_frames: Annotated[
        int, typer.Option(min=2, help="Frames of a batch, a process: of one or more sequences.")
    ] = 12,
    pixels: Annotated[
        int, typer.Option(min=64, help="Root of the images' area; VGGT: 518, Omega: 512 or 416.")
    ] = 128,
    near: Annotated[
        float, typer.Option(min=0, max=1, help="Spread of rendered cameras at first; later 1.")
    ] = 0.4,
    freeze: Annotated[
        list[Part] | None,
        typer.Option(help="Repeatable; default: mini's encoder, nothing of other networks."),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory, more time, the same result.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps; under torchrun each its own.")
    ] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that make batches; more than 1 only for --scenes.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of fresh weights and of what is drawn.")] = 0,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Does the loss fall? A minute; needs no other option.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Train a network on rendered scenes or on your own; print the file of its weights.

    OUT gets checkpoint.pt (every five minutes), metrics.csv, validation.csv, pictures/ and
    TensorBoard's curves; at the end NAME.safetensors, the moving average of the weights, which
    --model takes. Stopped by Ctrl-C, a crash or --max-minutes, the same command goes on where it
    stopped and ends with the same weights. Several GPUs:
    torchrun --nproc-per-node 4 -m vggt_cli train ...
    """
    speak(quiet, 0)
    from vggt_cli.device import choose, is_out_of_memory
    from vggt_cli.learning import train as learning
    from vggt_cli.learning.stream import Data

    where = choose(device)
    if smoke:
        _smoke(where, quiet)
        return
    if out is None:
        raise InputError("no run folder", hint="give --out RUN")
    data = Data(
        scenes=tuple(scenes or ()),
        frames=tuple(range(min(frames), max(frames) + 1)),
        batch_frames=batch_frames,
        pixels=pixels,
        near=near,
        seed=seed,
    )
    config = learning.TrainConfig(
        out,
        init=init,
        data=data,
        steps=steps,
        max_minutes=max_minutes,
        learning_rate=rate or (5e-4 if init is None else 5e-5),
        freeze=None if freeze is None else tuple(p for p in freeze if p is not Part.nothing),
        checkpointing=checkpointing,
        workers=workers,
    )
    try:
        with Progress(quiet) as progress:
            file = learning.train(config, where, progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExceeded(
            "out of memory in training",
            hint="--checkpointing, fewer --batch-frames, smaller --pixels or --freeze need less",
        ) from error
    if file:
        typer.echo(file)


def _smoke(device: torch.device, quiet: bool) -> None:
    from vggt_cli.learning import train as learning

    with tempfile.TemporaryDirectory() as folder, Progress(quiet) as progress:
        first, last = learning.smoke(Path(folder), device, progress)
    typer.echo(f"mean loss {first:.3f} of the first 15 steps, {last:.3f} of the last 15")
    if last >= first:
        typer.echo("error: the loss did not fall", err=True)
        raise typer.Exit(1)


def evaluate(
    model: Annotated[str, typer.Option(help="Name or file of weights.")] = "mini",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Errors of a network on the held-out rendered scenes, beside a constant prediction."""
    speak(quiet, 0)
    from vggt_cli.device import choose, compute_dtype
    from vggt_cli.learning.evaluate import evaluate as measure
    from vggt_cli.models import weights

    where = choose(device)
    network, _ = weights.load(model, where, compute_dtype(where))
    rows = measure(network)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items())
        typer.echo("  ".join(cells))
