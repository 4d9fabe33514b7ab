"""How far the view moves from frame to frame of a sequence, and which frames show enough of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

STEP = 0.05  # of the picture's diagonal: how far the view moves from one keyframe to the next
HOP = 0.02  # of it: shifts are measured over no more, as squares that change are not found again
LONGEST = 160  # pixels of the longer side at which shifts are measured
BLOCK = 48  # pixels: side of the squares whose shift is measured, up to half of it
PLAIN = 2.0  # grey levels: a square that varies by less says nothing, and seems to stand still
COARSE = 0.15  # cycles a pixel: what is finer counts little, for blur is no motion
SURE = 0.3  # height of a correlation's peak: of strangers it reaches 0.27, HOP apart it is 0.5
MOVING = 0.75  # of the squares stay behind what counts: an orbit hardly moves its middle

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
_squared = np.add.outer(np.fft.fftfreq(BLOCK) ** 2, np.fft.fftfreq(BLOCK) ** 2)
_WEIGHT = np.where(_squared > 0, np.exp(-_squared / 2 / COARSE**2), 0)
_WEIGHT /= _WEIGHT.mean()


@dataclass(frozen=True, eq=False)
class View:
    """A frame as its squares, from which shifts are read."""

    spectra: Array  # [n, BLOCK, BLOCK] complex
    telling: Array  # [n] bool: not PLAIN
    diagonal: float  # pixels

    @classmethod
    def of(cls, gray: Array) -> View:
        """The view in a picture [h, w] of grey levels, 0 to 255.

        The longer side has about LONGEST pixels, each at least BLOCK.
        """
        corners = [np.linspace(0, n - BLOCK, -(-n // BLOCK)).astype(int) for n in gray.shape]
        squares = [gray[y : y + BLOCK, x : x + BLOCK] for y in corners[0] for x in corners[1]]
        window = np.hanning(BLOCK)[:, None] * np.hanning(BLOCK)
        centred = np.stack([square - square.mean() for square in squares])
        telling = centred.std((1, 2)) > PLAIN
        return cls(np.fft.fft2(centred * window), telling, math.hypot(*gray.shape))

    def shifts(self, other: View) -> Array | None:
        """[n, 2] pixels by which each square lies elsewhere in `other`; None: nothing is alike.

        Squares that are not found move as the others do in the median; where all are plain, by 0.
        Source: Kuglin and Hines, The phase correlation image alignment method, 1975.
        """
        if self.spectra.shape != other.spectra.shape:
            return None
        cross = self.spectra.conj() * other.spectra
        cross *= _WEIGHT / np.maximum(np.abs(cross), 1e-6)
        peaks = np.fft.ifft2(cross).real.reshape(len(cross), -1)
        where, sure = peaks.argmax(1), (peaks.max(1) > SURE) & self.telling & other.telling
        if sure.sum() < 0.25 * (self.telling | other.telling).sum():
            return None
        found = np.stack(np.unravel_index(where, (BLOCK, BLOCK)), 1)
        found = ((found + BLOCK // 2) % BLOCK - BLOCK // 2).astype(float)
        found[~sure] = np.median(found[sure], 0) if sure.any() else 0
        return found


class Since:
    """How far the view has moved since a frame, as the frames after it come one by one.

    Shifts add up square by square over frames HOP apart: over more, only squares that stay alike
    would be found, which are those that hardly move; and a hand that trembles goes nowhere.
    """

    def __init__(self, view: View) -> None:
        self.last, self.carried = view, np.zeros(2)

    def moved(self, view: View) -> float:
        """How far a quarter of the view has moved at least, in diagonals of the picture.

        Infinite where nothing is alike.
        """
        found = self.last.shifts(view)
        if found is None:
            return math.inf
        total = self.carried + found
        if _most(found) >= HOP * view.diagonal:
            self.last, self.carried = view, total
        return _most(total) / view.diagonal


def _most(shifts: Array) -> float:
    return float(np.quantile(np.hypot(*shifts.T), MOVING))


def keyframes(views: Iterable[View]) -> list[int]:
    """The first of the views, and each that lies a STEP from the keyframe before it."""
    found: list[int] = []
    since: Since | None = None
    for number, view in enumerate(views):
        if since is None or since.moved(view) >= STEP:
            since = Since(view)
            found.append(number)
    return found
