"""Memory and seconds of a run before it starts, and how many frames the network sees at once.

Every step costs a sum of what it works on, times constants: `costs.json`, which
`benchmarks/calibrate.py` measures and writes. Devices and networks that it has not seen are
computed from the network's size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from vggt_cli.device import OPERATIONS
from vggt_cli.errors import InputError, MemoryExceeded
from vggt_cli.formats.features import COARSE
from vggt_cli.models.networks import CONFIGS
from vggt_cli.reconstruction.detect import LONGEST
from vggt_cli.reconstruction.fuse import CANDIDATES
from vggt_cli.reconstruction.pairs import (
    ALL_PAIRS,
    BY_GEOMETRY,
    BY_LOOKS,
    BY_ORDER,
    EXHAUSTIVE,
)
from vggt_cli.reconstruction.windows import LOOP_SIDE, LOOPS

DENSE_POINTS = 2_000_000  # in points.ply
LEAST = 2  # frames of a window: with one there is nothing to join
SPARE = 0.9  # of the memory that there is
OF_PHOTOS = ("find tracks", "refine")  # steps of refinement
SPECIAL = 17  # tokens of a frame beside its patches
# Where nothing was measured: activations of a token, as multiples of the network's width.
WIDTHS = 60


@dataclass(frozen=True)
class Work:
    """What is to be done."""

    config: str  # key of networks.CONFIGS
    device: str  # kind
    dtype: str
    frames: int
    size: tuple[int, int]  # (height, width) in the network
    patch_size: int
    photo_pixels: float  # of one, on average
    refined: bool
    points: int  # at most, in sparse/0
    window: int  # frames that the network sees at once

    @property
    def on_disk(self) -> bool:
        """Whether there are too many frames to hold all of them."""
        return self.frames > ALL_PAIRS and not self.refined

    @property
    def windows(self) -> int:
        """How many overlapping windows there are."""
        new = self.window - self.window // 2
        return 1 + max(0, -(-(self.frames - self.window) // new))


@dataclass(frozen=True)
class Plan:
    """How the work is done and what it is believed to take."""

    work: Work
    peak_memory: int  # bytes: on an accelerator its own, else of the process
    seconds: Mapping[str, float]  # of each step
    basis: str  # what the figures rest on

    def report(self) -> dict[str, Any]:
        """In plain types."""
        work = self.work
        return {
            "window": min(work.window, work.frames),
            "windows": work.windows,
            "peak_memory_bytes": self.peak_memory,
            "seconds": {step: round(s, 1) for step, s in self.seconds.items()},
            "total_seconds": round(sum(self.seconds.values()), 1),
            "predicted_from": self.basis,
        }


def amounts(work: Work) -> dict[str, float]:
    """How much of everything that costs something there is, by name."""
    H, W = work.size
    S, n, windows = work.frames, min(work.window, work.frames), work.windows
    T = (H // work.patch_size) * (W // work.patch_size) + SPECIAL
    loops, side = (LOOPS * windows if windows > 1 else 0.0), min(LOOP_SIDE, n // 2)
    pixels = work.photo_pixels
    # SIFT doubles small photos and reduces large ones; most are 4 : 3.
    searched = 4 * pixels if pixels < 0.75 * COARSE**2 else min(pixels, 0.75 * LONGEST["sift"] ** 2)
    pairs = min(S * (S - 1) / 2, S * (BY_GEOMETRY + BY_LOOKS + BY_ORDER))
    dense = min(S * H * W, CANDIDATES * max(DENSE_POINTS, work.points))
    sparse = 0 if work.refined else min(S * H * W, CANDIDATES * work.points)
    held = n if work.on_disk else S
    return {
        "run": 1,
        "refined": float(work.refined),  # what refinement loads stays
        "frames": S,
        "photos": S * pixels,
        "photo": pixels,
        "maps": S * H * W,
        "held": held * H * W,
        "tokens": (windows * n + loops * 2 * side) * T,
        "frame attention": (windows * n + loops * 2 * side) * T**2,
        "set attention": windows * (n * T) ** 2 + loops * (2 * side * T) ** 2,
        "joints": windows - 1,
        "frame tokens": T,
        "window tokens": n * T,
        "searched photo": searched,
        "searched photos": S * searched,
        "whole pairs": S * (S - 1) / 2 * searched if S <= EXHAUSTIVE else 0,  # of all features
        "pairs": pairs if S > EXHAUSTIVE else 0,  # of the largest
        "all pairs": S**2 if S <= ALL_PAIRS else 0,
        "candidates": dense + sparse,
        "sightings": 0 if work.refined else S * min(work.points, S * H * W),
    }


def foresee(work: Work) -> Plan:
    """What the work takes as it stands."""
    known = costs()
    network = known["networks"].get(f"{work.config} {work.device} {work.dtype}")
    basis = f"measured on {known['machine']}"
    if network is None:
        network, basis = _computed(work), "computed from the size of the network, not measured"
    of, steps = amounts(work), {**known["steps"], **network}
    if not work.refined:
        steps = {step: cost for step, cost in steps.items() if step not in OF_PHOTOS}
    seconds = {step: _sum(cost["seconds"], of) for step, cost in steps.items()}
    on_device = network if work.device != "cpu" else steps
    peak = max(_sum(cost["bytes"], of) for cost in on_device.values())
    return Plan(work, int(peak), seconds, basis)


def fit(work: Work, memory: int, window: int | None) -> Plan:
    """The plan with the most frames at once, up to `work.window`, that stays within `memory` bytes.

    window: of the user's, taken as it is. Raises InputError for one that is too small;
    MemoryExceeded, with what is needed, where even LEAST frames are too many.
    """
    if window is not None:
        if window < LEAST <= work.frames:
            raise InputError(f"--window {window}", f"at least {LEAST} frames have to be together")
        return foresee(replace(work, window=window))
    low, high = min(LEAST, work.frames), min(work.window, work.frames)
    least = foresee(replace(work, window=low))
    if least.peak_memory > memory:
        there, needed = memory / 1e9, least.peak_memory / 1e9
        raise MemoryExceeded(
            f"{work.frames} images need {needed:.1f} GB even {low} at a time; {there:.1f} GB may be"
            " taken",
            hint="a smaller --resolution, fewer images, --refine none, or --model mini",
        )
    while low < high:  # the most that fits
        middle = (low + high + 1) // 2
        fits = foresee(replace(work, window=middle)).peak_memory <= memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return foresee(replace(work, window=low))


def memory_of(text: str) -> int:
    """Bytes of words such as 10GB or 800MiB. Raises InputError for others."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([kMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise InputError(f"no amount of memory: {text}", "such as 10GB, 800MB or 7.5GiB")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


@cache
def costs() -> dict[str, Any]:
    """The constants of `costs.json`."""
    text = resources.files(__package__).joinpath("costs.json").read_text(encoding="utf-8")
    known: dict[str, Any] = json.loads(text)
    return known


def _sum(cost: Mapping[str, float], of: Mapping[str, float]) -> float:
    return sum(constant * of[name] for name, constant in cost.items())


def _computed(work: Work) -> dict[str, dict[str, dict[str, float]]]:
    """The network's costs by what its blocks multiply: 24 D^2 a token and block, 4 D a pair."""
    config = asdict(CONFIGS[work.config])
    D, depth = config["embed_dim"], config["depth"]
    blocks = 2 * depth + config.get("encoder_depth", 0)
    rate, width = OPERATIONS[work.device], 4 if work.dtype == "float32" else 2
    weights = 12 * D**2 * blocks * width * 1.3  # and the heads
    attention = 4 * D / rate
    return {
        "load weights": {"seconds": {"run": weights / 1e9}, "bytes": {"run": weights}},
        "predict": {
            "seconds": {
                "tokens": 24 * D**2 * blocks / rate,
                "frame attention": attention * (blocks - depth),
                "set attention": attention * depth,
            },
            "bytes": {"run": weights, "window tokens": WIDTHS * D * width},
        },
    }
