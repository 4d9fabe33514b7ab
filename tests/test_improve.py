"""Real photos through the whole job with refinement, with the bundled network."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import refused, vggt

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap_read, export, scene_read
from vggt_cli.geometry import (
    pixel_centers,
    project_tracks,
    reframe,
    resize,
    sample,
    undistort,
)
from vggt_cli.learning.metrics import auc, relative_pose_errors
from vggt_cli.reconstruction import pipeline, plan
from vggt_cli.reconstruction.fuse import FuseOptions, fuse
from vggt_cli.reconstruction.refine import RefineOptions
from vggt_cli.reconstruction.settings import Options
from vggt_cli.scene import Cameras, Scene

pytestmark = pytest.mark.colmap
MINI = Options(model="mini", points=3000, device="cpu")


@pytest.fixture(scope="module")
def photos(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of a wall with figures at half size, one of nothing, and one of elsewhere."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted((shared / "data/herzjesu_p8/images").glob("*.jpg"))[2:6]:
        Image.open(path).resize((512, 342)).save(folder / path.name, quality=95)
    Image.fromarray(np.full((342, 512, 3), 120, np.uint8)).save(folder / "gray.jpg")
    with Image.open(sorted((shared / "data/banana/images").iterdir())[0]) as elsewhere:
        elsewhere.resize((512, 342)).save(folder / "other.jpg")
    return folder


@pytest.fixture(scope="module")
def true(shared: Path) -> Cameras:
    """The reference cameras of the four."""
    return colmap_read.read(shared / "data/herzjesu_p8/reference").cameras[2:6]


@pytest.fixture(scope="module")
def rough(photos: Path) -> Scene:
    return pipeline.reconstruct(str(photos), replace(MINI, refine="none"))


@pytest.fixture(scope="module")
def refined(photos: Path) -> Scene:
    return pipeline.reconstruct(str(photos), MINI)


def errors(scene: Scene, true: Cameras) -> tuple[torch.Tensor, torch.Tensor]:
    return relative_pose_errors(scene.prediction.cameras.extrinsics[:4], true.extrinsics)


def test_photos_bring_rough_cameras_to_a_fraction_of_a_degree(
    rough: Scene, refined: Scene, true: Cameras
) -> None:
    assert refined.refinement is not None
    assert refined.refinement.method in ("ba", "sfm"), refined.refinement.report
    assert auc(*errors(refined, true), 3) == 100
    assert errors(refined, true)[0].max() < 0.3 * errors(rough, true)[0].max()


def test_one_bad_image_never_ends_the_run_and_is_named(refined: Scene) -> None:
    assert refined.refinement is not None
    poses = [row["pose"] for row in refined.refinement.images]
    assert poses == ["kept"] * 4 + ["re-aligned"] * 2
    for row in refined.refinement.images[4:]:
        assert "observations agree with other images" in row["reason"]
    assert any("gray.jpg, other.jpg" in words for words in refined.warnings)


def test_observations_are_measured_and_fit_the_written_cameras(refined: Scene) -> None:
    assert refined.seen_in == "image"
    model = export.as_colmap(refined, list(refined.images.names))
    xy, z = project_tracks(refined.tracks, model.cameras)
    error = (xy - refined.tracks.xy).norm(dim=-1)
    assert (z > 0).all()
    assert error.max() < 1.1  # 2 pixels at 1024
    assert error.median() < 0.2


def test_depth_follows_the_points(rough: Scene, refined: Scene) -> None:
    """Each frame takes one scale and shift, and then agrees better with what was measured."""
    tracks, images = refined.tracks, refined.images
    cameras = refined.prediction.cameras
    _, z = project_tracks(tracks, resize(cameras, images.source_from_network, images.source_size))
    maps = images.source_from_network.inverse()[tracks.frame.long()]
    xy = torch.cat([tracks.xy.double(), torch.ones(len(z), 1)], -1)
    column, row = (maps @ xy[..., None])[:, :2, 0].long().unbind(-1)
    apart = [
        (scene.prediction.depth[tracks.frame.long(), row, column] / z - 1).abs().median()
        for scene in (rough, refined)
    ]
    assert apart[1] < apart[0]
    assert refined.dense is not None
    assert torch.equal(refined.dense.xyz, fuse_again(refined))


def fuse_again(scene: Scene) -> torch.Tensor:
    how = FuseOptions(plan.DENSE_POINTS, MINI.confidence, MINI.seed)
    return fuse(scene.prediction, scene.images, how, observe=False).xyz


def test_the_scene_says_what_was_refined(refined: Scene, tmp_path: Path) -> None:
    export.write(refined, tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["tracks"] == "image"
    held = report["refinement"]["held_out"]
    assert held["after"]["share"] > held["before"]["share"]
    row = report["images"][0]["refinement"]
    assert 50 < report["images"][0]["observations"] <= row["inliers"] <= row["observations"]
    assert row["error_after_pixels"] < row["error_before_pixels"]
    assert report["images"][4]["refinement"]["error_after_pixels"] is None
    page = (tmp_path / "out/scene.html").read_text(encoding="utf-8")
    assert '"predicted":[' in page


def test_a_finished_scene_is_refined_to_the_same_cameras(
    rough: Scene, refined: Scene, tmp_path: Path
) -> None:
    export.write(rough, tmp_path / "out")
    again = pipeline.refine(scene_read.read(tmp_path / "out"), RefineOptions("auto"))
    one, other = (s.prediction.cameras.extrinsics for s in (again, refined))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    assert again.made_by.options["refine"] == "auto"


def test_poses_that_were_to_be_kept_stay(rough: Scene) -> None:
    known = {**rough.made_by.options, "keep_poses": True}
    kept = replace(rough, made_by=replace(rough.made_by, options=known))
    after = pipeline.refine(kept, RefineOptions())
    assert torch.equal(after.prediction.cameras.extrinsics, rough.prediction.cameras.extrinsics)
    assert after.refinement is not None
    assert [row["pose"] for row in after.refinement.images] == ["given"] * 6
    with pytest.raises(InputError, match="made with --keep-poses"):
        pipeline.refine(kept, RefineOptions("sfm"))


def test_photos_that_say_nothing_keep_the_prediction(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.full((96, 128, 3), 100 + 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    scene = pipeline.reconstruct(str(tmp_path), MINI)
    assert scene.refinement is not None
    assert scene.refinement.method == "none"
    assert "too few feature tracks" in scene.refinement.report["reason"]
    assert scene.seen_in == "depth"
    assert [row["pose"] for row in scene.refinement.images] == ["predicted"] * 3


# A lens that bends.

K = -0.2


@pytest.fixture(scope="module")
def bent(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos as a lens with a radial term takes them; their focal length is 460.35 px."""
    folder = tmp_path_factory.mktemp("bent")
    lens = torch.tensor([[460.35, 0, 256], [0, 460.35, 171], [0, 0, 1]], dtype=torch.float64)
    xy = undistort(pixel_centers((342, 512), lens), lens, torch.tensor(K).double())
    for path in sorted((shared / "data/herzjesu_p8/images").glob("*.jpg"))[1:7]:
        whole = np.array(Image.open(path).resize((512, 342)))
        seen = sample(torch.from_numpy(whole).permute(2, 0, 1).float(), xy)  # borders go on
        pixels = seen.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / path.name, quality=97)
    return folder


def test_what_a_lens_bent_is_straight_in_the_scene(
    bent: Path, shared: Path, tmp_path: Path
) -> None:
    scene = pipeline.reconstruct(str(bent), MINI)
    reference = colmap_read.read(shared / "data/herzjesu_p8/reference").cameras[1:7]
    rotation, direction = relative_pose_errors(
        scene.prediction.cameras.extrinsics, reference.extrinsics
    )
    assert auc(rotation, direction, 3) == 100
    export.write(scene, tmp_path / "out")
    row = json.loads((tmp_path / "out/report.json").read_text())["images"][2]
    lens = row["refinement"]["lens"]
    assert lens["k"] == pytest.approx(K, abs=0.02)
    assert lens["fx"] == pytest.approx(460.35, rel=0.02)
    assert row["rewritten"]
    model = colmap_read.read(tmp_path / "out/sparse/0")
    assert {one.model for one in model.lenses} == {"PINHOLE"}
    xy, _ = project_tracks(model.tracks, model.cameras)
    assert (xy - model.tracks.xy).norm(dim=-1).max() < 1.1
    # The written photo is the one before it was bent, seen through the new focal length.
    straight = pixel_centers((342, 512), model.cameras.intrinsics)
    true = model.cameras.intrinsics[2].clone()
    true[0, 0] = true[1, 1] = 460.35
    before = np.array(Image.open(shared / "data/herzjesu_p8/images/0003.jpg").resize((512, 342)))
    expected = sample(
        torch.from_numpy(before).permute(2, 0, 1).float(),
        reframe(straight, model.cameras.intrinsics[2], true),
    )
    found = torch.from_numpy(np.array(Image.open(tmp_path / "out/images/0003.jpg")))
    off = (found.permute(2, 0, 1).float() - expected).abs()[:, 20:-20, 20:-20]
    assert off.mean() < 6


# The command.


@pytest.fixture(scope="module")
def folder(rough: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "scene"
    export.write(rough, out)
    return out


def test_refine_exchanges_a_scene_of_ours(folder: Path) -> None:
    before = json.loads((folder / "report.json").read_text())
    run = vggt("refine", folder)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{folder}\n"
    assert "cameras refined by" in run.stderr
    report = json.loads((folder / "report.json").read_text())
    assert (before["tracks"], report["tracks"]) == ("depth", "image")
    assert report["model"] == before["model"]
    assert list(folder.parent.iterdir()) == [folder]  # no old one beside it
    assert len(list((folder / "images").iterdir())) == 6


def test_refine_never_writes_into_a_model_of_others(shared: Path, tmp_path: Path) -> None:
    foreign = shared / "data/herzjesu_p8"
    refused(vggt("refine", foreign), 2, "never written into", "--out")
    refused(vggt("refine", tmp_path), 2, "not a scene")


def test_refine_keeps_files_that_are_not_ours(folder: Path) -> None:
    (folder / "notes.txt").touch()
    refused(vggt("refine", folder), 2, "notes.txt", "--out")
    (folder / "notes.txt").unlink()
