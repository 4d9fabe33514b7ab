"""The scene folder: whole or not at all, and readable by others."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from wall import EVERYTHING, wall

from vggt_cli.errors import OutputError
from vggt_cli.formats import colmap, export, points
from vggt_cli.formats.images import frame_of
from vggt_cli.reconstruction.fuse import fuse
from vggt_cli.scene import Photo, Provenance, Scene


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """The wall's scene, with four photos on disk, the last of them rotated by its EXIF."""
    prediction, images = wall()
    photos = []
    for i, name in enumerate(("a 1.png", "in/a.1.png", "B.jpg", "c.jpg")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        rotated = i == 3
        exif[0x0112] = 6 if rotated else 1
        size = (48, 64) if rotated else (64, 48)
        Image.new("RGB", size, (50 * i, 0, 200)).save(path, exif=exif)
        photos.append(Photo(path, name, (48, 64), rotated))
    tokens, text = torch.ones(4, 3, 8), torch.ones(8)
    prediction = type(prediction)(
        prediction.cameras, prediction.depth, prediction.confidence, tokens, text
    )
    cloud = fuse(prediction, images, EVERYTHING)
    assert cloud.observations is not None
    made_by = Provenance("test", "0" * 64, "none", True, "cpu", "float32", {"points": 5})
    return Scene(
        tuple(photos),
        images,
        prediction,
        (0, 0, 0, 1),
        cloud.observations,
        cloud.rgb,
        fuse(prediction, images, EVERYTHING, observe=False),
        made_by,
        (("bad.jpg", "truncated"),),
        ("a warning",),
    )


def contents(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def beside(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_holds_what_the_design_says(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out", ["colmap-txt", "tokens"])
    names = ["a_1.png", "in__a_1.png", "B.jpg", "c.jpg"]
    assert contents(tmp_path / "out") == {
        *(f"images/{name}" for name in names),
        *(f"confidence/{name}.{kind}" for name in names for kind in ("npy", "png")),
        *(f"depth/{name}.npy" for name in names),
        *(f"sparse/0/{part}.{kind}" for part in PARTS for kind in ("bin", "txt")),
        "points.ply",
        "report.json",
        "scene.html",
        "tokens.npz",
    }
    assert beside(tmp_path) == {"photos", "out"}
    assert not (tmp_path / "out/images").is_symlink()


def test_the_page_shows_the_dense_cloud_and_can_be_left_out(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out")
    page = (tmp_path / "out/scene.html").read_text(encoding="utf-8")
    assert "<title>out</title>" in page
    assert scene.dense is not None
    assert f'"points":{len(scene.dense)},' in page
    assert '"names":["a_1.png","in__a_1.png","B.jpg","c.jpg"]' in page
    export.write(scene, tmp_path / "without", html=False)
    assert contents(tmp_path / "out") - contents(tmp_path / "without") == {"scene.html"}


PARTS = ("cameras", "images", "points3D")


def test_depth_maps_are_those_of_the_network_without_padding(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out")
    for frame, name in enumerate(("a_1.png", "in__a_1.png", "B.jpg", "c.jpg")):
        found = np.load(tmp_path / f"out/depth/{name}.npy")
        rows, columns = frame_of(scene.images, frame)
        assert found.dtype == np.float16
        true = scene.prediction.depth[frame, rows, columns]
        np.testing.assert_allclose(found, true, rtol=1e-3)


def test_images_are_the_files_described_upright(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out")
    found = colmap.pycolmap().Reconstruction(tmp_path / "out/sparse/0")
    assert (found.num_images(), found.num_cameras()) == (4, 2)
    for image in found.images.values():
        with Image.open(tmp_path / "out/images" / image.name) as file:
            assert file.size == (image.camera.width, image.camera.height)
            assert file.getexif().get(0x0112, 1) == 1
        k = image.camera.calibration_matrix()
        assert (k[0, 2], k[1, 2]) == (image.camera.width / 2, image.camera.height / 2)
    assert not (tmp_path / "out/images/B.jpg").is_symlink()
    original = (scene.photos[2].path).read_bytes()
    assert (tmp_path / "out/images/B.jpg").read_bytes() == original


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/b.jpg", "a__b.jpg"], ["a__b.jpg", "a__b_2.jpg"]),
        (["x.jpg", "x.png", "X.JPG"], ["x.jpg", "x_2.png", "X_3.JPG"]),
        (["my photo.v2.jpg"], ["my_photo_v2.jpg"]),
        (["IMG_1.HEIC", "img_1.jpg", "y.avif"], ["IMG_1.jpg", "img_1_2.jpg", "y.jpg"]),
        (["../x.jpg", "\udcff:*.png", "no ending"], ["____x.jpg", "___.png", "no_ending"]),
        (["x_2.jpg", "x.jpg", "x.png"], ["x_2.jpg", "x.jpg", "x_3.png"]),
    ],
)
def test_names_are_flat_and_unique(names: list[str], expected: list[str]) -> None:
    assert export.output_names(names) == expected


def test_trimesh_reads_the_cloud(scene: Scene, tmp_path: Path) -> None:
    import trimesh

    assert scene.dense is not None
    points.write_cloud(scene.dense, tmp_path / "points.ply")
    cloud: Any = trimesh.load(tmp_path / "points.ply")
    np.testing.assert_allclose(cloud.vertices, scene.dense.xyz)
    np.testing.assert_array_equal(cloud.colors[:, :3], scene.dense.rgb)


def test_open3d_reads_the_cloud(scene: Scene, tmp_path: Path) -> None:
    try:
        import open3d
    except (ImportError, OSError) as error:
        pytest.skip(f"open3d does not import ({error}): apt install libegl1 libgl1 libusb-1.0-0")
    assert scene.dense is not None
    points.write_cloud(scene.dense, tmp_path / "points.ply")
    cloud = open3d.io.read_point_cloud(tmp_path / "points.ply")
    np.testing.assert_allclose(np.asarray(cloud.points), scene.dense.xyz)
    np.testing.assert_allclose(np.asarray(cloud.normals), scene.dense.normals)
    np.testing.assert_allclose(np.asarray(cloud.colors) * 255, scene.dense.rgb, atol=0.5)


def test_confidence_maps_are_the_prediction(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out")
    for frame, name in enumerate(("a_1.png", "in__a_1.png", "B.jpg", "c.jpg")):
        stored = np.load(tmp_path / f"out/confidence/{name}.npy")
        assert stored.dtype == np.float16
        np.testing.assert_allclose(stored, scene.prediction.confidence[frame], rtol=1e-3)
        with Image.open(tmp_path / f"out/confidence/{name}.png") as picture:
            assert picture.size == stored.shape[::-1]
            gray = np.asarray(picture).astype(int)
        assert (np.diff(gray.ravel()[stored.ravel().argsort()]) >= -1).all()  # brighter is surer


def test_tokens_are_saved_by_name(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out", ["tokens"])
    with np.load(tmp_path / "out/tokens.npz") as stored:
        assert stored["tokens"].shape == (4, 3, 8)
        assert stored["text"].shape == (8,)
        assert stored["names"].tolist() == list(scene.images.names)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Intrinsics(Strict):
    fx: float
    fy: float
    cx: float
    cy: float


class Confidence(Strict):
    min: float
    median: float
    max: float


class Moment(Strict):
    file: str
    frame: int
    seconds: float


class ImageReport(Strict):
    name: str
    file: str
    width: int
    height: int
    camera: int
    extrinsics: list[list[float]]
    intrinsics: Intrinsics
    image_from_map: list[list[float]]
    confidence: Confidence
    observations: int
    rewritten: bool
    video: Moment | None
    refinement: dict[str, Any] | None


class LeftOut(Strict):
    name: str
    reason: str


class Points(Strict):
    sparse: int
    dense: int
    seen_by_two_or_more: float
    mean_track_length: float
    mean_error_pixels: float


class Tool(Strict):
    name: Literal["vggt"]
    version: str


class ModelReport(Strict):
    model: str
    sha256: str
    licence: str
    commercial: bool


class Report(Strict):
    """Schema 1 of report.json: a change here is a new schema number."""

    number: Literal[1] = Field(alias="schema")
    tool: Tool
    versions: dict[str, str]
    model: ModelReport
    device: str
    dtype: str
    options: dict[str, Any]
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    content: str
    conventions: dict[str, str]
    scale: Literal["arbitrary", "metric"]
    tracks: Literal["depth", "image"]
    priors: dict[str, Any]
    windows: dict[str, Any] | None
    findings: list[dict[str, Any]]
    refinement: dict[str, Any] | None
    points: Points
    images: list[ImageReport]
    left_out: list[LeftOut]
    warnings: list[str]


def test_the_report_follows_its_schema_and_maps_the_names(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out")
    text = (tmp_path / "out/report.json").read_text(encoding="utf-8")
    report = Report.model_validate_json(text)
    assert report.images[1].name == "in/a.1.png"
    assert report.images[1].file == "images/in__a_1.png"
    assert [image.rewritten for image in report.images] == [False, False, False, True]
    assert report.left_out[0].name == "bad.jpg"
    assert report.images[0].extrinsics == np.eye(3, 4).tolist()
    assert report.images[0].image_from_map == [[2, 0, 0], [0, 2, 0], [0, 0, 1]]
    assert report.points.seen_by_two_or_more > 0.5
    assert "NaN" not in text


# Whole or not at all.


def test_an_existing_folder_is_refused_and_replaced_only_when_asked(
    scene: Scene, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export.write(scene, out)
    (out / "mark").touch()
    with pytest.raises(OutputError, match="exists"):
        export.write(scene, out)
    assert (out / "mark").exists()
    export.write(scene, out, overwrite=True)
    assert not (out / "mark").exists()
    assert (out / "report.json").exists()


def test_a_folder_that_is_no_scene_is_never_overwritten(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    with pytest.raises(OutputError, match="not a scene"):
        export.write(scene, tmp_path / "out", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a folder"):
        export.write(scene, tmp_path / "file", overwrite=True)
    assert (tmp_path / "out/thesis.tex").exists()


@pytest.mark.parametrize(
    "stop", [OSError(errno.ENOSPC, "No space left on device"), SystemExit(130)]
)
def test_nothing_is_left_behind_when_writing_stops(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    export.write(scene, tmp_path / "out")
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise stop

    monkeypatch.setattr(points, "write_cloud", fail)
    expected = OutputError if isinstance(stop, OSError) else SystemExit
    with pytest.raises(expected, match="No space left" if isinstance(stop, OSError) else None):
        export.write(scene, tmp_path / "new")
    with pytest.raises(expected):
        export.write(scene, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before
    assert beside(tmp_path) == {"photos", "out"}


def test_a_full_disk_is_an_output_error(scene: Scene) -> None:
    if not Path("/dev/full").exists() or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs a small file system of its own: root and mount")
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            with pytest.raises(OutputError, match="No space left"):
                export.write(scene, Path(folder) / "out")
            assert not beside(Path(folder))
        finally:
            subprocess.run(["umount", folder], check=True)


def test_a_parent_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write into"):
        export.refuse_existing(tmp_path / "file" / "out", overwrite=False)
    export.refuse_existing(tmp_path / "new" / "deeper" / "out", overwrite=False)


def test_a_disk_without_links_gets_copies(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("sys.platform", "darwin")  # no reflink by ioctl either
    export.write(scene, tmp_path / "out")
    copy, original = tmp_path / "out/images/B.jpg", scene.photos[2].path
    assert copy.read_bytes() == original.read_bytes()
    assert copy.stat().st_ino != original.stat().st_ino


def test_tokens_are_an_error_where_the_network_has_none(scene: Scene, tmp_path: Path) -> None:
    bare = replace(scene, prediction=replace(scene.prediction, tokens=None, text=None))
    with pytest.raises(OutputError, match="no tokens"):
        export.write(bare, tmp_path / "out", ["tokens"])
    without_text = replace(scene, prediction=replace(scene.prediction, text=None))
    export.write(without_text, tmp_path / "out", ["tokens"])
    with np.load(tmp_path / "out/tokens.npz") as stored:
        assert set(stored) == {"names", "tokens"}
