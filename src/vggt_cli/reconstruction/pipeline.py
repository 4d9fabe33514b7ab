"""The main job: the steps in order, and the only place that knows the order."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats import decode
from vggt_cli.formats import images as photos
from vggt_cli.formats.lenses import camera_groups
from vggt_cli.formats.names import few
from vggt_cli.geometry import resize, share_intrinsics
from vggt_cli.models import weights
from vggt_cli.models.networks import Network
from vggt_cli.models.store import sha256
from vggt_cli.reconstruction import content, given, inputs, plan
from vggt_cli.reconstruction.detect import cache_folder
from vggt_cli.reconstruction.diagnose import diagnose
from vggt_cli.reconstruction.fuse import FuseOptions, fuse
from vggt_cli.reconstruction.improve import Improved, colored, improve
from vggt_cli.reconstruction.pairs import ALL_PAIRS, guess, guess_from_tracks
from vggt_cli.reconstruction.refine import RefineOptions
from vggt_cli.reconstruction.sequence import predicted
from vggt_cli.reconstruction.settings import Options, Setting, settle
from vggt_cli.reconstruction.stages import Progress, Stages, silent
from vggt_cli.reconstruction.tracks import follow
from vggt_cli.scene import ImageSet, PointCloud, Prediction, Provenance, Scene, Tracks

log = logging.getLogger(__name__)


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
    setting = settle(options)
    stages = Stages(setting.device, progress)
    with stages.stage("load images"):
        root, paths = inputs.find(source, options.inputs)
        digest = _key(root, paths, options)  # of the photos as they are read, not as they end
        sources = inputs.gather(root, paths, options.inputs, progress)
        sizes = decode.upright_sizes(sources.paths)
        work = setting.plan(options, sizes, len(sources.paths)).work
        size = work.size if work.on_disk else None
        loaded = inputs.read(sources, setting.shaping, size, options.strict, progress)
    warnings = [*setting.warnings, *sources.warnings, *_unrefined(work, options)]
    stages.work = f"{len(loaded.images)} images of {decode.words(loaded.images.size)}"
    group, prior = camera_groups(loaded.photos, options.camera), _prior(options, loaded)
    with stages.stage("load weights"):
        wanted = setting.network(options, work.refined)
        network, used = weights.kept(wanted, networks, partial(progress, "load weights"))
    with stages.stage("predict"):
        prediction, drift = predicted(network, loaded.images, work, stages)
    raw, prediction = prediction.cameras, _with_shared_cameras(prediction, group)
    start = given.begin(prior, prediction, group, loaded.images)
    how = options if work.refined else dataclasses.replace(options, refine="none")
    together = network if drift is None else None  # its track head wants all frames at once
    start, improved = _improved(loaded, prior, start, together, how, stages)
    improved, metric = given.in_metres(prior, start, improved, loaded.photos)
    warnings += _warned([*start.warnings, *improved.warnings]) + _words(loaded, improved)
    with stages.stage("fuse"):
        tracks, rgb, dense = _points(improved, options)
    with stages.stage("diagnose"):
        findings = diagnose(loaded.photos, improved, raw, start.group)
    made_by = _made_by(used, setting, options, stages, digest)
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
        drift or {},
    )


def _unrefined(work: plan.Work, options: Options) -> list[str]:
    """A warning where there are too many images for the refinement that would be usual."""
    if work.refined or options.refine == "none":
        return []
    return _warned(
        [
            f"{work.frames} images, so the predicted cameras are kept; up to {ALL_PAIRS} are "
            "refined, or as many as there are with --refine ba"
        ]
    )


def _with_shared_cameras(prediction: Prediction, group: list[int]) -> Prediction:
    return dataclasses.replace(prediction, cameras=share_intrinsics(prediction.cameras, group))


def _made_by(
    used: weights.Weights, setting: Setting, options: Options, stages: Stages, digest: str
) -> Provenance:
    return Provenance(
        used.name,
        used.sha256,
        used.licence,
        used.commercial,
        str(setting.device),
        str(setting.dtype).removeprefix("torch."),
        dataclasses.asdict(options),
        stages.seconds,
        stages.peak_memory,
        digest,
    )


def content_key(source: str, options: Options) -> str:
    """What `Provenance.content` of the scene would be; empty for a list, which is read but once."""
    return "" if source == "-" else _key(*inputs.find(source, options.inputs), options)


def _key(root: Path, paths: Sequence[Path], options: Options) -> str:
    _, path = weights.identify(options.model)
    return content.key(root, paths, dataclasses.asdict(options), sha256(path))


def refine(scene: Scene, options: RefineOptions, progress: Progress = silent) -> Scene:
    """A finished scene with cameras that its photos confirm; depth follows and is fused again.

    Where they confirm none that are better, the scene as it was, with the reasons in `refinement`.
    Intrinsics and poses that were given to be kept stay; raises InputError for "sfm" with poses.
    """
    known = scene.made_by.options
    if known.get("keep_poses"):
        if options.method == "sfm":
            raise InputError("made with --keep-poses, which sfm would not", "give --method ba")
        options = dataclasses.replace(options, fixed_poses=True)
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
    network: Network | None,
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
    points = max(plan.DENSE_POINTS, options.points)
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


def foresee(source: str, options: Options) -> dict[str, Any]:
    """What `reconstruct` would do, without loading weights or decoding images."""
    setting = settle(dataclasses.replace(options, offline=True))
    _, paths = inputs.find(source, options.inputs)
    count, sizes = inputs.measured(paths, options.inputs)
    planned = setting.plan(options, sizes, count)
    H, W = planned.work.size
    return {
        "images": count,
        "first": paths[0].name,
        "last": paths[-1].name,
        "network_size": [H, W],
        "tokens": count * (H // setting.shaping.patch_size) * (W // setting.shaping.patch_size),
        "model": setting.weights.name,
        "licence": setting.weights.licence.name,
        "device": str(setting.device),
        "dtype": planned.work.dtype,
        "points": options.points,
        "refine": options.refine if planned.work.refined else "none",
        **planned.report(),
        "warnings": [*setting.warnings, *_unrefined(planned.work, options)],
    }
