"""The command line: arguments in, one library call, words out.

Results go to stdout, everything else to stderr. torch is imported inside the commands.
"""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Annotated

import typer

from vggt_cli import (
    __version__,
    cli_batch,
    cli_check,
    cli_doctor,
    cli_learning,
    cli_reconstruct,
    cli_scenes,
)
from vggt_cli.cli_weights import app as weights_app
from vggt_cli.errors import VggtError
from vggt_cli.terminal import Verbosity

app = typer.Typer(
    name="vggt",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Photos in, scene out: cameras, depth and points from one feed-forward transformer.",
    epilog="Exit codes: 0 ok, 1 reconstruction failed, or check or doctor found a fault, "
    "2 usage, input or output, 3 some of several scenes failed, 4 weights or licence, "
    "5 out of memory, 70 internal error, 130 interrupted.",
)
app.add_typer(weights_app, name="weights")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vggt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Say it."),
    ] = False,
) -> None:
    pass


app.command()(cli_reconstruct.reconstruct)
app.command()(cli_batch.batch)
app.command()(cli_scenes.refine)
app.command()(cli_scenes.export)
app.command()(cli_check.check)
app.command()(cli_scenes.view)
app.command()(cli_scenes.compare)
app.command()(cli_doctor.doctor)
app.command()(cli_learning.train)
app.command()(cli_learning.evaluate)


def main() -> None:
    """Run the command line; errors become exit codes (see the epilog of --help)."""
    # A SystemExit from the handler unwinds everything: unfinished folders are removed on the way.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(_interrupted()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_interrupted()))
    try:
        app()
    except VggtError as error:
        _say(error)
        if Verbosity.traceback:
            traceback.print_exc()
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001  the last door: a bug keeps its traceback
        traceback.print_exc()
        typer.echo(
            f"error: internal: {type(error).__name__}; please report the lines above", err=True
        )
        sys.exit(70)


def _interrupted() -> int:
    typer.echo("interrupted", err=True)
    return 130


def _say(error: VggtError) -> None:
    typer.secho("error: ", fg="red", nl=False, err=True)
    typer.echo(str(error), err=True)
    if error.hint:
        typer.secho("hint: ", fg="cyan", nl=False, err=True)
        typer.echo(error.hint, err=True)
