"""What a run is told, and what follows from it before anything is read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vggt_cli import device as devices
from vggt_cli.errors import InputError
from vggt_cli.formats import images
from vggt_cli.models import weights
from vggt_cli.models.catalog import CATALOG, Entry
from vggt_cli.models.weights import Wanted
from vggt_cli.reconstruction import pairs, plan
from vggt_cli.reconstruction.inputs import InputOptions
from vggt_cli.scene import Shaping

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Everything that changes the result of `reconstruct`."""

    model: str = "auto"  # a name of the weights table, or a file
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"  # of matrix products
    fewer_keys: bool = False  # late blocks read a part of the patches: see docs/speed.md
    points: int = 200_000  # at most, in sparse/0
    confidence: float = 20.0  # percent of the pixels, the least sure, that are dropped
    resolution: int | None = None  # pixels; None: what the weights were trained at
    camera: str = "auto"  # which images share intrinsics: see lenses.camera_groups
    refine: Literal["auto", "none", "ba", "sfm"] = "auto"  # see refine.RefineOptions
    intrinsics: str | None = None  # fx,fy,cx,cy or a file: see formats.priors.read_intrinsics
    poses: str | None = None  # a file or folder: see formats.priors.read_poses
    keep_poses: bool = False  # as they are; else they are where refinement starts
    scale_from: str | None = None  # A-B=1.5m, poses or gps: see reconstruction.scale
    save_tokens: bool = False  # also the text embedding, where the weights have one
    seed: int = 0
    fps: float | None = None  # keyframes a second of a video; None: by motion
    frames: int | None = None  # keyframes of all videos, at most; None: inputs.FRAMES
    masks: str | None = None  # folder: see formats.masks.matching
    window: int | None = None  # frames that the network sees at once; None: see plan.fit
    max_memory: int | None = None  # bytes; None: most of what the device has free
    strict: bool = False  # a photo that cannot be read stops the run
    require_commercial: bool = False
    offline: bool = False

    @property
    def inputs(self) -> InputOptions:
        """The part that the input is about."""
        return InputOptions(self.fps, self.frames, self.masks, self.strict)


@dataclass(frozen=True)
class Setting:
    """Where and by what the work is done."""

    device: torch.device
    dtype: torch.dtype  # of the aggregator's matrix products
    weights: Entry
    shaping: Shaping
    warnings: tuple[str, ...]

    def network(self, options: Options, refined: bool) -> Wanted:
        """The network that does it."""
        heads = ["text"] * options.save_tokens + ["track"] * refined
        return Wanted(options.model, self.device, self.dtype, tuple(heads), options.fewer_keys)

    def plan(self, options: Options, sizes: Sequence[tuple[int, int]], count: int) -> plan.Plan:
        """The plan for `count` photos of these (height, width). Raises as `plan.fit` does."""
        shaped = [images.network_size(size, self.shaping) for size in sizes]
        H, W = (max(size[axis] for size in shaped) for axis in (0, 1))
        refined = options.refine in ("ba", "sfm") or (
            options.refine == "auto" and count <= pairs.ALL_PAIRS
        )
        work = plan.Work(
            config=self.weights.config,
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            frames=count,
            size=(H, W),
            patch_size=self.shaping.patch_size,
            photo_pixels=sum(h * w for h, w in sizes) / len(sizes),
            refined=refined,
            points=options.points,
            window=self.weights.window,
        )
        memory = int(plan.SPARE * (options.max_memory or devices.free_memory(self.device)))
        return plan.fit(work, memory, options.window)


def settle(options: Options) -> Setting:
    """What the options mean on this machine. Raises InputError or WeightsError."""
    device = devices.choose(options.device)
    known = _entry(options)
    shaping, warnings = known.shaping, []
    if options.resolution not in (None, shaping.resolution):
        warnings.append(
            f"--resolution {options.resolution}: these weights were trained at "
            f"{shaping.resolution}, and other sizes are silently worse"
        )
        log.warning(warnings[0])
        shaping = dataclasses.replace(shaping, resolution=options.resolution)
    return Setting(device, _dtype(options, device), known, shaping, tuple(warnings))


def _dtype(options: Options, device: torch.device) -> torch.dtype:
    if options.precision == "auto":
        return devices.compute_dtype(device)
    if options.precision == "int8" and device.type != "cpu":
        raise InputError(f"--precision int8 is for CPUs, and this is {device}", "leave it out")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[
        options.precision
    ]


def _entry(options: Options) -> Entry:
    """The weights that the options mean; fetched first if named, not here and allowed."""
    named = {known.name: known for known in CATALOG}.get(options.model)
    if options.require_commercial and named:
        weights.require_commercial(named)
    if named and not options.offline and not weights.find(named.name):
        log.info("fetching %s, %.1f GB, %s", named.name, named.size / 1e9, named.licence.name)
        weights.fetch(named.name)
    known, _ = weights.identify(options.model)
    if options.require_commercial:
        weights.require_commercial(known)
    if options.model == "auto":
        log.info(_about(known))
    return known


def _about(known: Entry) -> str:
    if known.source:
        return f"model: {known.name} ({known.licence.name})"
    return (
        f"model: {known.name}, small and rough: no published weights on this machine; "
        f"vggt weights fetch {CATALOG[0].name} gets the best, vggt weights list shows all"
    )
