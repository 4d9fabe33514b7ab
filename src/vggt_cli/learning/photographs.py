"""What a camera makes of rendered frames: blur, exposure, white balance, noise, JPEG, 8 bits."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from vggt_cli.learning.places import chance, uniform

# Rows are Y, Cb, Cr of ITU-R BT.601, as in JFIF.
YCC = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)
# ITU-T T.81, tables K.1 and K.2.
LUMINANCE = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]
CHROMINANCE = [
    [17, 18, 24, 47, 99, 99, 99, 99],
    [18, 21, 26, 66, 99, 99, 99, 99],
    [24, 26, 56, 99, 99, 99, 99, 99],
    [47, 66, 99, 99, 99, 99, 99, 99],
    *[[99] * 8] * 4,
]


def photographed(random: Generator, pixels: Tensor) -> Tensor:
    """The frames [S, 3, H, W] in [0, 1] as a camera records them, on the same device.

    One lens, one white balance and one quality for all; exposure follows the mean of the frames
    and differs a little between them.
    """
    S = len(pixels)
    if chance(random, 0.5):
        pixels = blurred(pixels, float(uniform(random, 1, low=0.3, high=0.9)))
    common = uniform(random, 1, 1, 1, 1, low=0.35, high=0.55) / pixels.mean().cpu().clamp(min=0.01)
    exposure = common.clamp(0.5, 2) * uniform(random, S, 1, 1, 1, low=0.9, high=1.1)
    balance = uniform(random, 1, 3, 1, 1, low=0.9, high=1.1)
    noise = uniform(random, 1, high=0.02) * torch.randn(pixels.shape, generator=random)
    seen = (pixels * (exposure * balance).to(pixels) + noise.to(pixels)).clamp(0, 1)
    if chance(random, 0.7):
        seen = jpeg(seen, int(torch.randint(40, 96, (), generator=random))).clamp(0, 1)
    return (seen * 255).round() / 255


def blurred(pixels: Tensor, sigma: float) -> Tensor:
    """Frames [S, 3, H, W] under a Gaussian of `sigma` pixels."""
    reach = math.ceil(2.5 * sigma)
    weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).to(pixels) / sigma) ** 2)
    weight = weight / weight.sum()
    flat = F.pad(pixels, (reach, reach, reach, reach), mode="replicate").flatten(0, 1)[:, None]
    across = F.conv2d(flat, weight[None, None, None])
    return F.conv2d(across, weight[None, None, :, None])[:, 0].view_as(pixels)


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Frames [S, 3, H, W] in [0, 1] after JPEG's loss at `quality` 1 to 100, chroma at full size.

    Source: ITU-T T.81, A.3; qualities as in libjpeg.
    """
    H, W = pixels.shape[-2:]
    color, dct, tables = (x.to(pixels) for x in (YCC, _dct(), _tables(quality)))
    levels = F.pad(pixels * 255 - 128, (0, -W % 8, 0, -H % 8), mode="replicate")
    ycc = torch.einsum("ij,sjhw->sihw", color, levels)
    blocks = ycc.unfold(2, 8, 8).unfold(3, 8, 8)  # [S, 3, rows, columns, 8, 8]
    steps = tables[:, None, None]
    kept = (dct @ blocks @ dct.T / steps).round() * steps
    back = (dct.T @ kept @ dct).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    rgb = torch.einsum("ij,sjhw->sihw", torch.linalg.inv(color), back)
    return (rgb[..., :H, :W] + 128) / 255


@cache
def _dct() -> Tensor:
    """[8, 8] the orthonormal cosine transform."""
    n = torch.arange(8)
    waves = torch.cos(math.pi / 8 * (n + 0.5) * n[:, None]) / 2
    waves[0] /= math.sqrt(2)
    return waves


def _tables(quality: int) -> Tensor:
    """[3, 8, 8] quantisation steps of Y, Cb and Cr."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([LUMINANCE, CHROMINANCE, CHROMINANCE])
    return ((tables * scale + 50) / 100).floor().clamp(1, 255)
