"""What this machine has for the tool: what works, what would fail, and how to mend it.

Nothing here uses the network. torch is imported inside: its absence is one of the findings.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vggt_cli import __version__
from vggt_cli.errors import VggtError, WeightsError

OK, NOTE, BROKEN = "ok", "note", "broken"  # a note: something is missing that one may want
MODULES = {"pillow": "PIL"}  # whose names are others than their distributions'
FOR = {
    "mesh": "--format mesh; on a bare Debian also apt-get install libegl1 libgl1 libusb-1.0-0",
    "features": "features where SIFT finds too little",
    "train": "curves of vggt train",
}
MEMORY = 1 << 30  # bytes: mini takes 0.7 GB for eight photos
DISK = 6 << 30  # bytes: a network of a billion parameters and room to write it
BOUND = re.compile(r"(>=|<)\s*([\d.]+)")


@dataclass(frozen=True)
class Fact:
    """One thing that was looked at."""

    part: str  # versions, devices, memory, codecs, weights, disk or trial
    name: str
    state: str  # OK, NOTE or BROKEN: the main job cannot run
    words: str
    mend: str = ""  # what to do, where something is to be done


def examine() -> Iterator[Fact]:
    """All there is to say, in the order of looking; without torch it ends early."""
    where = f"Python {platform.python_version()} on {platform.platform()}"
    yield Fact("versions", "vggt", OK, f"{__version__}, {where}")
    packages = list(_packages())
    yield from packages
    if not any(fact.state == BROKEN for fact in packages):
        for part in (_devices, _memory, _codecs, _weights, _disk, _trial):
            yield from part()


def _packages() -> Iterator[Fact]:
    """Those that are required, and those of the extras: imported, for some only then fail."""
    try:
        lines = metadata.requires("vggt-cli") or []
    except metadata.PackageNotFoundError:
        yield Fact("versions", "install", NOTE, "runs without being installed", "pip install .")
        return
    # pycolmap's own zlib must not be the first of the process.
    for line in sorted(lines, key=lambda line: line.startswith("pycolmap")):
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if not extra:
            yield _package(line, "")
        elif extra[1] != "dev":
            yield _package(line, extra[1])


def _package(line: str, extra: str) -> Fact:
    wanted = line.partition(";")[0].strip()
    name, bounds = re.split(r"[<>=!~ ]", wanted)[0], dict(BOUND.findall(wanted))
    purpose = f" ({FOR.get(extra, extra)})" if extra else ""
    mend = f"pip install '{wanted}'{purpose}"
    missing = NOTE if extra else BROKEN
    try:
        there = metadata.version(name)
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except metadata.PackageNotFoundError:
        return Fact("versions", name, missing, "not installed", mend)
    except (ImportError, OSError) as error:
        return Fact("versions", name, missing, f"cannot be imported: {error}", mend)
    least, below = (_numbers(bounds.get(sign, "")) for sign in (">=", "<"))
    if _numbers(there) < least or (below and _numbers(there) >= below):
        return Fact("versions", name, missing, f"{there} does not fit {wanted}", mend)
    return Fact("versions", name, OK, there)


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3]]


def _devices() -> Iterator[Fact]:
    from vggt_cli import device

    for name, words in device.describe():
        yield Fact("devices", name, OK, words)
    problem = device.unused()
    if problem:
        yield Fact("devices", "accelerator", NOTE, *problem)


def _memory() -> Iterator[Fact]:
    from vggt_cli.device import memory

    total, free = memory()
    state, mend = (NOTE, "close other programs; give fewer photos") if free < MEMORY else (OK, "")
    words = f"{free / 2**30:.1f} of {total / 2**30:.1f} GB free, {os.cpu_count()} cores"
    yield Fact("memory", "memory", state, words, mend)


def _codecs() -> Iterator[Fact]:
    """Each kind of photo, written and read back."""
    from PIL import Image

    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF"):
        try:
            file = io.BytesIO()
            Image.new("RGB", (16, 16), (255, 0, 0)).save(file, kind)
            with Image.open(file) as image:
                image.load()
        except (OSError, KeyError) as error:  # KeyError: Pillow does not know the kind
            mend = "pip install --force-reinstall pillow"
            yield Fact("codecs", kind, NOTE, f"cannot be read: {error}", mend)
        else:
            yield Fact("codecs", kind, OK, "read")


def _weights() -> Iterator[Fact]:
    from vggt_cli.models import store, weights
    from vggt_cli.models.catalog import CATALOG

    for known in CATALOG:
        found = store.locate(known)
        if not found:
            continue
        size = found.path.stat().st_size
        words = f"{found.path} ({size / 1e6:,.0f} MB, {known.licence.name})"
        if size < known.size:
            mend = f"vggt weights verify {known.name}"
            yield Fact("weights", known.name, NOTE, f"cut short? {words}", mend)
        else:
            yield Fact("weights", known.name, OK, words)
    try:
        best = weights.best()
    except WeightsError as error:
        yield Fact("weights", "auto", BROKEN, str(error), error.hint)
        return
    if best.source:
        yield Fact("weights", "auto", OK, f"--model auto takes {best.name}")
    else:
        words = f"--model auto takes {best.name}, which is no rival of the published weights"
        yield Fact("weights", "auto", NOTE, words, "vggt weights list; vggt weights fetch vggt-1b")


def _disk() -> Iterator[Fact]:
    from vggt_cli.models import store

    mend = "free space there, or set VGGT_HOME to a folder on another disk"
    yield _folder("cache", store.home(), DISK, mend)
    yield _folder("here", Path.cwd(), MEMORY, "free space, or give another --out")


def _folder(name: str, folder: Path, wanted: int, mend: str) -> Fact:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        return Fact("disk", name, NOTE, f"cannot be written: {folder}", mend)
    free = shutil.disk_usage(there).free
    words = f"{free / 2**30:.1f} GB free: {folder}"
    return Fact("disk", name, *((OK, words) if free >= wanted else (NOTE, words, mend)))


def _trial() -> Iterator[Fact]:
    """The main job in miniature: two made-up photos through the bundled network into a scene."""
    from vggt_cli.formats import export
    from vggt_cli.reconstruction import pipeline, settings

    options = settings.Options(model="mini", refine="none", offline=True)
    logger, mend = logging.getLogger("vggt_cli"), "run vggt reconstruct with -vv"
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="vggt-doctor-") as folder:
            _photos(Path(folder))
            scene = pipeline.reconstruct(folder, options)
            export.write(scene, Path(folder) / "scene")
    except VggtError as error:
        yield Fact("trial", "reconstruct", BROKEN, str(error), error.hint or mend)
    except (OSError, RuntimeError, ImportError) as error:
        yield Fact("trial", "reconstruct", BROKEN, f"{type(error).__name__}: {error}", mend)
    else:
        yield Fact("trial", "reconstruct", OK, "a scene of two made-up photos, by mini")
    finally:
        logger.setLevel(before)


def _photos(folder: Path) -> None:
    """Two views of the same pattern, a little apart."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    whole = Image.fromarray(noise).resize((288, 192), Image.Resampling.BICUBIC)
    for i in range(2):
        whole.crop((16 * i, 0, 256 + 16 * i, 192)).save(folder / f"{i}.png")
