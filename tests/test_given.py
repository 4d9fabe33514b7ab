"""Priors on their way through a run: options, order of the steps, metres, report."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from posed import arc
from test_priors import OPENGL, scattered, write_transforms, written
from test_similarity import drawn

from vggt_cli.errors import InputError
from vggt_cli.formats import export, scene_read
from vggt_cli.formats.decode import size_of
from vggt_cli.geometry import move
from vggt_cli.models import weights
from vggt_cli.reconstruction import given, pipeline
from vggt_cli.reconstruction.improve import Improved
from vggt_cli.reconstruction.readings import Reading
from vggt_cli.reconstruction.settings import Options
from vggt_cli.scene import ImageSet, Photo, Prediction, Similarity

MINI = Options(model="mini", points=3000, device="cpu", refine="none")
PHOTOS = [Photo(Path(f"{i:04d}.jpg"), f"{i:04d}.jpg", (480, 640)) for i in range(7)]


def seen(frames: int = 7) -> tuple[Prediction, ImageSet]:
    """A prediction in network pixels, a tenth of the photos', and its images."""
    true = scattered(frames)
    small = true.intrinsics * torch.tensor([[0.1], [0.1], [1.0]])
    cameras = dataclasses.replace(
        true,
        extrinsics=true.extrinsics.float(),
        intrinsics=small.float(),
        image_size=torch.tensor([[48, 64]]).repeat(frames, 1),
    )
    maps = torch.diag(torch.tensor([10.0, 10, 1], dtype=torch.float64)).repeat(frames, 1, 1)
    names = tuple(photo.name for photo in PHOTOS[:frames])
    valid = torch.ones(frames, 48, 64, dtype=torch.bool)
    images = ImageSet(names, torch.zeros(frames, 3, 48, 64), valid, maps, true.image_size)
    depth = torch.full((frames, 48, 64), 2.0)
    return Prediction(cameras, depth, torch.ones_like(depth)), images


def test_given_intrinsics_replace_the_predicted_in_network_pixels() -> None:
    prediction, images = seen()
    prior = given.read("600,610,320,250", None, False, None, PHOTOS)
    start = given.begin(prior, prediction, [0] * 7, images)
    assert start.fixed_intrinsics
    assert start.group == [0] * 7
    k = start.prediction.cameras.intrinsics[3]
    torch.testing.assert_close(k, torch.tensor([[60.0, 0, 32], [0, 61, 25], [0, 0, 1]]))
    assert "differ from the prediction by more than 10%" in start.warnings[0]


def test_given_poses_are_placed_at_once_unless_they_look_misread(tmp_path: Path) -> None:
    prediction, images = seen()
    moved = move(scattered(), drawn(3))
    right = write_transforms(tmp_path / "t.json", written(moved, Reading(True, OPENGL), True))
    prior = given.read(None, str(right), False, None, PHOTOS)
    start = given.begin(prior, prediction, [0] * 7, images)
    assert start.placed is not None
    assert given.with_poses(prior, start, images, None) is start
    extrinsics = given.geometry(start, images).cameras.extrinsics
    torch.testing.assert_close(extrinsics, prediction.cameras.extrinsics, atol=1e-5, rtol=0)
    wrong = write_transforms(tmp_path / "w.json", written(moved, Reading(False, OPENGL), True))
    prior = given.read(None, str(wrong), False, None, PHOTOS)
    start = given.begin(prior, prediction, [0] * 7, images)
    assert start.placed is None
    with pytest.raises(InputError, match="world-to-camera"):
        given.with_poses(prior, start, images, None)


@pytest.mark.parametrize("scale_from", ["0001-0004=2.5m", "poses"])
def test_cameras_and_depth_come_to_metres_together(tmp_path: Path, scale_from: str) -> None:
    prediction, images = seen()
    centers = scattered().centers
    factor = 2.5 / float((centers[1] - centers[4]).norm())
    metric = move(scattered(), Similarity(factor, drawn(3).rotation, drawn(3).translation))
    path = write_transforms(tmp_path / "t.json", written(metric, Reading(True, OPENGL), True))
    prior = given.read(None, str(path), False, scale_from, PHOTOS)
    start = given.begin(prior, prediction, [0] * 7, images)
    improved, found = given.in_metres(prior, start, Improved(images, prediction, None), PHOTOS)
    assert found is not None
    assert found.factor == pytest.approx(factor, rel=1e-5)
    moved = improved.prediction.cameras.centers
    assert float((moved[1] - moved[4]).norm()) == pytest.approx(2.5, rel=1e-5)
    assert float(improved.prediction.depth[0, 0, 0]) == pytest.approx(2 * factor, rel=1e-5)
    report = given.report(prior, start, found)
    json.dumps(report, allow_nan=False)
    assert report["scale"]["metres_per_unit"] == found.factor
    assert len(report["poses"]["from_prediction"]) == 7


def test_nothing_given_changes_nothing() -> None:
    prediction, images = seen()
    prior = given.read(None, None, False, None, PHOTOS)
    start = given.begin(prior, prediction, [0, 1, 0, 1, 0, 1, 0], images)
    assert start.prediction is prediction
    assert start.group == [0, 1, 0, 1, 0, 1, 0]
    assert given.geometry(start, images) is prediction
    improved = Improved(images, prediction, None)
    assert given.in_metres(prior, start, improved, PHOTOS) == (improved, None)
    assert given.report(prior, start, None) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_poses": True}, "--keep-poses without --poses"),
        ({"scale_from": "poses"}, "--scale-from poses without --poses"),
        ({"scale_from": "gps"}, "0 of 2 photos have a GPS position"),
        ({"scale_from": "left-right"}, "no distance with a unit"),
        ({"poses": "none.json"}, "no such file"),
        ({"intrinsics": "none.txt"}, "neither fx,fy,cx,cy nor a file"),
        ({"keep_poses": True, "poses": "t.json", "refine": "sfm"}, "contradict"),
    ],
)
def test_what_cannot_be_is_said_before_the_network_runs(
    options: dict[str, Any], words: str, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "load", lambda *_: pytest.fail("the network was loaded"))
    with pytest.raises(InputError, match=words):
        pipeline.reconstruct(str(examples / "motorcycle"), dataclasses.replace(MINI, **options))


def test_a_pair_of_photos_goes_through_with_all_that_is_known(
    examples: Path, tmp_path: Path
) -> None:
    h, w = size_of(examples / "motorcycle/left.png")
    true = arc(2, 3.0)
    poses = written(true, Reading(True, OPENGL), True)
    poses = dataclasses.replace(poses, names=("left.jpg", "right.jpg"))
    path = write_transforms(tmp_path / "t.json", poses, fl_x=w, w=2 * w, h=2 * h)
    known: dict[str, Any] = {"poses": str(path), "intrinsics": str(path), "scale_from": "poses"}
    options = dataclasses.replace(MINI, keep_poses=True, **known)
    scene = pipeline.reconstruct(str(examples / "motorcycle"), options)
    assert scene.scale == "metric"
    k = export.as_colmap(scene, ["left.png", "right.png"]).cameras.intrinsics[1]
    wanted = torch.tensor([[w / 2, 0, w / 2], [0, w / 2, h / 2], [0, 0, 1]])
    torch.testing.assert_close(k.float(), wanted, atol=1e-2, rtol=0)
    centers = scene.prediction.cameras.centers
    apart = float((true.centers[0] - true.centers[1]).norm())
    assert float((centers[0] - centers[1]).norm()) == pytest.approx(apart, rel=1e-4)
    export.write(scene, tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["priors"]["scale"]["from"] == "poses"
    assert report["scale"] == "metric"
    assert scene_read.read(tmp_path / "out").priors == scene.priors
