"""A video of a thousand frames through `vggt reconstruct`: seconds, peak memory, how far it drifts.

python benchmarks/long_video.py [motion|FPS] [none|auto]

With mini; keyframes by motion, or so many a second (25: every frame); unrefined, or refined.

The camera walks around the middle of a rendered place, looking at it: two laps of a circle whose
radius and height swing.
"""

import json
import math
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import torch
from common import write

from vggt_cli.geometry import align_cameras, move
from vggt_cli.learning import synthetic
from vggt_cli.learning.paths import look_at
from vggt_cli.learning.world import World
from vggt_cli.scene import Cameras

FRAMES, SIZE, LAPS, DEGREES = 1000, (240, 320), 2, 65
RATE = 25  # frames a second


def walk(world: World, frames: int) -> Cameras:
    """The cameras, as far out as the place leaves them free."""
    H, W = SIZE
    angle = 2 * math.pi * LAPS * torch.arange(frames) / frames
    focal = W / 2 / math.tan(math.radians(DEGREES) / 2)
    k = torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]])
    for far in torch.linspace(1, 0.2, 17).tolist():
        radius = far * float(world.reach[1]) * (1 + 0.1 * (3 * angle).sin())
        rise = 0.3 + 0.1 * (5 * angle).sin()
        out = torch.stack([angle.sin() * rise.cos(), -rise.sin(), -angle.cos() * rise.cos()], -1)
        center = world.stage + radius[:, None] * out
        if bool((world.clearance(center) > 0.5).all()):
            break
    target = world.stage.expand_as(center)
    extrinsics = look_at(center, target, torch.zeros(frames))
    size = torch.tensor([SIZE]).repeat(frames, 1)
    return Cameras(extrinsics, k.repeat(frames, 1, 1), size)


def film(world: World, cameras: Cameras, path: Path) -> None:
    """H.264 of what the cameras see."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", RATE, {"crf": "14"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for i in range(len(cameras)):
            pixels = synthetic.render(world, cameras[i : i + 1]).pixels[0].clamp(0, 1)
            levels = (255 * pixels).round().byte().permute(1, 2, 0).contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, "rgb24")))
        container.mux(stream.encode())


def main(fps: str = "motion", refine: str = "none") -> None:
    """Film, reconstruct, compare with the truth, write."""
    keyframes = [] if fps == "motion" else ["--fps", fps, "--frames", str(FRAMES)]
    random = torch.Generator().manual_seed(13)
    world = synthetic.world(random)
    cameras = walk(world, FRAMES)
    with tempfile.TemporaryDirectory() as place:
        video, scene = Path(place) / "walk.mp4", Path(place) / "scene"
        film(world, cameras, video)
        command = [
            *("reconstruct", str(video), "--out", str(scene), "--model", "mini"),
            *("--refine", refine, "--json", *keyframes),
        ]
        run = subprocess.run(
            [sys.executable, "-m", "vggt_cli", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        # The largest of all children; the encoder ran in this process.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report = json.loads(run.stdout)
    numbers = [image["video"]["frame"] for image in report["images"]]
    extrinsics = torch.tensor([image["extrinsics"] for image in report["images"]])
    truth = cameras[numbers]
    found = Cameras(extrinsics, truth.intrinsics, truth.image_size)
    centers = move(found, align_cameras(found, truth)).centers
    error = float((centers - truth.centers).norm(dim=-1).square().mean().sqrt())
    extent = float((truth.centers - truth.centers.mean(0)).norm(dim=-1).mean())
    windows = report["windows"]
    figures = {
        "frames": FRAMES,
        "keyframes": len(numbers),
        "size": list(SIZE),
        "seconds": report["seconds"],
        "peak_bytes": peak,
        "windows": windows and windows["windows"],
        "loops": windows and len(windows["loops"]),
        "refinement": report["refinement"] and report["refinement"]["method"],
        "error_of_extent": error / extent,
    }
    print(json.dumps(figures, indent=1))
    print(write(f"long_video_{fps}" + (refine != "none") * "_refined", figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
