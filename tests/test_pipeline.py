"""The whole job in one process, with the bundled network on real photos."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from vggt_cli.errors import GeometryError, InputError, MemoryExceeded, WeightsError
from vggt_cli.formats import export, scene_read
from vggt_cli.models import weights
from vggt_cli.models.layers import Outputs
from vggt_cli.reconstruction import diagnose, pairs, pipeline, plan, predict, sequence, settings
from vggt_cli.reconstruction.settings import Options
from vggt_cli.scene import Scene

MINI = Options(model="mini", points=3000, device="cpu", refine="none")


@pytest.fixture(scope="module")
def photos(examples: Path) -> list[Image.Image]:
    return [
        Image.open(examples / f"motorcycle/{side}.png").convert("RGB").resize((240, 160))
        for side in ("left", "right")
    ]


def reconstructed(folder: Path, options: Options = MINI) -> Scene:
    return pipeline.reconstruct(str(folder), options)


def test_the_eight_exif_orientations_give_the_same_cameras_and_points(
    photos: list[Image.Image], tmp_path: Path
) -> None:
    undo = (
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    )
    scenes = []
    for orientation, transpose in enumerate(undo, 1):
        folder = tmp_path / str(orientation)
        folder.mkdir()
        exif = Image.Exif()
        exif[0x0112] = orientation
        for i, photo in enumerate(photos):
            stored = photo if transpose is None else photo.transpose(transpose)
            stored.save(folder / f"{i}.png", exif=exif)
        scenes.append(reconstructed(folder))
    first = scenes[0]
    for scene in scenes[1:]:
        assert torch.equal(scene.prediction.cameras.extrinsics, first.prediction.cameras.extrinsics)
        assert torch.equal(scene.tracks.xyz, first.tracks.xyz)
        assert scene.photos[0].size == first.photos[0].size
    export.write(scenes[5], tmp_path / "out")
    with Image.open(tmp_path / "out/images/0.png") as written:
        assert written.tobytes() == photos[0].tobytes()


def test_mixed_sizes_orientations_and_panoramas_go_together(
    photos: list[Image.Image], tmp_path: Path
) -> None:
    photos[0].save(tmp_path / "1.png")
    photos[1].rotate(90, expand=True).save(tmp_path / "2.png")
    photos[0].resize((600, 60)).save(tmp_path / "3.jpg")
    scene = reconstructed(tmp_path)
    assert [photo.size for photo in scene.photos] == [(160, 240), (240, 160), (60, 600)]
    assert scene.camera_of_image == (0, 1, 2)
    tracks = scene.tracks
    size = scene.images.source_size[tracks.frame.long()].flip(-1)
    assert ((tracks.xy > 0) & (tracks.xy < size)).all()  # nothing from the padding
    model = export.as_colmap(scene, ["1.png", "2.png", "3.jpg"])
    centers = model.cameras.intrinsics[:, :2, 2]
    assert_close(centers, model.cameras.image_size.flip(-1) / 2, check_dtype=False)


def test_one_photo_alone_is_a_scene(photos: list[Image.Image], tmp_path: Path) -> None:
    photos[0].save(tmp_path / "1.png")
    scene = reconstructed(tmp_path)
    assert torch.equal(scene.prediction.cameras.extrinsics[0], torch.eye(3, 4))
    assert len(scene.tracks.xyz) > 100


def test_cameras_are_shared_as_asked(photos: list[Image.Image], tmp_path: Path) -> None:
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    shared = reconstructed(tmp_path)
    assert torch.equal(*shared.prediction.cameras.intrinsics)
    alone = reconstructed(tmp_path, dataclasses.replace(MINI, camera="per-image"))
    assert alone.camera_of_image == (0, 1)
    middle = alone.prediction.cameras.intrinsics.mean(0)
    assert_close(shared.prediction.cameras.intrinsics[0], middle)


def test_a_plan_says_what_would_be_done(photos: list[Image.Image], tmp_path: Path) -> None:
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    options = dataclasses.replace(MINI, resolution=96)
    plan = pipeline.foresee(str(tmp_path), options)
    assert plan["network_size"] == list(reconstructed(tmp_path, options).images.size)
    assert plan["tokens"] == 2 * plan["network_size"][0] * plan["network_size"][1] // 32**2
    assert len(plan["warnings"]) == 1


def test_a_photo_that_cannot_be_read_stops_a_strict_run(
    photos: list[Image.Image], tmp_path: Path
) -> None:
    photos[0].save(tmp_path / "1.png")
    (tmp_path / "2.png").touch()
    assert reconstructed(tmp_path).unreadable[0][0] == "2.png"
    with pytest.raises(InputError, match=r"2\.png"):
        reconstructed(tmp_path, dataclasses.replace(MINI, strict=True))


def test_what_is_left_out_is_said_once(
    photos: list[Image.Image], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos[0].save(tmp_path / "1.png")
    (tmp_path / "clip.mp4").touch()
    reconstructed(tmp_path)
    assert sum("clip.mp4" in record.getMessage() for record in caplog.records) == 1


def test_weights_that_forbid_commercial_use_are_refused_when_asked(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    options = dataclasses.replace(MINI, model="vggt-1b", require_commercial=True)
    with pytest.raises(WeightsError, match="commercial"):
        reconstructed(tmp_path, options)
    reconstructed(tmp_path, dataclasses.replace(MINI, require_commercial=True))


def test_named_weights_are_fetched_unless_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    monkeypatch.setenv("VGGT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "find", lambda name: None)
    fetched: list[str] = []
    monkeypatch.setattr(weights, "fetch", fetched.append)
    for offline in (True, False):
        with pytest.raises(WeightsError, match="not on this machine"):
            reconstructed(tmp_path, dataclasses.replace(MINI, model="vggt-1b", offline=offline))
    assert fetched == ["vggt-1b"]


def test_running_out_of_memory_names_the_step_and_the_work(
    photos: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos[0].save(tmp_path / "1.png")

    def greedy(*_: object) -> Tensor:
        return torch.empty(1 << 50)

    monkeypatch.setattr(sequence, "predict", greedy)
    with pytest.raises(MemoryExceeded, match="'predict': 1 images of"):
        reconstructed(tmp_path)

    def broken(*_: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(sequence, "predict", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        reconstructed(tmp_path)


class Says(nn.Module):
    """A network that says the same of every image."""

    def __init__(self, encoding: list[float]) -> None:
        super().__init__()
        self.encoding = nn.Parameter(torch.tensor(encoding))

    def forward(self, images: Tensor, frames_per_chunk: int) -> Outputs:
        B, S, _, H, W = images.shape
        ones = torch.ones(B, S, H, W)
        return Outputs(self.encoding.expand(1, B, S, 9), ones, ones)


def test_a_camera_that_is_not_finite_is_an_error_and_an_absurd_field_of_view_is_not(
    photos: list[Image.Image], tmp_path: Path
) -> None:
    photos[0].save(tmp_path / "1.png")
    images = reconstructed(tmp_path).images
    zero = predict.predict(Says([0.0, 0, 0, 0, 0, 0, 1, 0, 0]), images)  # type: ignore[arg-type]
    assert zero.cameras.intrinsics.isfinite().all()
    with pytest.raises(GeometryError, match=r"not finite: 1\.png"):
        predict.predict(Says([float("nan")] * 9), images)  # type: ignore[arg-type]


def test_other_precisions_and_fewer_keys_give_nearly_the_same_scene(
    photos: list[Image.Image], tmp_path: Path
) -> None:
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    float32 = dataclasses.replace(MINI, precision="float32")
    exact = reconstructed(tmp_path, float32)
    assert exact.made_by.dtype == "float32"
    for changed in (
        dataclasses.replace(MINI, precision="int8"),
        dataclasses.replace(MINI, precision="bfloat16"),
        dataclasses.replace(float32, fewer_keys=True),
    ):
        scene = reconstructed(tmp_path, changed)
        assert scene.made_by.dtype == changed.precision
        assert not torch.equal(scene.prediction.depth, exact.prediction.depth), changed
        apart = (scene.prediction.depth / exact.prediction.depth - 1).abs().median()
        assert apart < 0.05, (changed, apart)


def test_int8_is_refused_where_it_would_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vggt_cli.device.choose", lambda name: torch.device("meta"))
    with pytest.raises(InputError, match="int8 is for CPUs"):
        settings.settle(dataclasses.replace(MINI, precision="int8"))


def test_more_frames_than_are_held_lie_on_disk_and_come_out_the_same(
    examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = dataclasses.replace(MINI, window=5)
    source = str(examples / "rendered")
    held = pipeline.reconstruct(source, windows)
    for module in (plan, pairs, pipeline, diagnose):
        monkeypatch.setattr(module, "ALL_PAIRS", 3)
    scene = pipeline.reconstruct(source, windows)
    assert scene.images.pixels.dtype == scene.prediction.depth.dtype == torch.float16
    assert held.prediction.depth.dtype == torch.float32
    assert torch.equal(scene.prediction.depth.float(), held.prediction.depth)
    assert torch.equal(scene.prediction.cameras.extrinsics, held.prediction.cameras.extrinsics)
    assert torch.equal((scene.images.pixels.float() * 255).round() / 255, held.images.pixels)
    assert len(scene.tracks.xyz) == pytest.approx(len(held.tracks.xyz), rel=0.01)
    export.write(scene, tmp_path / "scene", ("depth", "glb", "nerfstudio"))
    again = scene_read.read(tmp_path / "scene")
    assert again.windows == scene.windows
    assert again.windows["windows"] == held.windows["windows"]
    auto = pipeline.reconstruct(source, dataclasses.replace(windows, refine="auto"))
    assert auto.refinement is None
    assert any("8 images, so the predicted cameras are kept" in said for said in auto.warnings)
    asked = pipeline.reconstruct(source, dataclasses.replace(windows, refine="ba"))
    assert asked.refinement is not None
    assert asked.prediction.depth.dtype == torch.float32
