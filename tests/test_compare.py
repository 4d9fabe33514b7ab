"""Comparing two models: figures by hand and by evo, names, and words."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_similarity import drawn
from torch import Tensor
from typer.testing import CliRunner

from vggt_cli.cli import app
from vggt_cli.errors import InputError
from vggt_cli.formats import colmap
from vggt_cli.formats.colmap import Model
from vggt_cli.geometry import invert, move, rotation_from_quaternion
from vggt_cli.learning import metrics
from vggt_cli.learning.compare import compare, pair_photos
from vggt_cli.scene import Cameras, Tracks

CENTERS = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 2, 0], [2, 2, 0]], dtype=torch.float64)


def model_at(centers: Tensor, points: Tensor | None = None, focal: float = 100.0) -> Model:
    """Cameras that look along z from `centers`, with points that the first two see."""
    extrinsics = torch.cat(
        [torch.eye(3).double().repeat(len(centers), 1, 1), -centers[..., None]], -1
    )
    k = torch.tensor([[focal, 0, 40], [0, focal, 30], [0, 0, 1]], dtype=torch.float64)
    cameras = Cameras(
        extrinsics, k.repeat(len(centers), 1, 1), torch.tensor([[60, 80]]).repeat(len(centers), 1)
    )
    xyz = torch.tensor([[0.0, 0, 5], [1, 0, 5]]) if points is None else points
    point = torch.arange(len(xyz)).repeat_interleave(2)
    frame = torch.tensor([0, 1], dtype=torch.int32).repeat(len(xyz))
    tracks = Tracks(xyz, point, frame, torch.zeros(len(point), 2))
    names = tuple(f"{i}.jpg" for i in range(len(centers)))
    return Model(names, cameras, (0,) * len(centers), tracks, np.zeros((len(xyz), 3), np.uint8))


def moved(model: Model, seed: int = 5) -> Model:
    """The same model in another world."""
    similarity = drawn(seed)
    tracks = replace(model.tracks, xyz=similarity(model.tracks.xyz))
    return replace(model, cameras=move(model.cameras, similarity), tracks=tracks)


def test_a_model_in_another_world_and_at_another_size_of_photo_has_no_error() -> None:
    reference = model_at(CENTERS)
    other = moved(reference)
    cameras = other.cameras
    larger = cameras.intrinsics * torch.tensor([[3.0], [3.0], [1.0]])
    other = replace(other, cameras=Cameras(cameras.extrinsics, larger, cameras.image_size * 3))
    found = compare(other, reference)
    assert found.photos == (4, 4, 4)
    assert found.rotation == pytest.approx(0, abs=1e-5)
    assert found.direction == pytest.approx(0, abs=1e-5)
    assert set(found.auc) == {3, 5, 10, 30}
    assert set(found.auc.values()) == {100}
    assert found.focal == pytest.approx(0, abs=1e-12)
    assert found.centers is not None
    assert found.points is not None
    assert found.centers.ate == pytest.approx(0, abs=1e-9)
    assert found.centers.scale == pytest.approx(1 / drawn(5).scale)
    assert found.points.chamfer == pytest.approx(0, abs=1e-5)


def test_errors_are_those_worked_out_by_hand() -> None:
    reference = model_at(CENTERS, torch.tensor([[0.0, 0, 5], [1, 0, 5]]))
    # A square whose corners go out by d along a diagonal and in along the other: a similarity can
    # only scale, by the mean; what remains is d at every corner.
    d = 0.1
    out = torch.tensor([[-1.0, -1, 0], [-1, 1, 0], [1, -1, 0], [1, 1, 0]]) * d / math.sqrt(2)
    other = model_at(CENTERS + out.double(), torch.tensor([[0.0, 0, 5]]), focal=110)
    found = compare(other, reference)
    assert found.centers is not None
    assert found.points is not None
    # Diagonals sqrt 2 + d and sqrt 2 - d (from the centre) over sqrt 2: the fit keeps their mean
    # square, s = 2 sqrt 2 sqrt 2 / ((sqrt 2 + d)^2 + (sqrt 2 - d)^2) = 2 / (2 + d^2).
    scale = 2 / (2 + d**2)
    assert found.centers.scale == pytest.approx(scale)
    residuals = [scale * (math.sqrt(2) + sign * d) - math.sqrt(2) for sign in (1, -1)]
    assert found.centers.ate == pytest.approx(math.sqrt(sum(r**2 for r in residuals) / 2))
    assert found.centers.extent == pytest.approx(math.sqrt(2))
    assert found.centers.worst == pytest.approx(max(map(abs, residuals)))
    assert found.focal == pytest.approx(0.1)
    assert found.rotation == pytest.approx(0, abs=1e-6)
    # Sides of the square turn by atan(d / sqrt 2 ...): (2, 0) becomes (2, sqrt 2 d).
    assert found.direction == pytest.approx(math.degrees(math.atan(math.sqrt(2) * d / 2)), abs=1e-4)
    # The one point (0, 0, 5) shrinks towards the centre of alignment (1, 1, 0).
    at = torch.tensor([1 - scale, 1 - scale, 5 * scale])
    near, far = (float((at - p).norm()) for p in reference.tracks.xyz)
    assert found.points.accuracy == pytest.approx(near, rel=1e-5)
    assert found.points.completeness == pytest.approx((near + far) / 2, rel=1e-5)
    assert found.points.chamfer == pytest.approx((near + (near + far) / 2) / 2, rel=1e-5)


def test_ate_and_turns_equal_those_of_evo() -> None:
    evo = pytest.importorskip("evo.core.metrics", reason="evo is not installed")
    from evo.core.trajectory import PosePath3D

    random = torch.Generator().manual_seed(0)
    rotation = rotation_from_quaternion(torch.randn(2, 7, 4, generator=random).double())
    centers = torch.randn(2, 7, 3, generator=random).double()
    extrinsics = torch.cat([rotation, -rotation @ centers[..., None]], -1)
    last = torch.tensor([[[0.0, 0, 0, 1]]]).repeat(7, 1, 1)
    paths = [
        PosePath3D(poses_se3=list(torch.cat([invert(e), last], 1).numpy())) for e in extrinsics
    ]
    models = [model_at(CENTERS[:1].repeat(7, 1)) for _ in paths]
    ours, reference = (
        replace(m, cameras=replace(m.cameras, extrinsics=e))
        for m, e in zip(models, extrinsics, strict=True)
    )
    paths[0].align(paths[1], correct_scale=True)
    ape = evo.APE(evo.PoseRelation.translation_part)
    ape.process_data((paths[1], paths[0]))
    found = compare(ours, reference)
    assert found.centers is not None
    assert found.centers.ate == pytest.approx(ape.get_statistic(evo.StatisticsType.rmse))
    assert found.centers.worst == pytest.approx(ape.get_statistic(evo.StatisticsType.max))
    rpe = evo.RPE(
        evo.PoseRelation.rotation_angle_deg, delta=1, delta_unit=evo.Unit.frames, all_pairs=True
    )
    rpe.process_data((paths[1], paths[0]))
    turns, _ = metrics.relative_pose_errors(extrinsics[0], extrinsics[1])
    first, second = torch.triu_indices(7, 7, 1)
    assert turns[second == first + 1].tolist() == pytest.approx(rpe.error.tolist())


def test_photos_are_paired_by_name_and_otherwise_only_where_nothing_is_ambiguous() -> None:
    assert pair_photos(("a.jpg", "b.jpg", "c.jpg"), ("c.jpg", "a.jpg")) == ([0, 2], [1, 0])
    ours = ("left__0.jpg", "left__1.jpg", "right__0.jpg", "my_photo.jpg")
    theirs = ("right/0.jpg", "left/0.jpg", "my photo.jpg", "left/1.jpg")
    assert pair_photos(ours, theirs) == ([0, 1, 2, 3], [1, 3, 0, 2])
    assert pair_photos(("0.jpg", "1.jpg"), ("x/0.jpg", "x/1.jpg")) == ([0, 1], [0, 1])
    with pytest.raises(InputError, match="0 photos are in both models, of 2 and 2"):
        pair_photos(("x/0.jpg", "y/0.jpg"), ("z/0.jpg", "1.jpg"))


def test_photos_of_one_model_alone_are_counted_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reference = model_at(CENTERS)
    names = ("0.jpg", "deep/1.jpg", "2.jpg", "9.jpg")
    found = compare(replace(reference, names=names), reference)
    assert found.photos == (4, 4, 3)
    words = caplog.text
    assert "1 photos have other names" in words
    assert "3 photos are in both models, of 4 and 4" in words
    assert "only the first has 9.jpg; only the second has 3.jpg" in words


def test_two_photos_have_no_area_and_cameras_at_one_place_no_distances(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = compare(moved(model_at(CENTERS[:2])), model_at(CENTERS[:2]))
    assert not found.auc
    assert found.centers is not None
    assert found.centers.ate == pytest.approx(0, abs=1e-9)
    still = model_at(torch.zeros(4, 3).double())
    found = compare(still, model_at(CENTERS))
    assert found.centers is None
    assert found.points is None
    assert found.direction == 90
    assert "no ATE" in caplog.text
    none = model_at(CENTERS, torch.zeros(0, 3))
    assert compare(none, model_at(CENTERS)).points is None


def test_scenes_and_models_binary_and_text_are_compared_as_a_table_and_as_json(
    tmp_path: Path,
) -> None:
    reference = model_at(CENTERS)
    colmap.write_text(reference, tmp_path / "theirs")
    colmap.write(moved(reference), tmp_path / "ours/sparse/0")
    arguments = ["compare", str(tmp_path / "ours"), str(tmp_path / "theirs")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == f"A: {tmp_path / 'ours/sparse/0'} (4 photos, 2 points)"
    assert lines[1] == f"B: {tmp_path / 'theirs'} (4 photos, 2 points)"
    first = [line.split()[0] for line in lines[2:] if line.strip()]
    for name in ("rotation", "direction", "AUC@3", "AUC@30", "focal", "ATE", "chamfer"):
        assert name in first
    assert all(len(line) <= 120 for line in lines[2:])
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["reference"] == str(tmp_path / "theirs")
    assert found["point_counts"] == [2, 2]
    assert found["photos"] == [4, 4, 4]
    assert found["auc"]["3"] == 100
    assert found["centers"]["ate"] == pytest.approx(0, abs=1e-6)
