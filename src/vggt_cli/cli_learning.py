"""`vggt train` and `vggt evaluate`: how mini was made, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from vggt_cli.terminal import speak


def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; one there goes on.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Stop after so many.")] = 60.0,
    init: Annotated[Path | None, typer.Option(help="Weights of mini to go on from.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    pixels: Annotated[int, typer.Option(min=64, help="Root of the images' area.")] = 128,
    near: Annotated[float, typer.Option(min=0, max=1, help="Spread of cameras at first.")] = 0.4,
    rate: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Of weights and scenes.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Train mini on rendered scenes; writes OUT/mini.safetensors at the end and prints it.

    A stopped run goes on from its last checkpoint, at most five minutes old.
    """
    speak(quiet, 0)
    from vggt_cli.device import choose
    from vggt_cli.learning import train as learning

    config = learning.TrainConfig(
        out,
        init=init,
        minutes=minutes,
        pixels=pixels,
        near=near,
        learning_rate=rate,
        seed=seed,
    )
    run = learning.train(config, choose(device))
    learning.export(run, run / "mini.safetensors")
    typer.echo(run / "mini.safetensors")


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
        rows = learning.evaluate(network, with_sift=sift)
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
