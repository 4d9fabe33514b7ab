"""Writes docs/mini.png: a held-out scene as mini sees it, and the cloud that comes of it.

python benchmarks/picture.py [SEED]
Rows: photos, nearness as it is, as predicted, confidence. Below: the points from two sides, with
the predicted cameras in red.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.geometry import project
from vggt_cli.learning import synthetic
from vggt_cli.learning.evaluate import as_photos
from vggt_cli.learning.journal import picture
from vggt_cli.learning.paths import look_at
from vggt_cli.models import weights
from vggt_cli.reconstruction.fuse import FuseOptions, fuse
from vggt_cli.reconstruction.predict import predict
from vggt_cli.scene import PointCloud

TARGET = Path(__file__).parents[1] / "docs" / "mini.png"
ZOOM = 1


def seen_from(cloud: PointCloud, cameras: Tensor, degrees: float, size: tuple[int, int]) -> Tensor:
    """[H, W, 3] uint8: the cloud and camera centres [S, 3] from aside and above."""
    H, W = size
    middle = cloud.xyz.median(0).values
    far = 1.6 * (cloud.xyz - middle).norm(dim=-1).quantile(0.8)
    angle = torch.deg2rad(torch.tensor(degrees))
    ahead = torch.stack([angle.sin(), torch.tensor(0.45), angle.cos()])  # y points down
    eye = middle - F.normalize(ahead, dim=0) * far * 1.6
    extrinsics = look_at(eye[None], middle[None], torch.zeros(1))
    lens = torch.tensor([[[1.1 * W, 0, W / 2], [0, 1.1 * W, H / 2], [0, 0, 1.0]]])
    red = torch.tensor([[230, 30, 30]], dtype=torch.uint8).expand(len(cameras), 3)
    xyz, rgb = torch.cat([cloud.xyz, cameras]), torch.cat([torch.as_tensor(cloud.rgb), red])
    xy, z = (x[0, 0] for x in project(xyz[None, None], lens, extrinsics))
    order = z.argsort(descending=True)
    order = torch.cat([order[order < len(cloud.xyz)], order[order >= len(cloud.xyz)]])
    out = torch.full((H, W, 3), 255, dtype=torch.uint8)
    for i in order[z[order] > 0].tolist():
        x, y = xy[i].long().tolist()
        half = 1 if i < len(cloud.xyz) else 3
        if half <= x < W - half and half <= y < H - half:
            out[y - half : y + half, x - half : x + half] = rgb[i]
    return out


def main(seed: int) -> None:
    """Render, predict, fuse, write."""
    network, _ = weights.load("mini", torch.device("cpu"), torch.float32)
    sample = synthetic.sample(seed, synthetic.Path(4, (256, 320)))
    images = as_photos(sample, seed)
    prediction = predict(network, images)
    cloud = fuse(prediction, images, FuseOptions(points=30_000), observe=False)
    rows = picture(network, sample)
    large = rows.repeat_interleave(ZOOM, 0).repeat_interleave(ZOOM, 1)
    half = (large.shape[1] * 2 // 5, large.shape[1] // 2)
    views = [seen_from(cloud, prediction.cameras.centers, side, half) for side in (-40.0, 40.0)]
    Image.fromarray(torch.cat([large, torch.cat(views, 1)]).numpy()).save(TARGET, optimize=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
