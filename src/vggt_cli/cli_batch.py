"""Commands that make many scenes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vggt_cli.errors import InputError
from vggt_cli.terminal import Device, Progress, Quiet, Verbose, speak

if TYPE_CHECKING:
    from vggt_cli.reconstruction.batch import How, Job

SOME_FAILED = 3


def batch(
    jobs: Annotated[
        str,
        typer.Argument(
            metavar="JOBS",
            help='JSON Lines, or - for stdin: {"input": "photos/a", "out": "scenes/a", ...}, with '
            'any option of reconstruct by its name, "refine": "none", "format": ["colmap-txt"].',
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Name of weights, a file, or auto; a job may have its own.")
    ] = "auto",
    device: Device = "auto",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Leave scenes of the same photos, weights and options; replace other ones.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace scenes, each once the new one is whole.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, each with its own network.")
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster that runs the jobs; local: one here."),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="i/n", help="Only that part of the jobs: for array jobs.")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Many scenes, one JSON line each on stdout as they end; a failure never stops the rest.

    Weights are loaded once a process. Safe to kill at any moment: a scene is whole or not there,
    and --resume goes on. Exit code 3 if some failed.
    """
    speak(quiet, verbose)
    from vggt_cli.reconstruction import batch as scenes
    from vggt_cli.reconstruction.settings import Options

    wanted = scenes.read_jobs(_lines(jobs), Options(model=model, device=device))
    if shard is not None:
        wanted = scenes.shard(wanted, shard)
    run(wanted, scenes.How(resume, overwrite, workers, ray), quiet, as_json=True)


def _lines(jobs: str) -> list[str]:
    try:
        text = sys.stdin.read() if jobs == "-" else Path(jobs).read_text(encoding="utf-8")
        return text.removeprefix("\ufeff").split("\n")  # JSON may hold what else ends a line
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"no jobs can be read: {jobs} ({error})") from error


def run(jobs: Sequence[Job], how: How, quiet: bool, as_json: bool) -> None:
    """Do the jobs; a line each on stdout, JSON or the folder. Exits with 3 if some failed."""
    from vggt_cli.reconstruction import batch as scenes

    failed = 0
    with Progress(quiet) as progress:
        for line in scenes.run(jobs, how, progress):
            failed += not line["ok"]
            if as_json:
                typer.echo(json.dumps(line))
            elif line["ok"]:
                typer.echo(line["out"])
            if not line["ok"]:
                typer.secho("failed: ", fg="red", nl=False, err=True)
                typer.echo(f"{line['input']}: {line['error']}", err=True)
    if failed:
        typer.echo(f"{failed} of {len(jobs)} scenes failed", err=True)
        raise typer.Exit(SOME_FAILED)


def one_each(sources: Sequence[str], out: Path) -> list[Path]:
    """A folder under `out` for each source, called as it is. InputError where two are alike."""
    folders = [out / (Path(source).name or Path(source).absolute().name) for source in sources]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise InputError(
                f"two inputs would write one scene: {folder}", "vggt batch takes a folder for each"
            )
    return folders
