"""`vggt check`: arguments in, verdicts in words out."""

from __future__ import annotations

import enum
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vggt_cli.terminal import Json

if TYPE_CHECKING:
    from vggt_cli.formats.check import Verdict
    from vggt_cli.formats.check_files import Files


class Consumer(enum.StrEnum):
    """A program that reads COLMAP scenes."""

    colmap = "colmap"
    patch_match = "patch-match"
    fusion = "fusion"
    splats_3dgs = "3dgs"
    gsplat = "gsplat"
    nerfstudio = "nerfstudio"
    brush = "brush"
    openmvs = "openmvs"
    instant_ngp = "instant-ngp"


def check(
    scene: Annotated[
        Path,
        typer.Argument(help="Folder with images/ and a COLMAP model in sparse/0/ or sparse/."),
    ],
    consumers: Annotated[
        list[Consumer] | None,
        typer.Option("--for", help="Only this program; repeatable. Default: all of them."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What COLMAP, 3DGS, gsplat, nerfstudio, Brush, OpenMVS and instant-ngp do with a scene.

    Each is ok, ok with the commands shown, or broken, with the file and the rule. Works on scenes
    of this tool and on any COLMAP project, binary or text; reads, never writes. Exit code 1 if
    any of them is broken.
    """
    from vggt_cli.formats.check import LABELS, check
    from vggt_cli.formats.check_files import examine

    files = examine(scene)
    verdicts = check(files, [name.value for name in consumers or ()] or tuple(LABELS))
    if as_json:
        typer.echo(json.dumps(_as_json(files, verdicts), indent=1))
    else:
        _print_verdicts(files, verdicts)
    if any(verdict.verdict == "broken" for verdict in verdicts):
        raise typer.Exit(1)


def _as_json(files: Files, verdicts: list[Verdict]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "scene": str(files.folder.absolute()),
        "model": files.inside(files.model),
        "images": len(files.images),
        "cameras": len(files.used),
        "points": len(files.points.number),
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }


COLOURS = {"ok": "green", "ok with": "yellow", "broken": "red"}


def _print_verdicts(files: Files, verdicts: list[Verdict]) -> None:
    """A line for each program, why below it; then the commands, to be copied as they are."""
    from vggt_cli.formats.check import LABELS

    kinds = ", ".join(sorted({camera.model for camera in files.used.values()})) or "none"
    typer.echo(
        f"{files.inside(files.model)} ({files.kind}): {len(files.images)} images, "
        f"{len(files.points.number)} points, cameras {kinds}\n"
    )
    width = max(map(len, LABELS.values())) + 2
    for verdict in verdicts:
        typer.echo(LABELS[verdict.consumer].ljust(width), nl=False)
        typer.secho(verdict.verdict, fg=COLOURS[verdict.verdict])
        for found in verdict.findings:
            level = "note: " if found.level == "note" else ""
            typer.echo(f"{'':{width}}{level}{found} [{found.rule}]")
    if any(verdict.commands for verdict in verdicts):
        _print_commands(str(files.folder), verdicts)


def _print_commands(folder: str, verdicts: list[Verdict]) -> None:
    """As they are, but for a long name of the scene's folder, which becomes $S."""
    from vggt_cli.formats.check import LABELS

    width = max(map(len, LABELS.values())) + 2
    # One word, as `out`, is short enough, and may be a word of the commands too.
    short = "/" in folder and shlex.quote(folder) == folder
    typer.echo(f"\nCommands, with S={folder}" if short else "\nCommands")
    place = re.compile(rf"(?<=\s){re.escape(folder)}(?=[/\s]|$)")
    for verdict in verdicts:
        for i, command in enumerate(verdict.commands):
            label = "" if i else LABELS[verdict.consumer]
            typer.echo(label.ljust(width) + (place.sub("$S", command) if short else command))
