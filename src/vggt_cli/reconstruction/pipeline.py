"""The main job: the steps in order, and the only place that knows the order."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from vggt_cli import device as devices
from vggt_cli.errors import InputError
from vggt_cli.formats import images as photos
from vggt_cli.formats.lenses import camera_groups
from vggt_cli.formats.names import few
from vggt_cli.geometry import resize, share_intrinsics
from vggt_cli.models import weights
from vggt_cli.models.catalog import CATALOG, Entry
from vggt_cli.models.networks import Network
from vggt_cli.models.store import sha256
from vggt_cli.reconstruction import content, given, inputs
from vggt_cli.reconstruction.detect import cache_folder
from vggt_cli.reconstruction.diagnose import diagnose
from vggt_cli.reconstruction.fuse import FuseOptions, fuse
from vggt_cli.reconstruction.improve import Improved, colored, improve
from vggt_cli.reconstruction.pairs import guess, guess_from_tracks
from vggt_cli.reconstruction.predict import predict
from vggt_cli.reconstruction.refine import RefineOptions
from vggt_cli.reconstruction.stages import Progress, Stages, silent
from vggt_cli.reconstruction.tracks import follow
from vggt_cli.scene import ImageSet, PointCloud, Prediction, Provenance, Scene, Shaping, Tracks

log = logging.getLogger(__name__)

DENSE_POINTS = 2_000_000  # in points.ply


@dataclass(frozen=True)
class Options:
    """Everything that changes the result of `reconstruct`."""

    model: str = "auto"  # a name of the weights table, or a file
    device: str = "auto"
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
    strict: bool = False  # a photo that cannot be read stops the run
    require_commercial: bool = False
    offline: bool = False


def reconstruct(
    source: str,
    options: Options,
    progress: Progress = silent,
    networks: weights.Networks | None = None,
) -> Scene:
    """Cameras, depth and points of the photos or videos in `source` (see `files.find`).

    The same photos, weights and options give the same scene.
    networks: the one that was loaded last, so that it need not be loaded again.
    Raises VggtError: InputError, WeightsError, MemoryExceeded or GeometryError.
    """
    device = devices.choose(options.device)
    dtype = devices.compute_dtype(device)
    shaping, warnings = _shaping(_weights(options).shaping, options.resolution)
    stages = Stages(device, progress)
    with stages.stage("load images"):
        root, paths = inputs.find(source, _of_inputs(options))
        loaded, said = inputs.read(root, paths, shaping, _of_inputs(options), progress)
    warnings += said
    H, W = loaded.images.size
    stages.work = f"{len(loaded.images)} images of {W} x {H}"
    group = camera_groups(loaded.photos, options.camera)
    prior = _prior(options, loaded)
    with stages.stage("load weights"):
        heads = ["text"] * options.save_tokens + ["track"] * (options.refine != "none")
        wanted = weights.Wanted(options.model, device, dtype, tuple(heads))
        network, used = weights.kept(wanted, networks, partial(progress, "load weights"))
    with stages.stage("predict"):
        prediction = predict(network, loaded.images)
    raw, prediction = prediction.cameras, _with_shared_cameras(prediction, group)
    start = given.begin(prior, prediction, group, loaded.images)
    start, improved = _improved(loaded, prior, start, network, options, stages)
    improved, metric = given.in_metres(prior, start, improved, loaded.photos)
    warnings += _warned([*start.warnings, *improved.warnings]) + _words(loaded, improved)
    with stages.stage("fuse"):
        tracks, rgb, dense = _points(improved, options)
    with stages.stage("diagnose"):
        findings = diagnose(loaded.photos, improved, raw, start.group)
    digest = content.key(root, paths, dataclasses.asdict(options), used.sha256)
    made_by = _made_by(used, (device, dtype), options, stages, digest)
    return Scene(
        loaded.photos,
        improved.images,
        improved.prediction,
        tuple(start.group),
        tracks,
        rgb,
        dense,
        made_by,
        loaded.unreadable,
        tuple(warnings),
        "arbitrary" if metric is None else "metric",
        "depth" if improved.tracks is None else "image",
        improved.refinement,
        given.report(prior, start, metric),
        findings,
    )


def _with_shared_cameras(prediction: Prediction, group: list[int]) -> Prediction:
    return dataclasses.replace(prediction, cameras=share_intrinsics(prediction.cameras, group))


def _made_by(
    used: weights.Weights,
    computed: tuple[torch.device, torch.dtype],
    options: Options,
    stages: Stages,
    digest: str,
) -> Provenance:
    device, dtype = computed
    return Provenance(
        used.name,
        used.sha256,
        used.licence,
        used.commercial,
        str(device),
        str(dtype).removeprefix("torch."),
        dataclasses.asdict(options),
        stages.seconds,
        stages.peak_memory,
        digest,
    )


def content_key(source: str, options: Options) -> str:
    """What `Provenance.content` of the scene would be; empty for a list, which is read but once."""
    if source == "-":
        return ""
    _, path = weights.identify(options.model)
    return content.key(
        *inputs.find(source, _of_inputs(options)), dataclasses.asdict(options), sha256(path)
    )


def refine(scene: Scene, options: RefineOptions, progress: Progress = silent) -> Scene:
    """A finished scene with cameras that its photos confirm; depth follows and is fused again.

    Where they confirm none that are better, the scene as it was, with the reasons in `refinement`.
    """
    stages = Stages(torch.device("cpu"), progress)
    loaded = photos.Loaded(scene.images, scene.photos, scene.unreadable)
    before = scene.prediction
    if scene.priors.get("intrinsics", {}).get("fixed"):
        options = dataclasses.replace(options, fixed_intrinsics=True)
    with stages.stage("find tracks"):
        if scene.dense is None:
            maps, size = scene.images.source_from_network, scene.images.source_size
            guessed = guess_from_tracks(resize(before.cameras, maps, size), scene.tracks)
        else:
            guessed = guess(before, scene.images)
        found = follow(scene.photos, scene.images, guessed, None, cache_folder(), progress)
    with stages.stage("refine"):
        improved = improve(loaded, before, list(scene.camera_of_image), found, options)
    warnings = (*scene.warnings, *_words(loaded, improved))
    if improved.tracks is None:
        return dataclasses.replace(scene, refinement=improved.refinement)
    known = scene.made_by.options
    again = Options(
        **{f.name: known[f.name] for f in dataclasses.fields(Options) if f.name in known}
    )
    with stages.stage("fuse"):
        tracks, rgb = colored(improved.tracks, improved.images, again.points)
        dense = scene.dense and _dense(improved.prediction, improved.images, again)
    findings = scene.findings
    if scene.dense is not None:
        with stages.stage("diagnose"):
            findings = diagnose(scene.photos, improved, None, scene.camera_of_image)
    made_by = dataclasses.replace(
        scene.made_by,
        options={**known, "refine": options.method},
        seconds={**scene.made_by.seconds, **stages.seconds},
        peak_memory={**scene.made_by.peak_memory, **stages.peak_memory},
    )
    return dataclasses.replace(
        scene,
        images=improved.images,
        prediction=improved.prediction,
        tracks=tracks,
        rgb=rgb,
        dense=dense,
        made_by=made_by,
        warnings=warnings,
        seen_in="image",
        refinement=improved.refinement,
        findings=findings,
    )


def _weights(options: Options) -> Entry:
    """The entry that the options mean; fetched first if it is named, not here and allowed."""
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


def _shaping(preset: Shaping, resolution: int | None) -> tuple[Shaping, list[str]]:
    """The preset of the weights, or another resolution with a warning."""
    if resolution is None or resolution == preset.resolution:
        return preset, []
    words = (
        f"--resolution {resolution}: these weights were trained at {preset.resolution}, "
        "and other sizes are silently worse"
    )
    log.warning(words)
    return dataclasses.replace(preset, resolution=resolution), [words]


def _of_inputs(options: Options) -> inputs.InputOptions:
    return inputs.InputOptions(options.fps, options.frames, options.masks, options.strict)


def _prior(options: Options, loaded: photos.Loaded) -> given.Given:
    """What the options say of the cameras, read."""
    if options.keep_poses and options.refine == "sfm":
        raise InputError("--keep-poses and --refine sfm contradict", "leave out one of them")
    said = options.intrinsics, options.poses, options.keep_poses, options.scale_from
    return given.read(*said, loaded.photos)


def _improved(
    loaded: photos.Loaded,
    prior: given.Given,
    start: given.Start,
    network: Network,
    options: Options,
    stages: Stages,
) -> tuple[given.Start, Improved]:
    """The start with all that is given, and what the photos at full size make of it."""
    images = loaded.images
    if options.refine == "none":
        start = given.with_poses(prior, start, images, None)
        return start, Improved(images, given.geometry(start, images), None)
    with stages.stage("find tracks"):
        guessed = guess(given.geometry(start, images), images)
        found = follow(loaded.photos, images, guessed, network, cache_folder(), stages.progress)
    with stages.stage("refine"):
        start = given.with_poses(prior, start, images, found.tracks)
        known = start.fixed_intrinsics, options.keep_poses
        how = RefineOptions(options.refine, options.seed, *known)
        return start, improve(loaded, start.prediction, start.group, found, how, start.placed)


def _points(improved: Improved, options: Options) -> tuple[Tracks, Tensor, PointCloud]:
    """Tracks and colours for COLMAP, and the points of points.ply."""
    how = FuseOptions(options.points, options.confidence, options.seed)
    dense = _dense(improved.prediction, improved.images, options)
    if improved.tracks is not None:
        return *colored(improved.tracks, improved.images, options.points), dense
    cloud = fuse(improved.prediction, improved.images, how)
    assert cloud.observations is not None
    return cloud.observations, cloud.rgb, dense


def _dense(prediction: Prediction, images: ImageSet, options: Options) -> PointCloud:
    points = max(DENSE_POINTS, options.points)
    how = FuseOptions(points, options.confidence, options.seed)
    return fuse(prediction, images, how, observe=False)


def _words(loaded: photos.Loaded, improved: Improved) -> list[str]:
    """Say which cameras were chosen and why; warnings for photos that did not take part."""
    done = improved.refinement
    if done is None:
        return []
    kept = "kept" if done.method == "none" else f"refined by {done.method}"
    log.info("cameras %s; %s", kept, done.report["reason"])
    warnings = []
    rows = list(zip(loaded.images.names, done.images, strict=True))
    if moved := [name for name, row in rows if row["pose"] == "re-aligned"]:
        warnings.append(f"predicted pose moved with the others, not refined: {few(moved)}")
    if bent := [name for name, row in rows if row["depth_disagrees"]]:
        warnings.append(f"depth does not have the shape of the points: {few(bent)}")
    return _warned(warnings)


def _warned(warnings: list[str]) -> list[str]:
    for words in warnings:
        log.warning("%s", words)
    return warnings


def plan(source: str, options: Options) -> dict[str, Any]:
    """What `reconstruct` would do, without loading weights or decoding images."""
    device = devices.choose(options.device)
    _, paths = inputs.find(source, _of_inputs(options))
    known = _weights(dataclasses.replace(options, offline=True))
    shaping, warnings = _shaping(known.shaping, options.resolution)
    count, sizes = inputs.measured(paths, _of_inputs(options))
    shaped = [photos.network_size(size, shaping) for size in sizes]
    H, W = (max(size[axis] for size in shaped) for axis in (0, 1))
    return {
        "images": count,
        "first": paths[0].name,
        "last": paths[-1].name,
        "network_size": [H, W],
        "tokens": count * (H // shaping.patch_size) * (W // shaping.patch_size),
        "model": known.name,
        "licence": known.licence.name,
        "device": str(device),
        "dtype": str(devices.compute_dtype(device)).removeprefix("torch."),
        "points": options.points,
        "refine": options.refine,
        "warnings": warnings,
    }
