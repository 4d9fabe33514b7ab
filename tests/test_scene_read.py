"""Finished scenes come back from their folders as they were."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from wall import EVERYTHING, wall

from vggt_cli.errors import InputError, OutputError
from vggt_cli.formats import colmap, export, scene_read
from vggt_cli.reconstruction.fuse import fuse
from vggt_cli.scene import Photo, Provenance, Scene, Tracks


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """The wall's scene with photos on disk, two lenses, tokens, and words that must survive."""
    prediction, images = wall()
    photos = []
    for i, name in enumerate(("a 1.png", "b.png", "in/b.png", "c.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (images.pixels[i] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST).save(path)
        photos.append(Photo(path, name, (48, 64)))
    prediction = replace(prediction, tokens=torch.ones(4, 3, 8))
    cloud = fuse(prediction, images, EVERYTHING)
    assert cloud.observations is not None
    return Scene(
        tuple(photos),
        replace(images, names=tuple(photo.name for photo in photos)),
        prediction,
        (0, 0, 0, 1),
        cloud.observations,
        cloud.rgb,
        replace(cloud, observations=None),
        Provenance("test", "0" * 64, "none", True, "cpu", "float32", {"points": 5}, {"fuse": 1.0}),
        (("bad.jpg", "truncated"),),
        ("a warning",),
        "metric",
    )


def test_a_scene_comes_back_as_it_was_written(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out", ["tokens"])
    found = scene_read.read(tmp_path / "out")
    assert [photo.name for photo in found.photos] == [photo.name for photo in scene.photos]
    assert found.images.names == scene.images.names
    assert found.images.size == scene.images.size
    assert torch.equal(found.images.source_from_network, scene.images.source_from_network)
    for name in ("extrinsics", "intrinsics", "image_size"):
        one, other = (getattr(s.prediction.cameras, name) for s in (found, scene))
        assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert_close(found.prediction.depth, scene.prediction.depth, rtol=1e-3, atol=0)
    assert_close(found.prediction.confidence, scene.prediction.confidence, rtol=1e-3, atol=0)
    assert found.prediction.tokens is not None
    assert torch.equal(found.prediction.tokens, torch.ones(4, 3, 8))
    assert torch.equal(found.tracks.xyz, scene.tracks.xyz)
    assert torch.equal(found.tracks.xy, scene.tracks.xy)
    assert found.dense is not None
    assert scene.dense is not None
    assert torch.equal(found.dense.normals, scene.dense.normals)
    for name in ("camera_of_image", "made_by", "unreadable", "warnings", "scale", "seen_in"):
        assert getattr(found, name) == getattr(scene, name), name


def test_what_is_written_again_is_the_same_file(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out", ["tokens", "colmap-txt"])
    formats = scene_read.formats(tmp_path / "out")
    export.write(scene_read.read(tmp_path / "out"), tmp_path / "again", formats)
    names = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {
        p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file()
    }
    # PNGs to look at come from float16 now, and the page and the report name the folder and time.
    for name in names - {Path("report.json"), Path("scene.html")}:
        if name.parent.name != "confidence" or name.suffix == ".npy":
            one, other = (tmp_path / folder / name for folder in ("out", "again"))
            assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("report.json", "no report"),
        ("depth/b.png.npy", "not a map"),
        ("points.ply", "cut short"),
        ("images/c.png", "cannot be read"),
    ],
)
def test_a_damaged_scene_is_an_error_that_names_the_file(
    scene: Scene, tmp_path: Path, broken: str, words: str
) -> None:
    export.write(scene, tmp_path / "out")
    path = tmp_path / "out" / broken
    path.unlink() if broken.startswith("images") else path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=words) as error:
        scene_read.read(tmp_path / "out")
    assert path.name in str(error.value)


@pytest.mark.parametrize(
    "part", ["images", "model", "peak_memory_bytes", "left_out", "findings", "warnings", "scale"]
)
def test_a_report_that_lacks_a_part_or_holds_another_kind_is_named(
    scene: Scene, tmp_path: Path, part: str
) -> None:
    export.write(scene, tmp_path / "out", html=False)
    path = tmp_path / "out/report.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, part: 7}))
    if part not in ("peak_memory_bytes", "scale"):  # nobody reads those as more than they are
        with pytest.raises(InputError, match=r"no report of a scene: .*report\.json"):
            scene_read.read(tmp_path / "out")
    del whole[part]
    path.write_text(json.dumps(whole))
    if part != "findings":  # older versions wrote none
        with pytest.raises(InputError, match=r"no report of a scene: .*report\.json"):
            scene_read.read(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and no more", b"\x93NUMPY"])
def test_tokens_that_are_none_are_named(scene: Scene, tmp_path: Path, content: bytes) -> None:
    export.write(scene, tmp_path / "out", html=False)
    (tmp_path / "out/tokens.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"no tokens.*tokens\.npz"):
        scene_read.read(tmp_path / "out")


def test_parts_that_do_not_fit_together_are_an_error(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out")
    np.save(tmp_path / "out/confidence/b.png.npy", np.ones((3, 4), np.float16))
    with pytest.raises(InputError, match=r"differ in size.*b\.png"):
        scene_read.read(tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    report["schema"] = 99
    (tmp_path / "out/report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="schema 99"):
        scene_read.read(tmp_path / "out")


def test_files_that_are_not_ours_keep_a_scene_from_being_exchanged(
    scene: Scene, tmp_path: Path
) -> None:
    export.write(scene, tmp_path / "out")
    export.refuse_strangers(tmp_path / "out")
    (tmp_path / "out/splats.ply").touch()
    with pytest.raises(OutputError, match=r"lost.*splats\.ply"):
        export.refuse_strangers(tmp_path / "out")


# Models of others.


def written(scene: Scene, folder: Path) -> colmap.Model:
    """The scene as others would have it: sparse/0 and images/, names with folders."""
    model = export.as_colmap(scene, [photo.name for photo in scene.photos])
    colmap.write(model, folder / "sparse/0")
    (folder / "images").symlink_to(scene.photos[0].path.parent)
    return model


def test_a_model_of_others_comes_without_depth(scene: Scene, tmp_path: Path) -> None:
    model = written(scene, tmp_path / "theirs")
    found = scene_read.read_foreign(tmp_path / "theirs", None)
    assert found.images.names == model.names
    assert found.dense is None
    assert not found.prediction.depth.any()
    assert found.camera_of_image == (0, 0, 0, 1)
    assert torch.equal(found.tracks.xy, scene.tracks.xy)
    again = export.as_colmap(found, model.names)
    assert_close(again.cameras.intrinsics, model.cameras.intrinsics, rtol=1e-6, atol=1e-4)
    assert not scene_read.is_ours(tmp_path / "theirs")


def test_masks_beside_the_photos_of_others_count_and_a_folder_of_something_else_does_not(
    scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(scene, tmp_path / "theirs")
    masks = tmp_path / "theirs/masks"
    (masks / "in").mkdir(parents=True)
    mask = np.zeros((48, 64), np.uint8)
    mask[:24] = 255
    Image.fromarray(mask).save(masks / "in/b.png")
    valid = scene_read.read_foreign(tmp_path / "theirs", None).images.valid
    H = valid.shape[1]
    assert valid[2, : H // 2].all()
    assert not valid[2, H // 2 :].any()
    assert valid[[0, 1, 3]].all()
    (masks / "in/b.png").rename(masks / "classes.png")
    assert scene_read.read_foreign(tmp_path / "theirs", None).images.valid.all()
    assert "no mask of any photo" in caplog.text


def test_images_without_photos_are_left_out_with_what_only_they_see(
    scene: Scene, tmp_path: Path
) -> None:
    written(scene, tmp_path / "theirs")
    scene.photos[0].path.unlink()
    found = scene_read.read_foreign(tmp_path / "theirs", None)
    assert [photo.name for photo in found.photos] == ["b.png", "in/b.png", "c.png"]
    assert found.unreadable == (("a 1.png", "no such file"),)
    assert found.camera_of_image == (0, 0, 1)
    assert_close(found.prediction.cameras.extrinsics, scene.prediction.cameras.extrinsics[1:])
    tracks = found.tracks
    assert int(torch.bincount(tracks.point).min()) >= 2
    assert len(tracks.xyz) == len(found.rgb) < len(scene.tracks.xyz)
    _same_places(tracks, scene.tracks)


def _same_places(some: Tracks, all_of_them: Tracks) -> None:
    """Every point of `some` is one of the others, seen at the same places one frame earlier."""
    known = {tuple(row) for row in all_of_them.xyz[all_of_them.point].tolist()}
    assert {tuple(row) for row in some.xyz[some.point].tolist()} <= known
    places = torch.cat([all_of_them.frame[:, None] - 1, all_of_them.xy], -1).tolist()
    assert {tuple(x) for x in torch.cat([some.frame[:, None], some.xy], -1).tolist()} <= {
        tuple(x) for x in places
    }


def test_photos_of_another_size_than_their_cameras_are_an_error(
    scene: Scene, tmp_path: Path
) -> None:
    written(scene, tmp_path / "theirs")
    Image.new("RGB", (32, 24)).save(scene.photos[2].path)
    with pytest.raises(InputError, match=r"in/b\.png is 32 x 24, its camera 64 x 48"):
        scene_read.read_foreign(tmp_path / "theirs", None)


def test_distorted_models_and_missing_folders_are_errors_that_say_what_to_do(
    scene: Scene, tmp_path: Path
) -> None:
    written(scene, tmp_path / "theirs")
    with pytest.raises(InputError, match="no such folder of photos"):
        scene_read.read_foreign(tmp_path / "theirs", tmp_path / "nowhere")
    text = ["1 SIMPLE_RADIAL 64 48 60 32 24 0.1", "2 PINHOLE 64 48 60 60 32 24"]
    bent = tmp_path / "bent/sparse/0"
    colmap.write(export.as_colmap(scene, [photo.name for photo in scene.photos]), bent)
    colmap.write_text(export.as_colmap(scene, [photo.name for photo in scene.photos]), bent)
    for path in bent.glob("*.bin"):
        path.unlink()
    (bent / "cameras.txt").write_text("\n".join(text) + "\n")
    with pytest.raises(InputError, match=r"a 1\.png is distorted") as error:
        scene_read.read_foreign(tmp_path / "bent", scene.photos[0].path.parent)
    assert "image_undistorter" in error.value.hint
