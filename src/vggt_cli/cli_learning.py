"""`vggt train` and `vggt evaluate`: how mini was made, and how good it is."""

from __future__ import annotations

import json
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
