"""The COLMAP model as pycolmap and as a reader of the old fixed tables see it."""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap, colmap_read
from vggt_cli.geometry import project_tracks, rotation_from_quaternion
from vggt_cli.scene import Cameras, Tracks

S, N = 3, 50


def model(seed: int = 0) -> colmap.Model:
    """A model of three images and two cameras, with tracks of one to three observations."""
    random = torch.Generator().manual_seed(seed)
    rotation = rotation_from_quaternion(torch.randn(S, 4, generator=random))
    translation = torch.randn(S, 3, 1, generator=random)
    k = torch.tensor([[[700.0, 0, 400], [0, 710, 300], [0, 0, 1]]]).repeat(S, 1, 1)
    k[2, 0, 0] = 650
    cameras = Cameras(
        torch.cat([rotation, translation], -1), k, torch.tensor([[600, 800]]).repeat(S, 1)
    )
    seen = torch.rand(N, S, generator=random) < 0.6
    seen[:, 0] |= ~seen.any(1)
    point, frame = seen.nonzero().unbind(-1)
    xy = torch.rand(len(point), 2, generator=random) * torch.tensor([800.0, 600.0])
    xyz = torch.randn(N, 3, generator=random)
    rgb = torch.randint(0, 256, (N, 3), generator=random, dtype=torch.uint8).numpy()
    tracks = Tracks(xyz, point, frame.int(), xy)
    return colmap.Model(("a.jpg", "b.jpg", "ü_2.jpg"), cameras, (0, 0, 1), tracks, rgb)


@dataclass
class OldModel:
    """What a reader with fixed tables, such as those of splatting trainers, gets."""

    cameras: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    images: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    points: dict[int, tuple[Any, ...]] = field(default_factory=dict)


def take(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))


def read_old(folder: Path) -> OldModel:
    """The binary files by the format of COLMAP before rigs: every byte accounted for."""
    found = OldModel()
    with (folder / "cameras.bin").open("rb") as file:
        for _ in range(take(file, "Q")[0]):
            number, kind, w, h = take(file, "IiQQ")
            assert kind == 1, "PINHOLE"
            found.cameras[number] = (w, h, *take(file, "4d"))
        assert not file.read()
    with (folder / "images.bin").open("rb") as file:
        for _ in range(take(file, "Q")[0]):
            number, *pose, camera = take(file, "I7dI")
            name = b"".join(iter(lambda: file.read(1), b"\0")).decode()
            seen = [take(file, "ddQ") for _ in range(take(file, "Q")[0])]
            found.images[number] = (pose, camera, name, seen)
        assert not file.read()
    with (folder / "points3D.bin").open("rb") as file:
        for _ in range(take(file, "Q")[0]):
            number, *place = take(file, "Q3d3Bd")
            track = [take(file, "II") for _ in range(take(file, "Q")[0])]
            found.points[number] = (place[:3], place[3:6], place[6], track)
        assert not file.read()
    return found


def test_a_reader_with_fixed_tables_gets_every_value_back(tmp_path: Path) -> None:
    written = model()
    colmap.write(written, tmp_path)
    found = read_old(tmp_path)
    assert found.cameras == {1: (800, 600, 700, 710, 400, 300), 2: (800, 600, 650, 710, 400, 300)}
    assert [image[2] for image in found.images.values()] == list(written.names)
    assert [image[1] for image in found.images.values()] == [1, 1, 2]
    for i, (pose, *_) in found.images.items():
        q = torch.tensor(pose[:4], dtype=torch.float64).roll(-1)
        assert q.norm().item() == pytest.approx(1, abs=1e-12)
        assert_allclose(
            rotation_from_quaternion(q), written.cameras.extrinsics[i - 1, :, :3], atol=1e-6
        )
        assert_allclose(pose[4:], written.cameras.extrinsics[i - 1, :, 3], atol=1e-7)
    for number, (xyz, rgb, error, track) in found.points.items():
        rows = (written.tracks.point == number - 1).nonzero()[:, 0]
        assert_allclose(xyz, written.tracks.xyz[number - 1])
        assert_array_equal(rgb, written.rgb[number - 1])
        assert [image - 1 for image, _ in track] == written.tracks.frame[rows].tolist()
        for (image, index), row in zip(track, rows, strict=True):
            x, y, point = found.images[image][3][index]
            assert point == number
            assert_allclose([x, y], written.tracks.xy[row])
        assert error > 0


@pytest.mark.colmap
@pytest.mark.parametrize("text", [False, True])
def test_pycolmap_reads_the_model(tmp_path: Path, text: bool) -> None:
    written = model()
    (colmap.write_text if text else colmap.write)(written, tmp_path)
    found = colmap.pycolmap().Reconstruction(tmp_path)
    assert (found.num_images(), found.num_cameras(), found.num_points3D()) == (S, 2, N)
    for i, name in enumerate(written.names, 1):
        image = found.images[i]
        assert image.name == name
        assert_allclose(
            image.cam_from_world().matrix(), written.cameras.extrinsics[i - 1], atol=1e-6
        )
        assert_allclose(image.camera.calibration_matrix(), written.cameras.intrinsics[i - 1])
    assert found.compute_num_observations() == len(written.tracks.point)
    assert_allclose(found.points3D[7].xyz, written.tracks.xyz[6], rtol=1e-6)
    assert_array_equal(found.points3D[7].color, written.rgb[6])
    stated = {i: point.error for i, point in found.points3D.items()}
    found.update_point_3d_errors()
    for i, error in stated.items():  # ours are plain distances; pycolmap agrees in front
        _, z = project_tracks(written.tracks, written.cameras)
        if (z[written.tracks.point == i - 1] > 0).all():
            assert found.points3D[i].error == pytest.approx(error, rel=1e-4)


def test_an_image_without_observations_is_kept(tmp_path: Path) -> None:
    whole = model()
    rows = whole.tracks.frame != 1
    tracks = Tracks(
        whole.tracks.xyz, whole.tracks.point[rows], whole.tracks.frame[rows], whole.tracks.xy[rows]
    )
    colmap.write(
        colmap.Model(whole.names, whole.cameras, whole.camera_of_image, tracks, whole.rgb), tmp_path
    )
    assert read_old(tmp_path).images[2][3] == []


def test_text_files_suit_line_readers(tmp_path: Path) -> None:
    colmap.write_text(model(), tmp_path)
    lines = (tmp_path / "images.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) % 2 == 0
    for line in (tmp_path / "cameras.txt").read_text().splitlines()[1:]:
        assert line.split()[1] == "PINHOLE"
    content = [line for line in lines if not line.startswith("#")]
    assert np.all([len(line.split()) == 10 for line in content[::2]])


def same(found: colmap.Model, written: colmap.Model) -> None:
    """All that was written came back, poses through a quaternion."""
    assert found.names == written.names
    assert found.camera_of_image == written.camera_of_image
    assert_allclose(found.cameras.extrinsics, written.cameras.extrinsics, atol=1e-6)
    assert_array_equal(found.cameras.intrinsics, written.cameras.intrinsics.double())
    assert_array_equal(found.cameras.image_size, written.cameras.image_size)
    assert_array_equal(found.rgb, written.rgb)
    for name in ("xyz", "point", "frame", "xy"):
        assert_array_equal(getattr(found.tracks, name), getattr(written.tracks, name), name)


@pytest.mark.parametrize("text", [False, True])
def test_a_model_comes_back_as_it_was_written(tmp_path: Path, text: bool) -> None:
    written = model()
    (colmap.write_text if text else colmap.write)(written, tmp_path)
    same(colmap_read.read(tmp_path), written)


@pytest.mark.colmap
@pytest.mark.parametrize("text", [False, True])
def test_what_pycolmap_writes_with_rigs_and_unordered_ids_is_read(
    tmp_path: Path, text: bool
) -> None:
    written = model()
    colmap.write(written, tmp_path)
    pycolmap = colmap.pycolmap()
    with_rigs = pycolmap.Reconstruction(tmp_path)
    with_rigs.delete_point3D(3)  # its 2D points stay, without a 3D point
    (tmp_path / "new").mkdir()
    (with_rigs.write_text if text else with_rigs.write_binary)(tmp_path / "new")
    assert (tmp_path / "new" / ("rigs.txt" if text else "rigs.bin")).is_file()
    found = colmap_read.read(tmp_path / "new")
    assert found.names == written.names
    assert len(found.tracks.xyz) == N - 1
    places = found.tracks.xyz[found.tracks.point]
    kept = written.tracks.point != 2
    order = [  # pycolmap keeps points in no order
        sorted(zip(xyz.tolist(), frame.tolist(), xy.tolist(), strict=True))
        for xyz, frame, xy in (
            (places, found.tracks.frame, found.tracks.xy),
            (
                written.tracks.xyz[written.tracks.point[kept]],
                written.tracks.frame[kept],
                written.tracks.xy[kept],
            ),
        )
    ]
    for a, b in zip(*order, strict=True):
        assert_allclose(np.hstack(a), np.hstack(b), rtol=1e-6)
    assert_allclose(found.cameras.extrinsics, written.cameras.extrinsics, atol=1e-6)


@pytest.mark.colmap
@pytest.mark.parametrize("text", [False, True])
def test_every_lens_that_is_read_is_read_as_pycolmap_means_it(tmp_path: Path, text: bool) -> None:
    pycolmap = colmap.pycolmap()
    made = pycolmap.Reconstruction()
    for i, (name, *_) in enumerate(colmap_read.LENSES):
        lens = pycolmap.Camera.create_from_model_name(i + 1, name, 500.0, 640, 480)
        lens.params = lens.params + 0.01 * np.arange(len(lens.params))
        made.add_camera_with_trivial_rig(lens)
        image = pycolmap.Image(name=f"{name}.jpg", camera_id=i + 1, image_id=i + 1)
        made.add_image_with_trivial_frame(image, pycolmap.Rigid3d())
    (made.write_text if text else made.write_binary)(tmp_path)
    found = colmap_read.read(tmp_path)
    for i, lens in enumerate(found.lenses):
        camera = made.cameras[i + 1]
        assert (lens.model, lens.size) == (camera.model_name, (480, 640))
        assert_allclose(lens.parameters, camera.params)
        assert lens.distorted == (not camera.is_undistorted())
        assert_allclose(found.cameras.intrinsics[i], camera.calibration_matrix())
    assert sum(not lens.distorted for lens in found.lenses) == 2


@pytest.mark.colmap
def test_a_lens_of_another_kind_is_named_with_the_remedy(tmp_path: Path) -> None:
    pycolmap = colmap.pycolmap()
    made = pycolmap.Reconstruction()
    lens = pycolmap.Camera.create_from_model_name(1, "EUCM", 500.0, 640, 480)
    made.add_camera_with_trivial_rig(lens)
    made.write_text(tmp_path)
    with pytest.raises(InputError, match="EUCM") as raised:
        colmap_read.read(tmp_path)
    assert "image_undistorter" in raised.value.hint


@pytest.mark.parametrize("part", ["cameras.bin", "images.bin", "points3D.bin"])
def test_a_file_that_is_cut_short_or_missing_is_named(tmp_path: Path, part: str) -> None:
    colmap.write(model(), tmp_path)
    whole = (tmp_path / part).read_bytes()
    for length in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / part).write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"cut short.*{part}"):
            colmap_read.read(tmp_path)
    (tmp_path / part).unlink()
    with pytest.raises(InputError, match=r"no COLMAP model.*missing"):
        colmap_read.read(tmp_path)


@pytest.mark.parametrize("part", ["cameras.txt", "images.txt", "points3D.txt"])
def test_a_text_file_of_other_words_is_named(tmp_path: Path, part: str) -> None:
    colmap.write_text(model(), tmp_path)
    lines = (tmp_path / part).read_text(encoding="utf-8").splitlines()
    (tmp_path / part).write_text("\n".join([*lines, "4 what is this"]), encoding="utf-8")
    with pytest.raises(InputError, match=part):
        colmap_read.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("cameras.txt", "2 PINHOLE", "7 PINHOLE"), "no camera 2"),
        (("cameras.txt", "800 600 700.0", "800 600 -700.0"), "PINHOLE camera of 800 x 600"),
        (("points3D.txt", "\n7 ", "\n777 "), "lacks"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused(
    tmp_path: Path, change: tuple[str, str, str], words: str
) -> None:
    colmap.write_text(model(), tmp_path)
    part, old, new = change
    text = (tmp_path / part).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / part).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        colmap_read.read(tmp_path)


def test_depth_maps_of_colmap_and_numpy_are_the_same_map(tmp_path: Path) -> None:
    depth = np.array([[1, 2, 0.5], [4, 0, 8]], np.float32)
    # Width, height, channels; then row after row.
    (tmp_path / "a.geometric.bin").write_bytes(b"3&2&1&" + depth.tobytes())
    np.save(tmp_path / "a.npy", depth.astype(np.float16))
    holes = depth.copy()
    holes[1, 1] = np.nan
    np.save(tmp_path / "holes.npy", holes)
    for name in ("a.geometric.bin", "a.npy", "holes.npy"):
        found = colmap_read.read_map(tmp_path / name)
        assert_array_equal(found, depth, name)
        assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("short.bin", b"3&2&1&" + bytes(20)),
        ("normals.bin", b"1&1&3&" + bytes(12)),
        ("words.bin", b"no map at all"),
        ("words.npy", b"no map at all"),
        ("empty.npy", b""),
    ],
)
def test_a_file_that_is_no_depth_map_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        colmap_read.read_map(tmp_path / name)
    with pytest.raises(InputError, match=r"gone\.npy"):
        colmap_read.read_map(tmp_path / "gone.npy")
