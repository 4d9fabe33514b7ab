"""How the command line speaks: the log and the progress, both on stderr."""

from __future__ import annotations

import json
import logging
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vggt_cli.scene import Finding

log = logging.getLogger(__name__)

# Options that mean the same in several commands.
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="More words; -vv: tracebacks.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
ReportJson = Annotated[bool, typer.Option("--json", help="Print the report, not just the folder.")]
OverwriteOut = Annotated[
    bool, typer.Option("--overwrite", help="Replace a scene at --out, once the new is whole.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]


class Progress:
    """Bars on a terminal; elsewhere one line a stage; nothing with --quiet."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self.bars = None
        self.quiet = quiet
        self.tasks: dict[str, Any] = {}
        if console.is_terminal and not quiet:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self.bars = Progress(*columns, *times, console=console)

    def __enter__(self) -> Progress:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bars:
            self.bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        first = stage not in self.tasks
        if self.bars is None:
            self.tasks[stage] = True
            if first and not self.quiet:
                typer.echo(stage, err=True)
            return
        if first:
            self.tasks[stage] = self.bars.add_task(stage, total=None)
        self.bars.update(self.tasks[stage], completed=done, total=total or None)


def speak(quiet: bool, verbose: int) -> None:
    """Send the library's log to stderr: with -q errors, by default what matters, with -v all."""
    handler = _Stderr()
    handler.setFormatter(_Words())
    logger = logging.getLogger("vggt_cli")
    logger.handlers = [handler]
    logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    # Pillow's words on damaged EXIF name no photo, and the photo is read all the same.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    if verbose > 1:
        Verbosity.traceback = True


class Verbosity:
    """Whether an error shows where it came from: -vv."""

    traceback = False


class _Stderr(logging.Handler):
    """Writes to what is stderr at that moment: above the bars, where there are some."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


class _Words(logging.Formatter):
    """`warning: text` from warnings on; plain text below."""

    def format(self, record: logging.LogRecord) -> str:
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return kind + record.getMessage()


def words(findings: Sequence[Finding], photos: str, scene: str) -> list[str]:
    """The findings, and below each what to do, for people; the folders are put into commands."""
    lines = []
    for finding in findings:
        action = finding.command
        for name, folder in (("PHOTOS", photos), ("SCENE", scene)):
            action = action.replace(name, shlex.quote(folder))
        lines += [f"{finding.kind}: {finding.words}", f"  -> {action}"]
    return lines


def diagnosed(findings: Sequence[Finding], photos: str, scene: Path) -> None:
    """Say what was found, through the log: warnings, and what to do below each."""
    for line in words(findings, photos, str(scene)):
        log.log(logging.INFO if line.startswith(" ") else logging.WARNING, "%s", line)


def print_scene(folder: Path, as_json: bool) -> None:
    """The result on stdout: the scene's folder, or its report with it."""
    if as_json:
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        typer.echo(json.dumps({"scene": str(folder.absolute()), **content}))
    else:
        typer.echo(folder)


def print_plan(plan: dict[str, Any], as_json: bool) -> None:
    """What would be done, on stdout."""
    if as_json:
        typer.echo(json.dumps(plan))
        return
    for key, value in plan.items():
        words = value
        if key == "peak_memory_bytes":
            key, words = "peak_memory", f"{value / 1e9:.2f} GB"
        elif isinstance(value, dict):
            words = ", ".join(f"{name} {amount}" for name, amount in value.items())
        elif isinstance(value, list):
            words = ", ".join(str(one) for one in value)
        typer.echo(f"{key.replace('_', ' ')}: {words}")
