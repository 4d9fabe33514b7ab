"""A finished scene as files: one folder, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from vggt_cli import __version__
from vggt_cli.device import one_thread_each
from vggt_cli.errors import OutputError
from vggt_cli.formats import colmap, page, points, writers
from vggt_cli.formats.copies import Lens, clone, mask_copy, straight_copy, upright_copy
from vggt_cli.formats.depth_maps import COMPRESSION
from vggt_cli.formats.files import RARE_SUFFIXES
from vggt_cli.formats.images import frame_of
from vggt_cli.formats.writers import PLACES
from vggt_cli.geometry import resize
from vggt_cli.scene import Frame, Scene

REPORT_SCHEMA = 1
OURS = {
    *("images", "masks", "sparse", "points.ply", "confidence", "depth"),
    *("report.json", "scene.html"),
    *(place.split("/")[0] for places in PLACES.values() for place in places),
}
UNWELCOME = r"[\s.\x00-\x1f\x7f\ud800-\udfff\\:*?\"<>|]"  # in names of files, somewhere


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise OutputError where `folder` could not be written later: before the work, not after."""
    if folder.exists() and not overwrite:
        raise OutputError(f"output exists: {folder}", hint="use --overwrite to replace it")
    if folder.exists() and not (folder / "report.json").is_file() and any(_entries(folder)):
        raise OutputError(
            f"not a scene of this tool, so not overwritten: {folder}", hint="choose another --out"
        )
    parent = _existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write into: {parent}", hint="choose another --out")


def refuse_strangers(folder: Path) -> None:
    """Raise OutputError where `folder` holds what a new scene in its place would not."""
    names = {path.name for path in _entries(folder) if not path.name.startswith(writers.DRAFT)}
    strangers = sorted(names - OURS)
    if strangers:
        raise OutputError(
            f"files that are not ours would be lost: {folder}: {', '.join(strangers[:5])}",
            hint="move them, or give --out",
        )


def add(scene: Scene, folder: Path, formats: Sequence[str], overwrite: bool = False) -> list[Path]:
    """Add `formats` to a finished scene that was read from `folder`; returns what was written.

    All of them or none. Raises OutputError where one is there already, without `overwrite`.
    """
    model = as_colmap(scene, [photo.path.name for photo in scene.photos])
    return writers.add(scene, model, folder, formats, overwrite)


def _entries(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise OutputError(f"not a folder: {folder}", hint="choose another --out")
    return folder.iterdir()


def _existing_parent(folder: Path) -> Path:
    return next(p for p in folder.absolute().parents if p.exists())


def write(
    scene: Scene,
    folder: Path,
    formats: Sequence[str] = (),
    overwrite: bool = False,
    html: bool = True,
) -> None:
    """The scene folder: COLMAP model, points.ply, maps, report.json and `formats`.

    With `html` also scene.html, the page that shows it.

    Written to a sibling that takes the folder's name at the end; nothing is left on failure.
    Raises OutputError if the folder exists without `overwrite`, or cannot be written.
    """
    refuse_existing(folder, overwrite)
    with _becoming(folder) as draft:
        files = output_names([photo.name for photo in scene.photos])
        model = as_colmap(scene, files)
        _write_images(scene, model, draft / "images")
        _write_masks(scene, model, draft / "masks")
        colmap.write(model, draft / "sparse" / "0")
        if scene.dense is not None:
            points.write_cloud(scene.dense, draft / "points.ply")
            _write_confidence(scene, files, draft / "confidence")
            _write_depth(scene, files, draft / "depth")
        writers.write(scene, model, draft, formats)
        if html:
            page.write(as_page(scene, model, folder.absolute().name), draft / "scene.html")
        content = report(scene, model)
        (draft / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _becoming(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that replaces it if the block ends well; a link stays one."""
    with writers.said(folder, "choose another --out"):
        folder = folder.resolve()
        parent = folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
        try:
            draft.chmod(0o755)  # mkdtemp makes it private
            yield draft
            if folder.exists():
                old = draft.with_name(draft.name + ".old")
                folder.rename(old)
                draft.rename(folder)
                shutil.rmtree(old)
            else:
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def output_names(names: Sequence[str]) -> list[str]:
    """File names in images/: flat, one dot each, no spaces, stems unique without regard to case.

    Readers of COLMAP models take the base name, cut at the first dot, or split at spaces; no disk
    refuses what is left. Photos of rare kinds become JPEG.
    """
    taken: set[str] = set()
    result = []
    for name in names:
        path = PurePosixPath(name.replace("/", "__"))
        stem, ending = (re.sub(UNWELCOME, "_", part) for part in (path.stem, path.suffix[1:]))
        if path.suffix.lower() in RARE_SUFFIXES:
            ending = "jpg"
        free, n = stem, 2
        while free.casefold() in taken:
            free, n = f"{stem}_{n}", n + 1
        taken.add(free.casefold())
        result.append(f"{free}.{ending}" if ending else free)
    return result


def _write_images(scene: Scene, model: colmap.Model, folder: Path) -> None:
    folder.mkdir()
    for i, (photo, file) in enumerate(zip(scene.photos, model.names, strict=True)):
        lens = _lens(scene, model, i)
        if lens is not None:
            straight_copy(photo, folder / file, lens)
        elif photo.rewritten:
            upright_copy(photo, folder / file)
        else:
            clone(photo.path, folder / file)


def _write_masks(scene: Scene, model: colmap.Model, folder: Path) -> None:
    """NAME.png for COLMAP and Brush, STEM.png for nerfstudio, which then wants one per photo."""
    if not any(photo.mask or photo.transparent for photo in scene.photos):
        return
    folder.mkdir()
    for i, (photo, file) in enumerate(zip(scene.photos, model.names, strict=True)):
        mask = folder / f"{file}.png"
        mask_copy(photo, mask, _lens(scene, model, i))
        clone(mask, folder / f"{Path(file).stem}.png")


def _lens(scene: Scene, model: colmap.Model, frame: int) -> Lens | None:
    """What the photo is straightened by; None: it was taken through no lens that bends."""
    if scene.refinement is None or not bool(scene.refinement.lens.radial[frame] != 0):
        return None
    lens = scene.refinement.lens
    return lens.cameras.intrinsics[frame], lens.radial[frame], model.cameras.intrinsics[frame]


def as_colmap(scene: Scene, files: Sequence[str]) -> colmap.Model:
    """The COLMAP model of a scene in pixels of its files, which are the upright sources."""
    images = scene.images
    cameras = resize(scene.prediction.cameras, images.source_from_network, images.source_size)
    return colmap.Model(
        tuple(files), cameras, scene.camera_of_image, scene.tracks, scene.rgb.numpy()
    )


def as_page(scene: Scene, model: colmap.Model, title: str) -> page.Page:
    """The page of a scene: its densest cloud, and the cameras under the names of their files."""
    cloud, done = scene.dense, scene.refinement
    before = done.predicted if done and done.method != "none" else None
    if cloud is None:
        xyz, rgb, confidence = scene.tracks.xyz, scene.rgb, None
    else:
        xyz, rgb, confidence = cloud.xyz, cloud.rgb, cloud.confidence
    return page.Page(title, model.names, model.cameras, xyz, rgb, confidence, before)


def _write_confidence(scene: Scene, files: Sequence[str], folder: Path) -> None:
    """Per frame NAME.npy, float16 at network size without padding, and NAME.png to look at."""
    folder.mkdir()
    values = scene.prediction.confidence.flatten()
    some = values[:: max(1, len(values) // 1_000_000)].float().log()
    low, high = torch.quantile(some, torch.tensor([0.02, 0.98])).tolist()

    def write_one(frame: int, file: str) -> None:
        rows, columns = frame_of(scene.images, frame)
        confidence = scene.prediction.confidence[frame, rows, columns]
        largest = torch.finfo(torch.float16).max
        np.save(folder / f"{file}.npy", confidence.clamp(max=largest).half().numpy())
        gray = (confidence.float().log() - low) / max(high - low, 1e-6)
        pixels = (gray.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{file}.png", compress_level=COMPRESSION)

    with one_thread_each() as pool:
        list(pool.map(write_one, range(len(files)), files))


def _write_depth(scene: Scene, files: Sequence[str], folder: Path) -> None:
    """Per frame NAME.npy: z-depth in scene units, float16, in the pixels of confidence/."""
    folder.mkdir()
    for frame, file in enumerate(files):
        rows, columns = frame_of(scene.images, frame)
        depth = scene.prediction.depth[frame, rows, columns]
        largest = torch.finfo(torch.float16).max
        np.save(folder / f"{file}.npy", depth.clamp(max=largest).half().numpy())


def report(scene: Scene, model: colmap.Model) -> dict[str, Any]:
    """report.json: everything a script or a later reader wants to know, in plain types."""
    made_by, tracks = asdict(scene.made_by), model.tracks
    length = torch.bincount(tracks.point, minlength=len(tracks.xyz))
    return {
        "schema": REPORT_SCHEMA,
        "tool": {"name": "vggt", "version": __version__},
        "versions": _versions(),
        "model": {k: made_by[k] for k in ("model", "sha256", "licence", "commercial")},
        **{k: made_by[k] for k in ("device", "dtype", "options", "seconds")},
        "peak_memory_bytes": made_by["peak_memory"],
        "content": made_by["content"],
        "conventions": {
            "extrinsics": "world-to-camera, OpenCV axes (x right, y down, z forward)",
            "pixels": "of the files in images/, centre of the top-left pixel at (0.5, 0.5)",
            "world": "the first image's camera is the origin",
        },
        "scale": scene.scale,
        "priors": dict(scene.priors),
        "windows": dict(scene.windows) or None,
        "tracks": scene.seen_in,
        "refinement": None if scene.refinement is None else dict(scene.refinement.report),
        "points": {
            "sparse": len(tracks.xyz),
            "dense": 0 if scene.dense is None else len(scene.dense),
            "seen_by_two_or_more": float((length >= 2).float().mean()),
            "mean_track_length": float(length.float().mean()),
            "mean_error_pixels": float(model.point_errors().mean()),
        },
        "images": [_image_report(scene, model, frame) for frame in range(len(model.names))],
        "left_out": [{"name": name, "reason": why} for name, why in scene.unreadable],
        "findings": [asdict(finding) for finding in scene.findings],
        "warnings": list(scene.warnings),
    }


def _image_report(scene: Scene, model: colmap.Model, frame: int) -> dict[str, Any]:
    rows, columns = frame_of(scene.images, frame)
    confidence = scene.prediction.confidence[frame, rows, columns]
    into_map = torch.eye(3, dtype=torch.float64)
    into_map[:2, 2] = torch.tensor([columns.start, rows.start])
    k = model.cameras.intrinsics[frame].double()
    h, w = model.cameras.image_size[frame].tolist()
    photo = scene.photos[frame]
    return {
        "name": photo.name,
        "file": f"images/{model.names[frame]}",
        "width": w,
        "height": h,
        "camera": model.camera_of_image[frame] + 1,
        "extrinsics": model.cameras.extrinsics[frame].double().tolist(),
        "intrinsics": {
            "fx": float(k[0, 0]),
            "fy": float(k[1, 1]),
            "cx": float(k[0, 2]),
            "cy": float(k[1, 2]),
        },
        "image_from_map": (scene.images.source_from_network[frame] @ into_map).tolist(),
        "confidence": None
        if scene.dense is None
        else {
            "min": float(confidence.min()),
            "median": float(confidence.median()),
            "max": float(confidence.max()),
        },
        "observations": int((model.tracks.frame == frame).sum()),
        "rewritten": photo.rewritten or _lens(scene, model, frame) is not None,
        "video": None if photo.frame is None else _moment(photo.frame),
        "refinement": None if scene.refinement is None else scene.refinement.images[frame],
    }


def _moment(frame: Frame) -> dict[str, Any]:
    return {"file": frame.video, "frame": frame.number, "seconds": frame.seconds}


def _versions() -> dict[str, str]:
    parts = ("torch", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in parts}}
