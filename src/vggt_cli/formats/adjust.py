"""What refinement asks of pycolmap: bundle adjustment, resection and its mappers.

Arrays in, arrays out; one thread and fixed seeds, so that a run can be repeated. What pycolmap
raises becomes a GeometryError. Focal lengths are one for each camera: where f_x and f_y differ,
the rows are stretched before and their ratio stays.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vggt_cli.errors import GeometryError
from vggt_cli.formats.colmap import Array, pycolmap
from vggt_cli.geometry import project_tracks, quaternion_from_rotation
from vggt_cli.scene import Cameras, Setup, Tracks

MIN_MATCHES = 15  # of a pair of images, to be verified


@dataclass(frozen=True)
class Adjustment:
    """What may move in bundle adjustment, and how far an error counts."""

    loss: float  # pixels of the photo at which an error begins to count less
    focal: bool = True
    radial: frozenset[int] = frozenset()  # groups whose coefficient may move
    poses: bool = True
    iterations: int = 50


@contextlib.contextmanager
def _errors(work: str) -> Iterator[None]:
    """What pycolmap raises for numbers that it cannot work with, as a GeometryError."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise GeometryError(f"{work} failed: {words[-1]}") from error


def bundle_adjust(setup: Setup, tracks: Tracks, how: Adjustment) -> Setup:
    """The cameras that see the points of `tracks` with the least robust error (Cauchy).

    The points start at tracks.xyz. The first frame that sees any stays where it is (all do where
    poses may not move), frames that see none are returned as they are; the scale is free, as it is
    in the problem.
    Raises GeometryError where there is no solution.
    """
    frames = sorted(set(tracks.frame.tolist()))
    with _errors("bundle adjustment"):
        module = pycolmap()
        model = _model(module, setup, tracks, how)
        options = module.BundleAdjustmentOptions(
            refine_focal_length=how.focal, refine_extra_params=True, print_summary=False
        )
        options.ceres.loss_function_type = module.LossFunctionType.CAUCHY
        options.ceres.loss_function_scale = how.loss
        solver = options.ceres.solver_options
        solver.num_threads, solver.max_num_iterations = 1, how.iterations
        solver.function_tolerance = 1e-6  # its default of 0 never stops early
        config = module.BundleAdjustmentConfig()
        for frame in frames:
            config.add_image(frame + 1)
        for frame in frames[:1] if how.poses else frames:
            config.set_constant_rig_from_world_pose(model.image(frame + 1).frame_id)
        if not how.focal and not how.radial:
            for number in {setup.group[frame] for frame in frames}:
                config.set_constant_cam_intrinsics(number + 1)
        summary = module.create_default_bundle_adjuster(options, config, model).solve()
        if not summary.is_solution_usable():
            raise GeometryError("bundle adjustment found no solution")
        xyz = np.stack([model.point3D(n + 1).xyz for n in range(len(tracks.xyz))])
        return _in_front(_read_back(model, setup, frames), tracks, torch.from_numpy(xyz))


def _in_front(setup: Setup, tracks: Tracks, xyz: Tensor) -> Setup:
    """The cameras with the points `xyz` [N, 3] before them, not all behind.

    The scale is free, and a long step may turn it negative; projections stay as they were.
    """
    _, z = project_tracks(Tracks(xyz, tracks.point, tracks.frame, tracks.xy), setup.cameras)
    if int((z < 0).sum()) <= len(z) / 2:
        return setup
    R, centers = setup.cameras.extrinsics[:, :, :3], setup.cameras.centers
    mirrored = 2 * centers[int(tracks.frame.min())] - centers  # through the one that stays
    extrinsics = torch.cat([R, -R @ mirrored[..., None]], -1)
    return _with(setup, extrinsics, setup.cameras.intrinsics, setup.radial)


def resect(setup: Setup, frame: int, xy: Tensor, xyz: Tensor, limit: float) -> Tensor | None:
    """Extrinsics [3, 4] of `frame` from points `xyz` [M, 3] at its pixels `xy` [M, 2]; None: none.

    limit: pixels within which a point agrees; at least 15 and a quarter of all must.
    """
    with _errors("resection"):
        module = pycolmap()
        camera = _camera(module, setup, frame, bool(setup.radial[frame] != 0))
        found = module.estimate_and_refine_absolute_pose(
            _square(xy.double(), _aspect(setup)[frame]).numpy(),
            xyz.double().numpy(),
            camera,
            {"ransac": {"max_error": limit, "random_seed": 0}},
        )
    if found is None or found["num_inliers"] < max(15, len(xy) / 4):
        return None
    return torch.from_numpy(found["cam_from_world"].matrix())


def map_images(
    setup: Setup, tracks: Tracks, mapper: Literal["global", "incremental"], seed: int
) -> tuple[Setup, list[int]]:
    """Cameras from matches alone, in a world of their own, and the frames that have one.

    Frames that share at least MIN_MATCHES tracks are verified as a pair; focal lengths are taken
    as known roughly. The rest of the frames is returned as it was.
    Raises GeometryError where no model comes about.
    """
    with _errors(f"{mapper} mapping"), tempfile.TemporaryDirectory() as folder:
        module = pycolmap()
        module.set_random_seed(seed)
        database = Path(folder) / "matches.db"
        pairs = _write_database(module, database, setup, tracks, seed)
        if mapper == "global":
            options = module.GlobalPipelineOptions(random_seed=seed, num_threads=1)
            options.mapper.random_seed, options.mapper.num_threads = seed, 1
            found = module.global_mapping(database, folder, folder, options) if pairs else {}
        else:
            options = module.IncrementalPipelineOptions(
                random_seed=seed, num_threads=1, min_model_size=2, extract_colors=False
            )
            options.ba_global_function_tolerance = 1e-6
            found = module.incremental_mapping(database, folder, folder, options) if pairs else {}
        if not found:
            raise GeometryError(f"{mapper} mapping found no model in {pairs} pairs of images")
        model = max(found.values(), key=lambda model: model.num_reg_images())
        frames = sorted(number - 1 for number in model.reg_image_ids())
        return _read_back(model, setup, frames), frames


def two_photos(setup: Setup, tracks: Tracks, seed: int) -> Setup:
    """Two cameras from their matches: the second turns and moves, the baseline keeps its length.

    Raises GeometryError where they have no relative pose.
    """
    with _errors("two-view geometry"):
        module = pycolmap()
        rows = (np.flatnonzero(tracks.frame.numpy() == i) for i in (0, 1))
        first, second = _matched(tracks, *rows)
        geometry = _verify(module, setup, tracks, (0, 1), (first, second), seed)
        if geometry.cam2_from_cam1 is None or len(geometry.inlier_matches) < MIN_MATCHES:
            raise GeometryError(f"{len(first)} matches of two photos agree on no relative pose")
        relative = torch.from_numpy(geometry.cam2_from_cam1.matrix())
    extrinsics = setup.cameras.extrinsics.clone()
    length = (setup.cameras.centers[1] - setup.cameras.centers[0]).norm()
    relative[:, 3] *= length / relative[:, 3].norm().clamp(min=1e-30)
    extrinsics[1, :, :3] = relative[:, :3] @ extrinsics[0, :, :3]
    extrinsics[1, :, 3] = relative[:, :3] @ extrinsics[0, :, 3] + relative[:, 3]
    return _with(setup, extrinsics, setup.cameras.intrinsics, setup.radial)


def _with(setup: Setup, extrinsics: Tensor, intrinsics: Tensor, radial: Tensor) -> Setup:
    return Setup(Cameras(extrinsics, intrinsics, setup.cameras.image_size), radial, setup.group)


def _aspect(setup: Setup) -> Tensor:
    """[S] f_x / f_y."""
    return setup.cameras.intrinsics[:, 0, 0] / setup.cameras.intrinsics[:, 1, 1]


def _square(xy: Tensor, aspect: Tensor) -> Tensor:
    """Pixels with rows stretched so that f_y equals f_x."""
    return torch.stack([xy[..., 0], xy[..., 1] * aspect], -1)


def _camera(module: Any, setup: Setup, frame: int, bent: bool) -> Any:
    k, aspect = setup.cameras.intrinsics[frame], _aspect(setup)[frame]
    h, w = setup.cameras.image_size[frame].tolist()
    parameters = [float(k[0, 0]), float(k[0, 2]), float(k[1, 2] * aspect)]
    return module.Camera(
        camera_id=setup.group[frame] + 1,
        model="SIMPLE_RADIAL" if bent else "SIMPLE_PINHOLE",
        width=w,
        height=round(h * float(aspect)),
        params=[*parameters, float(setup.radial[frame])] if bent else parameters,
        has_prior_focal_length=True,
    )


def _pose(module: Any, extrinsics: Tensor) -> Any:
    # Rotation3d takes a matrix that is no rotation without a word.
    quaternion = quaternion_from_rotation(extrinsics[:, :3])
    rotation = module.Rotation3d((quaternion / quaternion.norm()).numpy())
    return module.Rigid3d(rotation, extrinsics[:, 3].numpy())


def _model(module: Any, setup: Setup, tracks: Tracks, how: Adjustment) -> Any:
    """A pycolmap model of the frames that see points, image and camera ids from 1."""
    model = module.Reconstruction()
    frame, xyz = tracks.frame.numpy(), tracks.xyz.double().numpy()
    xy = _square(tracks.xy.double(), _aspect(setup)[tracks.frame.long()]).numpy()
    index = np.empty(len(frame), np.int64)
    for i in sorted(set(frame.tolist())):
        number = setup.group[i]
        if number + 1 not in model.cameras:
            bent = number in how.radial or bool(setup.radial[i] != 0)
            model.add_camera_with_trivial_rig(_camera(module, setup, i, bent))
        rows = np.flatnonzero(frame == i)
        index[rows] = np.arange(len(rows))
        image = module.Image(
            name=f"{i:06d}", keypoints=xy[rows], camera_id=number + 1, image_id=i + 1
        )
        model.add_image_with_trivial_frame(image, _pose(module, setup.cameras.extrinsics[i]))
    ends = np.searchsorted(tracks.point.numpy(), np.arange(len(xyz) + 1)).tolist()
    elements = [
        module.TrackElement(i, k) for i, k in zip((frame + 1).tolist(), index.tolist(), strict=True)
    ]
    gray = np.zeros(3, np.uint8)
    for n, place in enumerate(xyz):
        model.add_point3D(place, module.Track(elements[ends[n] : ends[n + 1]]), gray)
    return model


def _read_back(model: Any, setup: Setup, frames: list[int]) -> Setup:
    """The setup with what `model` says about `frames`, and about the lenses that they share."""
    extrinsics, radial = setup.cameras.extrinsics.clone(), setup.radial.clone()
    intrinsics, aspect = setup.cameras.intrinsics.clone(), _aspect(setup)
    for frame in frames:
        extrinsics[frame] = torch.from_numpy(model.image(frame + 1).cam_from_world().matrix())
    for number in {setup.group[frame] for frame in frames}:
        parameters = model.cameras[number + 1].params.tolist()
        for frame in (i for i, g in enumerate(setup.group) if g == number):
            intrinsics[frame, 0, 0] = parameters[0]
            intrinsics[frame, 1, 1] = parameters[0] / aspect[frame]
            radial[frame] = parameters[3] if len(parameters) > 3 else 0.0
    if not (extrinsics.isfinite().all() and intrinsics.isfinite().all()):
        raise GeometryError("bundle adjustment gave no finite cameras")
    return _with(setup, extrinsics, intrinsics, radial)


def _matched(tracks: Tracks, rows_i: Array, rows_j: Array) -> tuple[Array, Array]:
    """Of the observations in two frames those of the points that both see."""
    point = tracks.point.numpy()
    _, a, b = np.intersect1d(point[rows_i], point[rows_j], return_indices=True)
    return rows_i[a], rows_j[b]


def _verify(
    module: Any,
    setup: Setup,
    tracks: Tracks,
    pair: tuple[int, int],
    rows: tuple[Array, Array],
    seed: int,
) -> Any:
    sides = []
    for frame, of_frame in zip(pair, rows, strict=True):
        xy = tracks.xy[torch.from_numpy(of_frame)].double()
        camera = _camera(module, setup, frame, bool(setup.radial[frame] != 0))
        sides += [camera, _square(xy, _aspect(setup)[frame]).numpy()]
    matches = np.repeat(np.arange(len(rows[0]), dtype=np.uint32)[:, None], 2, axis=1)
    options = {"compute_relative_pose": True, "ransac": {"random_seed": seed}}
    return module.estimate_two_view_geometry(*sides, matches, options)


def _write_database(module: Any, path: Path, setup: Setup, tracks: Tracks, seed: int) -> int:
    """How many pairs of images were verified; observations are the keypoints of their image."""
    frame = tracks.frame.numpy()
    xy = _square(tracks.xy.double(), _aspect(setup)[tracks.frame.long()]).float().numpy()
    index = np.empty(len(frame), np.uint32)
    frames, pairs, rows = sorted(set(frame.tolist())), 0, dict[int, Array]()
    with module.Database.open(path) as database:
        for i in frames:
            _write_image(module, database, setup, i)
            rows[i] = np.flatnonzero(frame == i)
            index[rows[i]] = np.arange(len(rows[i]))
            database.write_keypoints(i + 1, xy[rows[i]])
        for n, i in enumerate(frames):
            for j in frames[n + 1 :]:
                shared = _matched(tracks, rows[i], rows[j])
                if len(shared[0]) < MIN_MATCHES:
                    continue
                geometry = _verify(module, setup, tracks, (i, j), shared, seed)
                inliers = geometry.inlier_matches[:, 0]
                matches = np.stack([index[side] for side in shared], 1)
                geometry.inlier_matches = matches[inliers]
                database.write_matches(i + 1, j + 1, matches)
                database.write_two_view_geometry(i + 1, j + 1, geometry)
                pairs += len(inliers) >= MIN_MATCHES
    return pairs


def _write_image(module: Any, database: Any, setup: Setup, i: int) -> None:
    """Image i + 1 with its camera, a rig of one sensor and a frame of one image."""
    number = setup.group[i] + 1
    if not database.exists_camera(number):
        bent = setup.group.count(setup.group[i]) >= 5
        camera = _camera(module, setup, i, bent)
        database.write_camera(camera, use_camera_id=True)
        rig = module.Rig(rig_id=number)
        rig.add_ref_sensor(camera.sensor_id)
        database.write_rig(rig, use_rig_id=True)
    image = module.Image(name=f"{i:06d}", camera_id=number, image_id=i + 1)
    database.write_image(image, use_image_id=True)
    frame = module.Frame(rig_id=number, frame_id=i + 1)
    frame.add_data_id(image.data_id)
    database.write_frame(frame, use_frame_id=True)
