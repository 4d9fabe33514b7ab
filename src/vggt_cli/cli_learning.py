"""`vggt train` and `vggt evaluate`: how mini was made, and how good a network is."""

from __future__ import annotations

import enum
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
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
    depth_head = "depth-head"
    all_but_encoder = "all-but-encoder"
    all_but_depth_head = "all-but-depth-head"
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
    scenes: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[SCENE]...",
            help="Folders with images/ and a COLMAP model of them in reference/, sparse/0/ or "
            "sparse/; none: the held-out rendered scenes.",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Name or file of weights.")] = "mini",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    sift: Annotated[bool, typer.Option(help="Two-view SIFT, given the true intrinsics.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Errors of a network against known cameras, beside a constant prediction and SIFT.

    All photos of a scene are predicted together.
    """
    speak(quiet, 0)
    from vggt_cli.device import choose, compute_dtype
    from vggt_cli.learning import evaluate as learning
    from vggt_cli.learning.datasets import open_scene
    from vggt_cli.models import weights

    where, opened = choose(device), [open_scene(folder) for folder in scenes or ()]
    network, used = weights.load(model, where, compute_dtype(where))
    if opened:
        rows = learning.evaluate_photos(network, used.shaping, opened, sift)
    else:
        rows = learning.evaluate(network, None, sift, used.shaping)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _print_table(rows)


DECIMALS = {
    "scene": 0,
    "frames": 0,
    "prediction": 0,
    **{f"AUC@{k}": 1 for k in (5, 15, 30)},
    "rotation": 2,
    "direction": 2,
    "field of view": 2,
    "AbsRel": 3,
    "delta<1.25": 3,
}
NOTE = """AUC: percent. rotation, direction: degrees, medians of pairs. field of view: degrees.
AbsRel, delta: depth after aligning the medians of a set.
constant: one camera, one depth. SIFT: two views at a time, at most 1024 pixels, true intrinsics
given; a pair without a solution counts as 180 and 90 degrees."""


def _print_table(rows: Sequence[Mapping[str, float | str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in DECIMALS:
        words = name in ("scene", "prediction")
        table.add_column(name, justify="left" if words else "right", no_wrap=True)
    for i, row in enumerate(rows):
        cells = [
            f"{row[name]:.{places}f}" if isinstance(row.get(name), (int, float)) else row.get(name)
            for name, places in DECIMALS.items()
        ]
        last = rows[i + 1 : i + 2] and rows[i + 1]["prediction"] == "network"
        table.add_row(*(str(cell or "") for cell in cells), end_section=bool(last))
    console = Console(width=160, highlight=False)  # a pipe has none; cells are never cut
    console.print(table)
    console.print(NOTE)
