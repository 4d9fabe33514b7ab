"""The main command."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from vggt_cli import cli_batch
from vggt_cli.cli_scenes import Format
from vggt_cli.terminal import (
    Device,
    OverwriteOut,
    Progress,
    Quiet,
    ReportJson,
    Verbose,
    diagnosed,
    print_plan,
    print_scene,
    speak,
)


class Camera(enum.StrEnum):
    """Which images share one camera."""

    auto = "auto"
    per_image = "per-image"
    shared = "shared"
    per_folder = "per-folder"


class Precision(enum.StrEnum):
    """Numbers of the network's matrix products."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Refine(enum.StrEnum):
    """What may correct the predicted cameras."""

    auto = "auto"
    none = "none"
    ba = "ba"
    sfm = "sfm"


def reconstruct(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Folder of photos or videos, a file, a glob pattern, or - for a list on stdin; "
            "of several, each becomes a scene.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Scene folder to write; of several, their parent.")
    ],
    model: Annotated[
        str,
        typer.Option(
            help="Name of weights (see vggt weights list), a file, or auto: the best here."
        ),
    ] = "auto",
    device: Device = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            help="Of the network's matrix products; auto: bfloat16 where the device multiplies it. "
            "int8, CPUs only: faster, less exact (docs/speed.md)."
        ),
    ] = Precision.auto,
    fewer_keys: Annotated[
        bool,
        typer.Option(
            "--fewer-keys",
            help="Late blocks read a sixteenth of the patches: of hundreds of photos at once much "
            "faster, less exact (docs/speed.md).",
        ),
    ] = False,
    points: Annotated[
        int, typer.Option(min=1, help="Most points in sparse/0; points.ply holds more.")
    ] = 200_000,
    confidence: Annotated[
        float, typer.Option(min=0, max=99.9, help="Percent of pixels, the least sure, to drop.")
    ] = 20.0,
    resolution: Annotated[
        int | None,
        typer.Option(min=16, help="Pixels; default: the size the weights were trained at."),
    ] = None,
    camera: Annotated[
        Camera,
        typer.Option(help="Which images share intrinsics; auto: equal size, EXIF camera, focal."),
    ] = Camera.auto,
    refine: Annotated[
        Refine,
        typer.Option(
            help="How photos at full size correct the cameras: ba: bundle adjustment, sfm: anew "
            "from matches; auto: what explains held-out tracks best, else the prediction."
        ),
    ] = Refine.auto,
    intrinsics: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|fx,fy,cx,cy",
            help="Known intrinsics in pixels of the photos, centres at +0.5: numbers, a COLMAP "
            "model, transforms.json, or text with lines NAME fx fy cx cy. They stay as they are.",
        ),
    ] = None,
    poses: Annotated[
        Path | None,
        typer.Option(
            help="Known poses, by file name: a COLMAP model (world-to-camera, OpenCV axes) or a "
            "transforms.json (camera-to-world, OpenGL axes). Refinement starts from them."
        ),
    ] = None,
    keep_poses: Annotated[
        bool, typer.Option("--keep-poses", help="Use --poses as they are, unrefined.")
    ] = False,
    scale_from: Annotated[
        str | None,
        typer.Option(
            metavar="A-B=1.5m|poses|gps",
            help="Metres: from the distance between two photos (m, cm, mm, km, ft, in), from "
            "--poses in metres, or from EXIF.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Photos that the network sees at once; more come in overlapping windows. "
            "Default: as many as memory and the network bear.",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="10GB",
            help="Memory to stay within (MB, GB, MiB, GiB): the GPU's, or this program's on the "
            "CPU. Default: most of what is free.",
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Folder of masks, white where photos count: NAME.png, STEM.png or NAME.mask.png. "
            "They go out with the scene."
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Keyframes a second of a video, sharp ones; default: by motion."
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Most keyframes of all videos; default: 200.")
    ] = None,
    format: Annotated[  # noqa: A002  the option's name
        list[Format] | None, typer.Option(help="Further files; may be given several times.")
    ] = None,
    save_tokens: Annotated[
        bool, typer.Option("--save-tokens", help="Write camera and register tokens: tokens.npz.")
    ] = False,
    no_html: Annotated[
        bool, typer.Option("--no-html", help="Leave out scene.html, the page that shows it.")
    ] = False,
    overwrite: OverwriteOut = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Leave a scene of the same photos, weights and options as it is."
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a photo or video that cannot be read.")
    ] = False,
    require_commercial: Annotated[
        bool, typer.Option("--require-commercial", help="Refuse weights without commercial use.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    as_json: ReportJson = False,
    seed: Annotated[int, typer.Option(help="Of the choice of pixels where there are many.")] = 0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done, memory and time; write nothing."),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Cameras, depth and points from photos or videos, as a COLMAP scene.

    Writes OUT/sparse/0 (world-to-camera, OpenCV axes, pixels of OUT/images), OUT/points.ply,
    OUT/depth, OUT/confidence, OUT/report.json and OUT/scene.html (vggt view shows it); prints OUT.
    The first image is the origin, the scale is arbitrary without --scale-from. For Gaussian
    splatting give the trainer OUT as it is (gsplat: --data-factor 1).
    """
    speak(quiet, verbose)
    from vggt_cli.formats import export, writers
    from vggt_cli.formats.claims import claimed
    from vggt_cli.models.store import home
    from vggt_cli.reconstruction import batch, pipeline, plan, settings

    options = settings.Options(
        model=model,
        device=device,
        precision=precision.value,
        fewer_keys=fewer_keys,
        points=points,
        confidence=confidence,
        resolution=resolution,
        camera=camera.value,
        refine=refine.value,
        intrinsics=intrinsics,
        poses=None if poses is None else str(poses),
        keep_poses=keep_poses,
        scale_from=scale_from,
        save_tokens=save_tokens,
        fps=fps,
        frames=frames,
        masks=None if masks is None else str(masks),
        window=window,
        max_memory=None if max_memory is None else plan.memory_of(max_memory),
        seed=seed,
        strict=strict,
        require_commercial=require_commercial,
        offline=offline,
    )
    formats = (*(name.value for name in format or []), *["tokens"] * save_tokens)
    writers.require(formats)
    if len(sources) > 1:
        folders = zip(sources, cli_batch.one_each(sources, out), strict=True)
        jobs = [batch.Job(s, folder, options, formats, not no_html) for s, folder in folders]
        return cli_batch.run(jobs, batch.How(resume, overwrite), quiet, as_json)
    (source,) = sources
    if dry_run:
        export.refuse_existing(out, overwrite or resume)
        print_plan({**pipeline.foresee(source, options), "out": str(out.absolute())}, as_json)
        return
    with claimed(out, home() / "locks"):
        job = batch.Job(source, out, options, formats, not no_html)
        if not (resume and batch.is_done(job)):
            export.refuse_existing(out, overwrite or resume)
            with Progress(quiet) as progress:
                scene = pipeline.reconstruct(source, options, progress)
                progress("write", 0, 0)
                export.write(scene, out, formats, overwrite or resume, html=not no_html)
                progress("write", 1, 1)
            diagnosed(scene.findings, source, out)
    print_scene(out, as_json)
