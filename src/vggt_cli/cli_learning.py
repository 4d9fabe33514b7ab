"""`vggt train` and `vggt evaluate`: how mini was made, and how good a network is."""

from __future__ import annotations

import enum
import json
import math
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vggt_cli.errors import InputError, MemoryExceeded
from vggt_cli.terminal import Device, Json, Progress, Quiet, speak

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


class Protocol(enum.StrEnum):
    """Public data sets."""

    co3d = "co3d"
    re10k = "re10k"
    dtu = "dtu"
    eth3d = "eth3d"


class Method(enum.StrEnum):
    """Baselines that take time."""

    sfm = "sfm"


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
    quiet: Quiet = False,
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
            "sparse/; none: the held-out rendered scenes. With --protocol: the data set's folder.",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Name or file of weights.")] = "mini",
    protocol: Annotated[
        Protocol | None,
        typer.Option(
            help="The papers' protocol for CO3Dv2, RealEstate10K, DTU or ETH3D, in its own layout."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Most sequences of a category (or scenes, scans) of --protocol."),
    ] = None,
    device: Device = "auto",
    sift: Annotated[bool, typer.Option(help="Two-view SIFT, given the true intrinsics.")] = True,
    method: Annotated[
        list[Method] | None,
        typer.Option(
            help="A further row: sfm is SIFT and incremental mapping by pycolmap, on the photos "
            "at full size, without intrinsics."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Errors of a network against known cameras, beside a constant prediction and SIFT.

    All photos of a scene are predicted together.
    """
    speak(quiet, 0)
    baselines = (["sift"] if sift else []) + [way.value for way in method or ()]
    folders = scenes or []
    if protocol and len(folders) != 1:
        raise InputError(f"--protocol {protocol.value} needs one folder, that of the data set")
    if method and not folders:
        raise InputError("--method sfm needs photos", hint="give scenes: vggt evaluate SCENE...")
    from vggt_cli.device import choose, compute_dtype
    from vggt_cli.learning import evaluate as learning
    from vggt_cli.learning import public
    from vggt_cli.learning.datasets import open_scene
    from vggt_cli.models import weights

    where = choose(device)
    opened = [] if protocol else [open_scene(folder) for folder in folders]
    network, used = weights.load(model, where, compute_dtype(where))
    if protocol:
        trials = public.DATA_SETS[protocol.value](folders[0], limit)
        rows = learning.evaluate_trials(network, used.shaping, trials, baselines)
    elif opened:
        rows = learning.evaluate_photos(network, used.shaping, opened, baselines)
    else:
        rows = learning.evaluate(network, baselines=baselines, shaping=used.shaping)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _print_table(rows, protocol)


DECIMALS = {
    "scene": 0,
    "sets": 0,
    "frames": 0,
    "prediction": 0,
    **{f"AUC@{k}": 1 for k in (3, 5, 15, 30)},
    "rotation": 2,
    "direction": 2,
    "field of view": 2,
    "AbsRel": 3,
    "delta<1.25": 3,
    "accuracy": 3,
    "completeness": 3,
    "overall": 3,
    "registered": 0,
}
ALWAYS = ("scene", "frames", "prediction", "rotation", "direction", "field of view")
NOTES = {
    "AUC@3": "AUC: percent of pairs within k degrees in rotation and direction, mean over k.",
    "rotation": "rotation, direction: degrees, medians of pairs. field of view: degrees.",
    "AbsRel": "AbsRel, delta: depth after aligning the medians of a set.",
    "accuracy": "accuracy, completeness, overall: mean distances of predicted to true points, "
    "back, and their mean; in the data set's unit.",
    "constant": "constant: one camera, one depth.",
    "SIFT": "SIFT: two views at a time, at most 1024 pixels, true intrinsics given; a pair without "
    "a solution counts as 180 and 90 degrees.",
    "SfM": "SfM: pycolmap's SIFT and incremental mapping of all photos at full size, no intrinsics "
    "given. registered: percent of photos; a pair with another counts as 180 and 90 degrees.",
}
OWN_FRAMES = """Frames and sequences are our own choice, the same on every machine (see
docs/training.md); the authors' lists are not public: compare with rows made by this command, not
with published tables."""
ALL_FRAMES = """All 49 views. Points are aligned by the cameras' centres; how the authors aligned
theirs is not public: compare with rows made by this command, not with published tables."""


def _print_table(rows: Sequence[Mapping[str, float | str]], protocol: Protocol | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = [name for name in DECIMALS if name in ALWAYS or any(name in row for row in rows)]
    for name in columns:
        words = name in ("scene", "prediction")
        table.add_column(name, justify="left" if words else "right", no_wrap=True)
    for i, row in enumerate(rows):
        cells = [
            f"{row[name]:.{DECIMALS[name]}f}"
            if isinstance(row.get(name), (int, float))
            else row.get(name)
            for name in columns
        ]
        last = rows[i + 1 : i + 2] and rows[i + 1]["prediction"] == "network"
        table.add_row(*(str(cell or "") for cell in cells), end_section=bool(last))
    console = Console(width=180, highlight=False)  # a pipe has none; cells are never cut
    console.print(table)
    there = {*columns, *(row["prediction"] for row in rows)}
    for name, note in NOTES.items():
        if name in there:
            console.print(textwrap.fill(note, 100))
    if protocol:
        console.print(ALL_FRAMES if protocol is Protocol.dtu else OWN_FRAMES)
