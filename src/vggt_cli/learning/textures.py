"""The bank of textures of rendered scenes: made from noise, and crops of photos.

A texture has three channels that a surface mixes its own three colours by, so that a hundred of
them look like many more. Each comes at several levels of detail and goes on mirrored at its edges.
"""

from __future__ import annotations

from functools import cache

import torch
from safetensors.torch import load_file
from torch import Generator, Tensor
from torch.nn import functional as F

from vggt_cli.models import store

TEXELS, LEVELS = 96, 5  # the coarsest level has 6 x 6 texels
MADE, PHOTOS = 64, 20  # textures from noise, then photographic ones, which are colours already
PIECE = 16384
SIZE = sum((TEXELS >> level) ** 2 for level in range(LEVELS))  # rows of a texture in the bank


@cache
def bank(device: torch.device) -> Tensor:
    """[(MADE + PHOTOS) SIZE, 3] every texture, its levels one after the other, finest first."""
    folder = store.bundled()
    assert folder is not None  # it comes with the tool
    photos = load_file(folder / "textures.safetensors")["textures"].float() / 255
    finest = torch.cat([_made(torch.Generator().manual_seed(0)), photos.permute(0, 3, 1, 2)])
    levels = [F.avg_pool2d(finest, 2**level).flatten(2) for level in range(LEVELS)]
    return torch.cat(levels, -1).mT.reshape(-1, 3).to(device)


def _made(random: Generator) -> Tensor:
    """[MADE, 3, TEXELS, TEXELS] shares of three colours: noise of several octaves, with a pattern.

    The pattern is a wall of bricks, a checkerboard, stripes or none.
    """
    octaves = torch.zeros(MADE, 2, TEXELS, TEXELS)
    for cells in (3, 6, 12, 24, 48, 96):
        grid = torch.randn(MADE, 2, cells, cells, generator=random)
        rough = torch.rand(MADE, 2, 1, 1, generator=random) * cells**-0.25
        octaves += rough * F.interpolate(grid, TEXELS, mode="bicubic", align_corners=False)
    sharp = 1 + 7 * torch.rand(MADE, 2, 1, 1, generator=random)
    mix, spots = torch.sigmoid(octaves * sharp).split(1, 1)  # [MADE, 1, TEXELS, TEXELS] each
    spots = (spots > 0.6).float()
    step = torch.randint(8, 33, (2, MADE, 1, 1), generator=random)
    y, x = torch.arange(TEXELS)[:, None].expand(MADE, -1, -1), torch.arange(TEXELS)
    row = y // step[0]
    joint = (y % step[0] < 2) | ((x + row % 2 * step[1] // 2) % step[1] < 2)
    bent = x + (3 * octaves[:, 0]).long()  # stripes that follow the noise, like wood
    patterns = torch.stack(
        [joint, (row + x // step[1]) % 2 == 1, bent // (step[1] // 2) % 2 == 1, joint & False]
    )
    kind = torch.randint(0, len(patterns), (MADE,), generator=random)
    pattern = patterns[kind, torch.arange(MADE)].float()[:, None]
    shade = 1 - pattern * (0.3 + 0.4 * torch.rand(MADE, 1, 1, 1, generator=random))
    return shade * torch.cat([mix * (1 - spots), (1 - mix) * (1 - spots), spots], 1)


def look_up(texture: Tensor, place: Tensor, texels: Tensor) -> Tensor:
    """[3, N] channels of textures between texels and levels.

    texture: [N] index; place: [2, N] in widths of a texture; texels: [N] that a pixel covers.
    """
    # Pieces that fit a processor's cache take a third of the time.
    pieces = zip(texture.split(PIECE), place.split(PIECE, 1), texels.split(PIECE), strict=True)
    return torch.cat([_between_levels(*piece).T for piece in pieces], 1)


def _between_levels(texture: Tensor, place: Tensor, texels: Tensor) -> Tensor:
    level = texels.clamp(min=1).log2().clamp(max=LEVELS - 1)
    fine = level.floor().clamp(max=LEVELS - 2)
    width = TEXELS * torch.exp2(-torch.stack([fine, fine + 1]))  # [2 levels, N]
    first = texture * SIZE + (TEXELS**2 - width**2) * (4 / 3)  # rows of the levels before
    at = place[:, None] * width - 0.5  # [2, 2 levels, N]
    low = at.floor()
    part, period = at - low, 2 * width
    low = low - period * (low / period).floor()  # [0, period)
    mirrored = period - 1
    low_in, high = torch.minimum(low, mirrored - low), torch.minimum(low + 1, mirrored - low - 1)
    high = high.clamp(min=0)  # past the end of a period it starts again at 0
    column, row = torch.stack([low_in, high], 1)  # [2 corners, 2 levels, N] each
    x, y = torch.stack([1 - part, part], 1)
    # Float32 holds these integers exactly.
    index = first + row[:, None] * width + column  # [2 rows, 2 columns, 2 levels, N]
    coarse = level - fine
    weight = y[:, None] * x * torch.stack([1 - coarse, coarse])
    return F.embedding_bag(
        index.flatten(0, 2).T.int().contiguous(),
        bank(place.device),
        per_sample_weights=weight.flatten(0, 2).T.contiguous(),
        mode="sum",
    )
