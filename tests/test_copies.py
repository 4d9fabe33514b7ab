"""Rewritten photos: straight lines, agreement with the network's pixels, every kind of file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import load, picture
from torch import Tensor

from vggt_cli.formats import copies
from vggt_cli.geometry import pixel_centers, reframe, straight_intrinsics, undistort
from vggt_cli.reconstruction.straighten import straightened
from vggt_cli.scene import Cameras, Prediction, Setup, Tracks

LENSES = [-0.1, 0.05]
SIZE = (480, 640)


def lens(size: tuple[int, int] = SIZE) -> Tensor:
    H, W = size
    focal = 0.875 * W
    return torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]], dtype=torch.float64)


def straight(
    folder: Path, name: str, radial: float = -0.1, size: tuple[int, int] = (40, 60)
) -> Path:
    """The undistorted copy of a photo in `folder`, which has no other."""
    photo = next(photo for photo in load(folder).photos if photo.name == name)
    assert photo.size == size
    K, k = lens(size), torch.tensor(radial).double()
    after = straight_intrinsics(K[None], k[None], torch.tensor([size]))[0]
    target = folder.parent / f"straight_{name}"
    copies.straight_copy(photo, target, K, k, after)
    return target


def checkerboard(radial: float, square: float = 80.0, turn: float = 0.1) -> Image.Image:
    """A photo of a tilted board through a lens; each pixel is the mean of 8 x 8 samples."""
    fine = pixel_centers((SIZE[0] * 8, SIZE[1] * 8), lens()) / 8
    xy = reframe(undistort(fine, lens(), torch.tensor(radial).double()), lens(), torch.eye(3))
    u, v = (lens()[0, 0] * (xy @ torch.tensor([[1, turn], [-turn, 1]]).to(xy))).unbind(-1)
    black = ((u / square).floor() + (v / square).floor()) % 2
    mean = black.reshape(SIZE[0], 8, SIZE[1], 8).mean((1, 3))
    return Image.fromarray((mean * 255).round().to(torch.uint8).numpy())


def bend(gray: np.ndarray[Any, Any]) -> float:
    """Largest distance in pixels of an edge's crossings from a line, over the board's long edges.

    Crossings of half grey along each row, followed from row to row.
    """
    values = gray.astype(float) - 127.5
    worst = 0.0
    for start in np.flatnonzero(values[240, :-1] * values[240, 1:] < 0):
        found = []
        x = start + values[240, start] / (values[240, start] - values[240, start + 1])
        for row in range(240, SIZE[0]):
            crossings = np.flatnonzero(values[row, :-1] * values[row, 1:] < 0)
            at = crossings + values[row, crossings] / (
                values[row, crossings] - values[row, crossings + 1]
            )
            close = at[np.abs(at - x) < 1.5]
            if len(close) == 1:  # at corners of squares the edge pauses
                x = close[0]
                found.append((row, x))
        if len(found) > 150:
            rows, xs = np.array(found).T
            worst = max(worst, np.abs(xs - np.polyval(np.polyfit(rows, xs, 1), rows)).max())
    return float(worst)


@pytest.mark.parametrize("radial", LENSES)
def test_straight_lines_are_straight_in_the_written_file(tmp_path: Path, radial: float) -> None:
    (tmp_path / "in").mkdir()
    checkerboard(radial).save(tmp_path / "in/a.png")
    with Image.open(straight(tmp_path / "in", "a.png", radial, SIZE)) as image:
        after = bend(np.asarray(image))
    before = bend(np.asarray(checkerboard(radial)))
    assert bend(np.asarray(checkerboard(0.0))) < 0.1, "the ruler itself is straight"
    print(radial, before, after)
    assert before > 1
    assert 0 < after < 0.12
