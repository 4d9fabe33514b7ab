"""Commands on finished scenes."""

from __future__ import annotations

import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer


def view(
    scene: Annotated[
        Path,
        typer.Argument(metavar="SCENE", help="Scene folder, or COLMAP model (binary or text)."),
    ],
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Only print the page's path, for scripts.")
    ] = False,
) -> None:
    """The scene in a browser: points, cameras, confidence. Works offline.

    Opens SCENE/scene.html and prints its path. A scene without that page, one of COLMAP's own for
    example, is shown by a page in a temporary folder; nothing is written into SCENE.
    """
    page = scene.absolute() / "scene.html"
    if not page.is_file():
        page = _page_of_model(scene.absolute())
    typer.echo(page)
    if not no_open and not webbrowser.open(page.as_uri()):
        typer.echo("no browser found here: open the page by hand", err=True)


def _page_of_model(scene: Path) -> Path:
    from vggt_cli.formats import colmap_read, page

    model = colmap_read.read(colmap_read.locate(scene))
    path = Path(tempfile.mkdtemp(prefix="vggt-view-")) / "scene.html"
    page.write(page.of_model(model, scene.name), path)
    return path
