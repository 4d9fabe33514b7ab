"""Feature tracks on photo sets with reference cameras: how many, how long, how exact.

    python benchmarks/tracks.py SCENE...     # folders with images/ and reference/

Photos are compared by the reference's own geometry; each track is triangulated with the reference
cameras and their distortion, without choosing. One JSON line a scene.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from vggt_cli.formats import colmap_read
from vggt_cli.formats import images as files
from vggt_cli.formats.colmap import Model, pycolmap
from vggt_cli.geometry import project_tracks
from vggt_cli.reconstruction.pairs import guess_from_tracks
from vggt_cli.reconstruction.tracks import FeatureTracks, follow
from vggt_cli.scene import Cameras, Shaping, Tracks

SHAPING = Shaping("longer-side", 518, 14)


def triangulated(tracks: Tracks, cameras: Cameras) -> Tensor:
    """[N, 3] float64 points nearest to the rays of their observations."""
    frame = tracks.frame.long()
    k, extrinsics = cameras.intrinsics.double()[frame], cameras.extrinsics.double()[frame]
    xy = torch.cat([tracks.xy.double(), torch.ones(len(frame), 1, dtype=torch.float64)], 1)
    ray = (extrinsics[:, :, :3].mT @ (k.inverse() @ xy[..., None]))[..., 0]
    ray = ray / ray.norm(dim=-1, keepdim=True)
    across = torch.eye(3, dtype=torch.float64) - ray[:, :, None] * ray[:, None]  # [K, 3, 3]
    center = cameras.centers.double()[frame]
    left = torch.zeros(len(tracks.xyz), 3, 3, dtype=torch.float64).index_add_(
        0, tracks.point, across
    )
    right = torch.zeros(len(tracks.xyz), 3, 1, dtype=torch.float64)
    right.index_add_(0, tracks.point, across @ center[..., None])
    found: Tensor = (torch.linalg.pinv(left, hermitian=True) @ right)[..., 0]
    return found


def errors(tracks: Tracks, cameras: Cameras) -> Tensor:
    """[K] pixels from each observation to its triangulated point; inf behind the camera."""
    at = Tracks(triangulated(tracks, cameras), tracks.point, tracks.frame, tracks.xy)
    xy, z = project_tracks(at, cameras)
    found: Tensor = (xy - tracks.xy).norm(dim=-1).where(z > 0, torch.inf)
    return found


def undistorted(tracks: Tracks, model: Model) -> Tracks:
    """The tracks as cameras without the model's distortion would see them."""
    xy = tracks.xy.double()
    for i, lens in enumerate(model.lenses):
        h, w = lens.size
        camera = pycolmap().Camera(model=lens.model, width=w, height=h, params=lens.parameters)
        of, k = tracks.frame == i, model.cameras.intrinsics[i].double()
        straight = torch.from_numpy(camera.cam_from_img(xy[of].numpy()))
        xy[of] = straight * k.diagonal()[:2] + k[:2, 2]
    return Tracks(tracks.xyz, tracks.point, tracks.frame, xy)


def measure(scene: Path) -> dict[str, object]:
    """The figures of one scene."""
    model = colmap_read.read(scene / "reference")
    loaded = files.load(scene / "images", [scene / "images" / n for n in model.names], SHAPING)
    guess = guess_from_tracks(model.cameras, model.tracks)
    wall, cpu = time.perf_counter(), time.process_time()
    found: FeatureTracks = follow(loaded.photos, loaded.images, guess)
    error = errors(undistorted(found.tracks, model), model.cameras)
    return {
        "scene": scene.name,
        "photos": len(model.names),
        "tracks": len(found.tracks.xyz),
        "observations": len(found.tracks.point),
        "mean length": round(len(found.tracks.point) / max(len(found.tracks.xyz), 1), 2),
        "three or more": int((torch.bincount(found.tracks.point) > 2).sum()),
        "under 2 px": round(float((error < 2).float().mean()), 4),
        "median px": round(float(error.median()), 3),
        "seconds": round(time.perf_counter() - wall, 1),
        "processor seconds": round(time.process_time() - cpu, 1),
        "pairs": len(found.pairs),
        "lenses": sorted({lens.model for lens in model.lenses}),
        "images": [vars(row) for row in found.images],
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(measure(Path(argument))), flush=True)
