"""Seconds of everything in a run that is not the network, part by part, and of the whole command.

python benchmarks/bench_parts.py [PART...] [--photos FOLDER] [--against COMMIT] [--runs N]

Parts: start, load, fuse, tracks, write, command; all of them if none is named. Each figure is the
least of a few runs: "s" are seconds on the clock, "cpu s" seconds of all processors together, which
other work on the machine changes less. With --against, this package and that of another commit in
turn. Everything is made here from seeds: photos that show parts of one picture, frames in a room.
"""

import argparse
import contextlib
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from common import ROOT, compared, write
from PIL import Image, ImageOps
from torch.nn import functional as F

from vggt_cli.formats import colmap, depth_maps, export, glb, images, page, points, transforms
from vggt_cli.formats.colmap import Array
from vggt_cli.formats.scene_read import read
from vggt_cli.geometry import invert, pixel_centers, unproject
from vggt_cli.reconstruction import detect
from vggt_cli.reconstruction.fuse import FuseOptions, fuse
from vggt_cli.reconstruction.matches import match
from vggt_cli.reconstruction.pairs import alike, covisible, guess
from vggt_cli.reconstruction.tracks import follow
from vggt_cli.scene import (
    Cameras,
    ImageSet,
    Photo,
    PointCloud,
    Prediction,
    Provenance,
    Scene,
    Shaping,
    Tracks,
)

SHAPING = Shaping("longer-side", 518, 14)
FRAMES, SIZE = 100, (288, 384)
ROOM = torch.tensor([4.0, 1.5, 3.0])  # half its sides
MADE_BY = Provenance("none", "", "none", True, "cpu", "float32", {})
Figures = dict[str, float]


def measured(figures: Figures, name: str, step: Callable[[], object], runs: int = 2) -> None:
    """Adds the least seconds of `step`, on the clock and of processors with those of children."""
    taken = []
    for _ in range(runs):
        start, used = time.perf_counter(), _cpu()
        step()
        taken.append((time.perf_counter() - start, _cpu() - used))
    figures[f"{name}, s"], figures[f"{name}, cpu s"] = (
        round(min(x), 4) for x in zip(*taken, strict=True)
    )


def _cpu() -> float:
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def picture(size: tuple[int, int], seed: int = 0) -> Array:
    """[h, w, 3] uint8 with detail at every scale, as photos have."""
    random = torch.Generator().manual_seed(seed)
    total, h, w = torch.zeros(1, 3, *size), 3, 4
    while h < size[0]:
        detail = torch.randn(1, 3, h, w, generator=random)
        total += F.interpolate(detail, size, mode="nearest") / h**0.4
        h, w = h * 5 // 3, w * 5 // 3
    total = F.avg_pool2d((total - total.mean()) / total.std(), 3, 1, padding=1)
    return (128 + 50 * total[0]).clamp(0, 255).byte().permute(1, 2, 0).numpy()


def photos(folder: Path, count: int, size: tuple[int, int], step: int) -> list[Path]:
    """JPEGs of parts of one picture, each `step` pixels on."""
    whole = picture((size[0], size[1] + step * (count - 1)))
    paths = []
    for i in range(count):
        part = Image.fromarray(whole[:, step * i : step * i + size[1]])
        paths.append(folder / f"{i:03d}.jpg")
        part.save(paths[-1], quality=90)
    return paths


@cache
def room() -> tuple[Prediction, ImageSet]:
    """Frames from a walk around a room with their true depth."""
    H, W = SIZE
    angle = torch.arange(FRAMES) * (2 * torch.pi / FRAMES)
    zero, one = torch.zeros(FRAMES), torch.ones(FRAMES)
    z = torch.stack([angle.cos(), 0.1 * (3 * angle).sin(), angle.sin()], -1)
    z = F.normalize(z, dim=-1)
    x = F.normalize(torch.linalg.cross(torch.stack([zero, one, zero], -1), z), dim=-1)
    center = torch.stack([angle.cos(), 0.2 * (2 * angle).sin(), angle.sin()], -1)
    world = torch.stack([x, torch.linalg.cross(z, x), z, center], -1)  # [S, 3, 4]
    k = torch.tensor([[0.8 * W, 0, W / 2], [0, 0.8 * W, H / 2], [0, 0, 1]])
    rays = torch.cat([(pixel_centers(SIZE, k) - k[:2, 2]) / k[0, 0], torch.ones(H, W, 1)], -1)
    direction = rays @ world[:, None, :, :3].mT
    wall = (ROOM * direction.sign() - center[:, None, None]) / direction
    depth = wall.amin(-1)
    confidence = 1 + torch.rand(FRAMES, H, W, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([SIZE]).expand(FRAMES, 2)
    cameras = Cameras(invert(world), k.expand(FRAMES, 3, 3), size)
    pixels = torch.from_numpy(picture(SIZE)).permute(2, 0, 1).float().div(255)
    identity = torch.eye(3, dtype=torch.float64).expand(FRAMES, 3, 3)
    names = tuple(f"{i:03d}.jpg" for i in range(FRAMES))
    seen = ImageSet(
        names,
        pixels.repeat(FRAMES, 1, 1, 1),
        torch.ones_like(depth, dtype=torch.bool),
        identity,
        size,
    )
    return Prediction(cameras, depth, confidence), seen


@cache
def model(count: int = 1_000_000) -> colmap.Model:
    """Points with three or four observations each; where they are does not matter to a writer."""
    random = torch.Generator().manual_seed(0)
    cameras = room()[0].cameras
    lengths = torch.randint(3, 5, (count,), generator=random)
    point = torch.repeat_interleave(torch.arange(count), lengths)
    first = torch.randint(0, FRAMES - 4, (count,), generator=random)[point]
    within = torch.arange(len(point)) - (lengths.cumsum(0) - lengths)[point]
    xy = torch.rand(len(point), 2, generator=random) * 300
    xyz = torch.randn(count, 3, generator=random)
    tracks = Tracks(xyz, point, (first + within).int(), xy)
    rgb = torch.randint(0, 256, (count, 3), generator=random).byte().numpy()
    return colmap.Model(room()[1].names, cameras, tuple(range(FRAMES)), tracks, rgb)


def start(figures: Figures, folder: Path) -> None:
    """Commands that need no torch, and what importing it costs the others."""
    for name, words in {
        "vggt --help": ["-m", "vggt_cli", "--help"],
        "vggt weights list": ["-m", "vggt_cli", "weights", "list"],
        "python -c pass": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "import the main job": ["-c", "import vggt_cli.reconstruction.pipeline"],
    }.items():
        measured(figures, name, partial(_python, *words), runs=4)


def _python(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return done.stdout


def load(figures: Figures, folder: Path) -> None:
    """Photos to the network's size: ours, and one after the other by plain Pillow."""
    for name, count, size in (("8 of 12 MP", 8, (3000, 4000)), ("16 of 2 MP", 16, (1224, 1632))):
        paths = photos(folder, count, size, 8)
        measured(figures, f"load {name}", partial(images.load, folder, paths, SHAPING))
        measured(figures, f"load {name} by plain Pillow", partial(_plain_all, paths))
        ours = images.load(folder, paths[:1], SHAPING).images.pixels[0]
        other = torch.from_numpy(_plain(paths[0])).permute(2, 0, 1)
        figures[f"load {name}: mean difference, levels"] = float((ours * 255 - other).abs().mean())


def _plain_all(paths: list[Path]) -> None:
    for path in paths:
        _plain(path)


def _plain(path: Path) -> Array:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        h, w = images.network_size((upright.height, upright.width), SHAPING)
        return np.asarray(upright.resize((w, h), Image.Resampling.BICUBIC), np.float32)


def fusing(figures: Figures, folder: Path) -> None:
    """Depth maps to points."""
    prediction, seen = room()
    cameras = prediction.cameras
    unprojected = partial(unproject, prediction.depth, cameras.intrinsics, cameras.extrinsics)
    measured(figures, "unproject 100 frames", unprojected)
    measured(figures, "covisible 100 frames", lambda: covisible(prediction, seen.valid))
    for name, options, observe in (
        ("fuse to 200,000 points with observations", FuseOptions(), True),
        ("fuse to 1,000,000 points with observations", FuseOptions(points=1_000_000), True),
        ("fuse to 2,000,000 points", FuseOptions(points=2_000_000), False),
    ):
        clouds: list[PointCloud] = []

        def step(o: FuseOptions = options, w: bool = observe, c: list[PointCloud] = clouds) -> None:
            c.append(fuse(prediction, seen, o, w))

        measured(figures, name, step, runs=1)
        figures[f"{name}: points"] = len(clouds[-1])


def tracks(figures: Figures, folder: Path) -> None:
    """Features, matches and tracks of 12 photos of 2 MP."""
    paths = photos(folder, 12, (1224, 1632), 60)
    loaded = images.load(folder, paths, SHAPING)
    taken = loaded.photos
    kept = folder / "cache"
    measured(figures, "features of 12", lambda: detect.sift(taken, kept, _ignored), runs=1)
    measured(figures, "features of 12 from the cache", lambda: detect.sift(taken, kept, _ignored))
    vectors = [torch.from_numpy(x.vectors) for x in detect.sift(taken, kept, _ignored)]
    figures["features of a photo"] = sum(map(len, vectors)) / len(vectors)
    measured(figures, "match a pair", lambda: match(vectors[0], vectors[1]), runs=3)
    measured(
        figures, "compare the looks of 48", lambda: alike([x for x in vectors for _ in "four"])
    )
    n, (H, W) = len(taken), loaded.images.size
    k = torch.tensor([[0.8 * W, 0, W / 2], [0, 0.8 * W, H / 2], [0, 0, 1]])
    size = torch.tensor([(H, W)]).expand(n, 2)
    cameras = Cameras(torch.eye(3, 4).repeat(n, 1, 1), k.expand(n, 3, 3), size)
    ones = torch.ones(n, H, W)
    guessed = guess(Prediction(cameras, ones, ones), loaded.images)
    step = partial(follow, taken, loaded.images, guessed, None, kept)
    measured(figures, "tracks of 12 photos, 66 pairs, features cached", step, runs=1)


def _ignored(done: int) -> None:
    """No progress shown."""


def writing(figures: Figures, folder: Path) -> None:
    """Files of a scene, and the scene read back."""
    whole = model()
    measured(figures, "COLMAP binary, 1,000,000 points", lambda: colmap.write(whole, folder / "b"))
    measured(figures, "COLMAP text", lambda: colmap.write_text(whole, folder / "t"), runs=1)
    random = torch.Generator().manual_seed(0)
    xyz = torch.randn(2_000_000, 3, generator=random)
    rgb = torch.randint(0, 256, xyz.shape, generator=random).byte()
    dense = PointCloud(xyz, F.normalize(xyz, dim=1), rgb, xyz.norm(dim=1))
    measured(figures, "points.ply, 2,000,000", lambda: points.write_cloud(dense, folder / "p.ply"))
    prediction, seen = room()
    files = photos(folder, 1, SIZE, 0) * FRAMES
    taken = tuple(Photo(p, n, SIZE, kind="JPEG") for p, n in zip(files, seen.names, strict=True))
    found = Scene(
        *(taken, seen, prediction, tuple(range(FRAMES)), whole.tracks),
        *(torch.from_numpy(whole.rgb), dense, MADE_BY),
    )
    fresh = iter(range(100))

    def into() -> Path:
        return (folder / f"into {next(fresh)}").absolute()

    names = seen.names
    measured(figures, "confidence/ of 100", lambda: export._write_confidence(found, names, into()))
    measured(figures, "depth/ of 100", lambda: export._write_depth(found, names, into()))
    shown = export.as_page(found, whole, "scene")
    measured(figures, "scene.html", lambda: page.write(shown, folder / "scene.html"))
    measured(figures, "scene.glb", lambda: glb.write(found, whole, folder))
    measured(figures, "transforms.json", lambda: transforms.write(found, whole, folder))
    measured(figures, "report.json", lambda: export.report(found, whole))
    other = colmap.Model(names, *(whole.cameras, whole.camera_of_image), *_few(whole))
    measured(
        figures, "--format depth of 100", lambda: depth_maps.write(found, other, into()), runs=1
    )
    scene = folder / "scene"
    measured(figures, "a whole scene", lambda: export.write(found, scene, overwrite=True), runs=1)
    measured(figures, "a scene read", lambda: read(scene), runs=1)


def _few(whole: colmap.Model) -> tuple[Tracks, Array]:
    rows = whole.tracks.point < 1000
    kept = (x[rows] for x in (whole.tracks.point, whole.tracks.frame, whole.tracks.xy))
    return Tracks(whole.tracks.xyz[:1000], *kept), whole.rgb[:1000]


def command(figures: Figures, folder: Path) -> None:
    """`vggt reconstruct` with mini, in a process of its own, and its stages."""
    source = os.environ.get("VGGT_BENCH_PHOTOS", str(ROOT / "examples/motorcycle"))
    words = ["reconstruct", source, "--model", "mini", "--json", "--out", str(folder / "out")]
    os.environ["VGGT_HOME"] = str(folder)  # no features from another run
    reports: list[str] = []
    measured(
        figures,
        "vggt reconstruct",
        lambda: reports.append(_python("-m", "vggt_cli", *words)),
        runs=1,
    )
    report = json.loads(reports[-1])
    figures["of it: photos"] = len(report["images"])
    for name, seconds in report["seconds"].items():
        figures[f"of it: {name}, s"] = seconds


PARTS = {
    "start": start,
    "load": load,
    "fuse": fusing,
    "tracks": tracks,
    "write": writing,
    "command": command,
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--photos", help="folder for the whole command; the example's")
    parser.add_argument("--once", action="store_true", help="print the figures alone")
    asked = parser.parse_args()
    chosen = asked.parts or list(PARTS)
    if asked.photos:
        os.environ["VGGT_BENCH_PHOTOS"] = str(Path(asked.photos).absolute())
    if asked.against:
        figures = compared(__file__, [*chosen, "--once"], asked.against, asked.runs)
        print(write("parts" if chosen == list(PARTS) else f"parts_{'_'.join(chosen)}", figures))
        return
    logging.disable(logging.WARNING)
    found: Figures = {}
    for part in chosen:
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
            PARTS[part](found, Path(place))
            print(part, file=sys.stderr, flush=True)
    print(json.dumps(found) if asked.once else write("parts", found))


if __name__ == "__main__":
    main()
