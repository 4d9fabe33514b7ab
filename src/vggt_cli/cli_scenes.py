"""Commands on finished scenes."""

from __future__ import annotations

import enum
import json
import tempfile
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vggt_cli.errors import InputError
from vggt_cli.terminal import (
    Json,
    OverwriteOut,
    Progress,
    Quiet,
    ReportJson,
    Verbose,
    diagnosed,
    print_scene,
    speak,
)

if TYPE_CHECKING:
    from vggt_cli.learning.compare import Comparison

MODEL = "Scene folder or COLMAP model (binary or text)"


def compare(
    model: Annotated[Path, typer.Argument(metavar="A", help=f"{MODEL}.")],
    reference: Annotated[
        Path, typer.Argument(metavar="B", help=f"{MODEL} to measure against: its units are used.")
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cameras and points of model A against model B of the same photos.

    Photos are paired by file name. A scene's model is that in sparse/0/, sparse/ or reference/.
    Relative errors are of all pairs of photos; positions and points are compared after the
    similarity (turn, shift and scale) that brings A's optical centres closest to B's.
    """
    speak(quiet, 0)
    from vggt_cli.formats.colmap_read import locate, read
    from vggt_cli.learning.compare import compare as compared

    folders = locate(model), locate(reference)
    models = [read(folder) for folder in folders]
    found = compared(*models)
    paths = [str(folder.resolve()) for folder in folders]
    counts = [len(one.tracks.xyz) for one in models]
    if as_json:
        heads = {"model": paths[0], "reference": paths[1], "point_counts": counts}
        typer.echo(json.dumps(heads | asdict(found), indent=1))
        return
    for letter, path, photos, points in zip("AB", paths, found.photos[:2], counts, strict=True):
        typer.echo(f"{letter}: {path} ({photos} photos, {points:,} points)")
    _print_comparison(found)


def _print_comparison(found: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("A against B")
    table.add_column("", justify="right")
    table.add_column("")
    for row in _rows(found):
        table.add_row(*row, end_section=row[0] in ("AUC@30", "focal length", "farthest camera"))
    Console(width=120, highlight=False).print(table)  # a pipe has no width; cells are never cut


def _rows(found: Comparison) -> list[tuple[str, str, str]]:
    """Name, value and meaning of each figure."""
    both = found.photos[2]
    pairs = f"median of {both * (both - 1) // 2} pairs of {both} photos in both"
    rows = [
        ("rotation", f"{found.rotation:.3f}", f"degrees, {pairs}"),
        (
            "direction",
            f"{found.direction:.3f}",
            "degrees, median; of the way from one photo to another",
        ),
    ]
    for k, value in found.auc.items():
        share = (
            "percent of pairs within k degrees in both, mean over k" if k == min(found.auc) else ""
        )
        rows.append((f"AUC@{k}", f"{value:.1f}", share))
    rows.append(("focal length", f"{found.focal:.2%}", "median error"))
    if found.centers:
        c = found.centers
        of_extent = f"{c.ate / c.extent:.2%} of {c.extent:.4g}, the rms extent of B's cameras"
        rows += [
            ("scale", f"{c.scale:.4g}", "units of B in one of A"),
            ("ATE", f"{c.ate:.4g}", f"units of B, rms of centres; {of_extent}"),
            ("farthest camera", f"{c.worst:.4g}", f"units of B: {c.worst_photo}"),
        ]
    if found.points:
        p = found.points
        nearest = "units of B, mean distance to the nearest; median"
        rows += [
            ("points, A to B", f"{p.accuracy:.4g}", f"{nearest} {p.accuracy_median:.4g}"),
            ("points, B to A", f"{p.completeness:.4g}", f"{nearest} {p.completeness_median:.4g}"),
            ("chamfer", f"{p.chamfer:.4g}", "units of B, mean of both means"),
        ]
    return rows


class Method(enum.StrEnum):
    """What may correct the cameras."""

    auto = "auto"
    ba = "ba"
    sfm = "sfm"


def refine(
    scene: Annotated[Path, typer.Argument(metavar="SCENE", help=f"{MODEL} with its photos.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Scene folder to write; default: SCENE itself, if it is ours."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the photos of a COLMAP model; default: SCENE/images."),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="ba: bundle adjustment, sfm: anew from matches, auto: the best.")
    ] = Method.auto,
    overwrite: OverwriteOut = False,
    as_json: ReportJson = False,
    seed: Annotated[int, typer.Option(help="Of the tracks held out, and of what is drawn.")] = 0,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Correct the cameras of a finished scene by features of its photos at full size.

    Cameras change only where tracks held out from the work are explained better. A scene of vggt
    gets depth and points that follow, and is exchanged once the new one is whole. Any other COLMAP
    model is only read: --out says where the result goes.
    """
    speak(quiet, verbose)
    from vggt_cli.formats import export, scene_read, writers
    from vggt_cli.formats.claims import claimed
    from vggt_cli.models.store import home
    from vggt_cli.reconstruction import pipeline
    from vggt_cli.reconstruction.refine import RefineOptions

    ours = scene_read.is_ours(scene)
    if out is None and not ours:
        raise InputError(f"not a scene of this tool, so never written into: {scene}", "give --out")
    target = out or scene
    if out is None:
        export.refuse_strangers(scene)
    else:
        export.refuse_existing(out, overwrite)
    formats = scene_read.formats(scene) if ours else []
    writers.require(formats)
    with claimed(target, home() / "locks"), Progress(quiet) as progress:
        before = scene_read.read(scene) if ours else scene_read.read_foreign(scene, images)
        after = pipeline.refine(before, RefineOptions(method.value, seed), progress)
        unchanged = after.refinement is not None and after.refinement.method == "none"
        if out is not None or not unchanged:
            progress("write", 0, 0)
            html = not ours or (scene / "scene.html").is_file()
            export.write(after, target, formats, overwrite or out is None, html=html)
            diagnosed(after.findings, str(scene / "images"), target)
    print_scene(target, as_json)


class Format(enum.StrEnum):
    """What is written beside the binary COLMAP model."""

    colmap_txt = "colmap-txt"
    depth = "depth"
    nerfstudio = "nerfstudio"
    glb = "glb"
    mesh = "mesh"


def export(
    scene: Annotated[
        Path, typer.Argument(metavar="SCENE", help="Scene folder that this tool wrote.")
    ],
    formats: Annotated[
        list[Format], typer.Option("--format", "-f", help="May be given several times.")
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of these formats.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add further formats to a finished scene; no network runs. Prints what was written.

    colmap-txt: sparse/0/*.txt

    nerfstudio: transforms.json, camera-to-world with OpenGL axes

    depth: colmap_dense/ for COLMAP's stereo_fusion, inverse_depths/ with sparse/0/depth_params.json
    for 3DGS, depths/ for nerfstudio (thousandths of a unit)

    glb: scene.glb, points and cameras

    mesh: mesh.ply; needs open3d

    All of them are added, or none. Conventions: docs/formats.md.
    """
    speak(quiet, 0)
    from vggt_cli.formats import export as writing
    from vggt_cli.formats import scene_read, writers
    from vggt_cli.formats.claims import claimed
    from vggt_cli.models.store import home

    names = [name.value for name in formats]
    writers.require(names)
    if not scene_read.is_ours(scene):
        raise InputError(
            f"not a scene of this tool: {scene}", "vggt refine MODEL --out SCENE makes one of it"
        )
    with claimed(scene, home() / "locks"):
        written = writing.add(scene_read.read(scene), scene, names, overwrite)
    if as_json:
        typer.echo(json.dumps({"scene": str(scene.absolute()), "written": list(map(str, written))}))
    else:
        typer.echo("\n".join(map(str, written)))


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
