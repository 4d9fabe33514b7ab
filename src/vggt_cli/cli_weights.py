"""`vggt weights`: which networks there are, which are here, and how to get the others."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vggt_cli.terminal import Json

if TYPE_CHECKING:
    from vggt_cli.models.catalog import Entry
    from vggt_cli.models.store import Progress

app = typer.Typer(no_args_is_help=True, help="Weights: list, fetch, import, verify.")
Name = Annotated[str, typer.Argument(help="As in `vggt weights list`.")]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Weights that are known: licence, size, and where they are on this machine."""
    from vggt_cli.models.catalog import CATALOG

    rows = [_facts(known) for known in CATALOG]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _print_table(rows)


@app.command()
def fetch(
    name: Name,
    offline: Annotated[bool, typer.Option("--offline", help="Only what is here already.")] = False,
) -> None:
    """Download weights from the Hugging Face hub, check them, print the path."""
    from vggt_cli.models import weights
    from vggt_cli.models.catalog import entry

    licence = entry(name).licence
    typer.echo(f"{licence.name}: forbids {licence.forbids}", err=True)
    if not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    with _progress("hashing") as progress:
        path = weights.fetch(name, offline, progress)
    typer.echo(path)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help=".safetensors, .pt or .pth, as published.")],
    name: Annotated[
        str | None, typer.Option("--as", help="Which weights it is, where several fit.")
    ] = None,
) -> None:
    """Copy a file of weights into the cache, record its sha256, print the path."""
    from vggt_cli.models import weights

    with _progress("copying") as progress:
        path = weights.import_file(file, name, progress)
    typer.echo(path)


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="One of them; without, all here.")] = None,
) -> None:
    """Hash weights anew and compare with what was recorded; print `sha256  name`."""
    from vggt_cli.models import weights
    from vggt_cli.models.catalog import CATALOG

    here = [known.name for known in CATALOG if weights.find(known.name)]
    for one in [name] if name else here:
        with _progress(one) as progress:
            digest = weights.verify(one, progress)
        typer.echo(f"{digest}  {one}")


@app.command()
def path(name: Name) -> None:
    """Print where the weights are."""
    from vggt_cli.models import weights

    typer.echo(weights.identify(name)[1])


def _facts(known: "Entry") -> dict[str, object]:
    from vggt_cli.models import store

    found = store.locate(known)
    return {
        "name": known.name,
        "bytes": found.path.stat().st_size if found else known.size,
        "licence": known.licence.name,
        "commercial": known.licence.commercial,
        "forbids": known.licence.forbids,
        "source": known.source or "comes with the tool",
        "gated": known.gated,
        "shape": known.shaping.mode,
        "resolution": known.shaping.resolution,
        "path": str(found.path) if found else None,
        "sha256": found.sha256 if found else None,
    }


def _print_table(rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "MB", "pixels", "commercial", "licence", "here"):
        right, wraps = column in {"MB", "pixels"}, column == "licence"
        table.add_column(column, justify="right" if right else "left", no_wrap=not wraps)
    for row in rows:
        table.add_row(
            str(row["name"]),
            f"{int(str(row['bytes'])) / 1e6:,.0f}",
            str(row["resolution"]),
            "yes" if row["commercial"] else "no",
            str(row["licence"]),
            "yes" if row["path"] else "no, gated" if row["gated"] else "no",
        )
    Console().print(table)


@contextmanager
def _progress(label: str) -> Iterator["Progress"]:
    """A bar on a terminal's stderr, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
