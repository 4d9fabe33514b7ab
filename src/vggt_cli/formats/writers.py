"""The further formats of a scene: who writes them, where they lie, and how they are added."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from vggt_cli.errors import OutputError
from vggt_cli.formats import colmap, depth_maps, glb, mesh, transforms
from vggt_cli.scene import Scene

DRAFT = ".vggt-draft-"  # start of the name of a folder in a scene while formats are added to it


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


# In the order in which they are written: transforms.json names what depth wrote.
WRITERS: dict[str, Callable[[Scene, colmap.Model, Path], None]] = {
    "colmap-txt": _write_colmap_text,
    "tokens": _write_tokens,
    "depth": depth_maps.write,
    "nerfstudio": transforms.write,
    "glb": glb.write,
    "mesh": mesh.write,
}
# What each of them writes, seen from the scene's folder.
PLACES: dict[str, tuple[str, ...]] = {
    "colmap-txt": ("sparse/0/cameras.txt", "sparse/0/images.txt", "sparse/0/points3D.txt"),
    "tokens": ("tokens.npz",),
    "depth": ("colmap_dense", "inverse_depths", "depths", "sparse/0/depth_params.json"),
    "nerfstudio": ("transforms.json",),
    "glb": ("scene.glb",),
    "mesh": ("mesh.ply",),
}


def held(folder: Path) -> list[str]:
    """The further formats that the scene in `folder` holds, in the order of WRITERS."""
    return [name for name, places in PLACES.items() if (folder / places[0]).exists()]


def require(formats: Sequence[str]) -> None:
    """Raise OutputError where this machine lacks what `formats` need: before the work."""
    if "mesh" in formats:
        mesh.open3d()


def write(scene: Scene, model: colmap.Model, folder: Path, formats: Sequence[str]) -> None:
    """Write `formats` into `folder`; raises OutputError for what this scene cannot give."""
    for name, writer in WRITERS.items():
        if name in formats:
            writer(scene, model, folder)


def add(
    scene: Scene, model: colmap.Model, folder: Path, formats: Sequence[str], overwrite: bool = False
) -> list[Path]:
    """Add `formats` to the scene in `folder`: all of them, or none; returns what was written.

    Written beside and renamed. Raises OutputError where one is there already, without
    `overwrite`, or where they cannot be written.
    """
    places = [place for name in PLACES if name in formats for place in PLACES[name]]
    there = [place for place in places if (folder / place).exists()]
    if there and not overwrite:
        raise OutputError(
            f"exists: {folder}: {', '.join(there)}", hint="use --overwrite to replace it"
        )
    with said(folder, "make the scene's folder writable"):
        draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder))
        try:
            (draft / "new").mkdir()
            write(scene, model, draft / "new", formats)
            _exchange(
                draft, folder, [place for place in places if (draft / "new" / place).exists()]
            )
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return [folder / place for place in places]


def _exchange(draft: Path, folder: Path, places: Sequence[str]) -> None:
    """Move what is in draft/new into `folder`, or, if one of them fails, leave all as it was."""
    with contextlib.ExitStack() as undo:
        for place in places:
            ours, old = folder / place, draft / "old" / place
            old.parent.mkdir(parents=True, exist_ok=True)
            if ours.exists():
                ours.rename(old)
                undo.callback(old.rename, ours)
            (draft / "new" / place).rename(ours)
            undo.callback(ours.rename, draft / "new" / place)
        undo.pop_all()


@contextlib.contextmanager
def said(folder: Path, hint: str) -> Iterator[None]:
    """An error of the disk becomes an OutputError with the hint, or that of a full disk."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = f"cannot write: {folder} ({error.strerror or error})"
        mend = "free some space; nothing was left behind" if full else hint
        raise OutputError(what, mend) from error
