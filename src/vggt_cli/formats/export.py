"""A finished scene as files: one folder, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vggt_cli import __version__
from vggt_cli.errors import OutputError
from vggt_cli.formats import colmap, page, points
from vggt_cli.formats.copies import straight_copy, upright_copy
from vggt_cli.formats.images import frame_of
from vggt_cli.geometry import resize
from vggt_cli.scene import Scene

REPORT_SCHEMA = 1
OURS = {
    *("images", "sparse", "points.ply", "confidence", "depth"),
    *("report.json", "scene.html", "tokens.npz"),
}


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
    strangers = sorted({path.name for path in _entries(folder)} - OURS)
    if strangers:
        raise OutputError(
            f"files that are not ours would be lost: {folder}: {', '.join(strangers[:5])}",
            hint="move them, or give --out",
        )


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
        colmap.write(model, draft / "sparse" / "0")
        if scene.dense is not None:
            points.write_cloud(scene.dense, draft / "points.ply")
            _write_confidence(scene, files, draft / "confidence")
            _write_depth(scene, files, draft / "depth")
        for name in formats:
            WRITERS[name](scene, model, draft)
        if html:
            page.write(as_page(scene, model, folder.absolute().name), draft / "scene.html")
        content = report(scene, model)
        (draft / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _becoming(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that replaces it if the block ends well."""
    parent = folder.absolute().parent
    draft: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
        draft.chmod(0o755)  # mkdtemp makes it private
        yield draft
        if folder.exists():
            old = draft.with_name(draft.name + ".old")
            folder.rename(old)
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space; nothing was left behind" if full else "choose another --out"
        raise OutputError(f"cannot write: {folder} ({error.strerror or error})", hint) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def output_names(names: Sequence[str]) -> list[str]:
    """File names in images/: flat, one dot each, no spaces, stems unique without regard to case.

    Readers of COLMAP models take the base name, cut at the first dot, or split at spaces.
    """
    taken: set[str] = set()
    result = []
    for name in names:
        stem, dot, ending = name.replace("/", "__").rpartition(".")
        stem = re.sub(r"[\s.]", "_", stem)
        free, n = stem, 2
        while free.casefold() in taken:
            free, n = f"{stem}_{n}", n + 1
        taken.add(free.casefold())
        result.append(free + dot + ending)
    return result


def _write_images(scene: Scene, model: colmap.Model, folder: Path) -> None:
    folder.mkdir()
    for i, (photo, file) in enumerate(zip(scene.photos, model.names, strict=True)):
        if _bent(scene, i):
            assert scene.refinement is not None
            lens, straight = scene.refinement.lens, model.cameras.intrinsics[i]
            intrinsics, radial = lens.cameras.intrinsics[i], lens.radial[i]
            straight_copy(photo, folder / file, intrinsics, radial, straight)
        elif photo.rotated:
            upright_copy(photo, folder / file)
        else:
            _clone(photo.path, folder / file)


def _bent(scene: Scene, frame: int) -> bool:
    """Whether the photo was taken through a lens that the scene is without."""
    return scene.refinement is not None and bool(scene.refinement.lens.radial[frame] != 0)


def _clone(source: Path, target: Path) -> None:
    """`target` with the content of `source`: reflink where the disk can, hard link, else copy."""
    if sys.platform == "linux":
        import fcntl

        with source.open("rb") as original, target.open("wb") as clone, _if_possible():
            fcntl.ioctl(clone, 0x40049409, original.fileno())  # FICLONE
            return
        target.unlink()
    with _if_possible():
        os.link(source.resolve(), target)
        return
    shutil.copy2(source, target)


def _if_possible() -> contextlib.suppress:
    return contextlib.suppress(OSError)


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
    for frame, file in enumerate(files):
        rows, columns = frame_of(scene.images, frame)
        confidence = scene.prediction.confidence[frame, rows, columns]
        largest = torch.finfo(torch.float16).max
        np.save(folder / f"{file}.npy", confidence.clamp(max=largest).half().numpy())
        gray = (confidence.float().log() - low) / max(high - low, 1e-6)
        pixels = (gray.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{file}.png")


def _write_depth(scene: Scene, files: Sequence[str], folder: Path) -> None:
    """Per frame NAME.npy: z-depth in scene units, float16, in the pixels of confidence/."""
    folder.mkdir()
    for frame, file in enumerate(files):
        rows, columns = frame_of(scene.images, frame)
        depth = scene.prediction.depth[frame, rows, columns]
        largest = torch.finfo(torch.float16).max
        np.save(folder / f"{file}.npy", depth.clamp(max=largest).half().numpy())


def _write_tokens(scene: Scene, model: colmap.Model, folder: Path) -> None:
    """tokens.npz: names [S], tokens [S, 1+R, 2D] float32 (camera first), text [2D] if there."""
    prediction = scene.prediction
    if prediction.tokens is None:
        raise OutputError("this network has no tokens to save", hint="leave out --save-tokens")
    arrays = {"names": np.array(scene.images.names), "tokens": prediction.tokens.numpy()}
    if prediction.text is not None:
        arrays["text"] = prediction.text.numpy()
    np.savez(folder / "tokens.npz", allow_pickle=False, **arrays)


def _write_colmap_text(scene: Scene, model: colmap.Model, folder: Path) -> None:
    colmap.write_text(model, folder / "sparse" / "0")


WRITERS: dict[str, Callable[[Scene, colmap.Model, Path], None]] = {
    "colmap-txt": _write_colmap_text,
    "tokens": _write_tokens,
}


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
        "conventions": {
            "extrinsics": "world-to-camera, OpenCV axes (x right, y down, z forward)",
            "pixels": "of the files in images/, centre of the top-left pixel at (0.5, 0.5)",
            "world": "the first image's camera is the origin",
        },
        "scale": scene.scale,
        "priors": dict(scene.priors),
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
        "rewritten": photo.rotated or _bent(scene, frame),
        "refinement": None if scene.refinement is None else scene.refinement.images[frame],
    }


def _versions() -> dict[str, str]:
    parts = ("torch", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in parts}}
