"""Given poses and intrinsics: read from files, matched by name, told from what they are not."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disturb import disturbed, from_first
from posed import arc, noisy, tracks_of
from test_similarity import drawn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap, colmap_read
from vggt_cli.formats.names import pair
from vggt_cli.formats.priors import Lenses, Poses, read_intrinsics, read_poses
from vggt_cli.geometry import invert, move, rotation_from_quaternion
from vggt_cli.learning.metrics import relative_pose_errors
from vggt_cli.reconstruction.priors import know, misread, place, question_intrinsics, refine_given
from vggt_cli.reconstruction.readings import (
    AXES,
    PAIRS,
    Reading,
    disagreement,
    documented,
    mistake,
    predicted_witness,
)
from vggt_cli.reconstruction.refine import RefineOptions, refine
from vggt_cli.scene import Cameras, Tracks

NAMES = tuple(f"{i:04d}.jpg" for i in range(7))
OPENCV, OPENGL = list(AXES)[:2]
MIRROR = torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)
SIZE = torch.tensor([[480, 640]])


def scattered(count: int = 7, seed: int = 3) -> Cameras:
    """Cameras that look about one way from anywhere: no symmetry, no plane, no line."""
    random = torch.Generator().manual_seed(seed)
    turn = torch.cat([0.3 * torch.randn(count, 3, generator=random), torch.ones(count, 1)], -1)
    rotation = rotation_from_quaternion(turn.double())
    centers = torch.randn(count, 3, generator=random).double()
    extrinsics = torch.cat([rotation, -rotation @ centers[..., None]], -1)
    k = torch.tensor([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]], dtype=torch.float64)
    return Cameras(from_first(extrinsics), k.repeat(count, 1, 1), SIZE.repeat(count, 1))


def written(cameras: Cameras, reading: Reading, transforms: bool, path: Path = Path("x")) -> Poses:
    """The poses in a file whose writer took `reading` for the format's meaning."""
    found = AXES[reading.axes].mT.double() @ cameras.extrinsics.double()
    matrices = invert(found) if reading.camera_to_world else found
    return Poses(path, NAMES[: len(cameras)], matrices, transforms, transforms)


def write_transforms(path: Path, poses: Poses, **values: object) -> Path:
    last = torch.tensor([[0.0, 0, 0, 1]], dtype=torch.float64)
    frames = [
        {"file_path": f"./images/{name}", "transform_matrix": torch.cat([m, last]).tolist()}
        for name, m in zip(poses.names, poses.matrices, strict=True)
    ]
    path.write_text(json.dumps({"frames": frames, **values}))
    return path


def write_model(folder: Path, cameras: Cameras, names: tuple[str, ...] = NAMES) -> Path:
    nothing = Tracks(
        torch.zeros(0, 3), torch.zeros(0).long(), torch.zeros(0).int(), torch.zeros(0, 2)
    )
    shared = (0,) * len(cameras)
    model = colmap.Model(names, cameras, shared, nothing, np.zeros((0, 3), np.uint8))
    colmap.write(model, folder)
    return folder


# Files


def test_poses_of_a_colmap_model_and_of_its_transforms_json_are_the_same(tmp_path: Path) -> None:
    cameras = scattered()
    model = write_model(tmp_path / "scene" / "sparse" / "0", cameras)
    (model / "points3D.bin").unlink()  # poses need no points
    given = written(cameras, Reading(True, OPENGL), True)
    transforms = read_poses(write_transforms(tmp_path / "transforms.json", given))
    ours = read_poses(tmp_path / "scene")
    assert ours.names == NAMES
    assert transforms.names == tuple(f"./images/{name}" for name in NAMES)
    for poses in (ours, transforms):
        torch.testing.assert_close(poses.extrinsics, cameras.extrinsics, atol=1e-12, rtol=0)


def test_the_scale_that_a_transforms_json_applied_is_taken_back(tmp_path: Path) -> None:
    given = written(scattered(), Reading(True, OPENGL), True)
    larger = given.matrices * torch.tensor([1.0, 1, 1, 0.25])
    path = write_transforms(
        tmp_path / "t.json", replace(given, matrices=larger), applied_scale=0.25
    )
    torch.testing.assert_close(read_poses(path).matrices, given.matrices)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON"),
        ('{"frames": []}', "no list of frames"),
        ('{"frames": [{"transform_matrix": 1}]}', "no file_path in frame 0"),
        ('{"frames": [{"file_path": "a.jpg"}]}', "no transform_matrix of 4 x 4 numbers for a.jpg"),
        ('{"frames": [{"file_path": "a.jpg", "transform_matrix": [[1, 0], [2]]}]}', "of 4 x 4"),
    ],
)
def test_a_malformed_transforms_json_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "transforms.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        read_poses(path)


def test_matrices_that_are_no_poses_are_refused(tmp_path: Path) -> None:
    shift = torch.eye(4)
    shift[0, 3] = 2.0
    for matrix, words in (
        (shift.mT, "is transposed"),
        (2 * torch.eye(4), "row 0 0 0 1"),
        (torch.diag(torch.tensor([2.0, 2, 2, 1])), "no rotation"),
    ):
        frame = {"file_path": "a.jpg", "transform_matrix": matrix.tolist()}
        (tmp_path / "t.json").write_text(json.dumps({"frames": [frame]}))
        with pytest.raises(InputError, match=words):
            read_poses(tmp_path / "t.json")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_poses(tmp_path / "none.json")
    with pytest.raises(InputError, match="no COLMAP model"):
        read_poses(tmp_path)
    with pytest.raises(InputError, match="neither fx,fy,cx,cy nor a file: 500,500,320"):
        read_intrinsics("500,500,320")


def matrix(fx: float, fy: float, cx: float, cy: float) -> Tensor:
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)


@pytest.mark.parametrize(
    "text",
    [
        "500,510,320,241",
        "500 510\n320 241\n",
        "500 0 320\n0 510 241\n0 0 1\n",
        "# K\n500,510,320,241",
    ],
)
def test_four_numbers_and_a_matrix_mean_the_same(tmp_path: Path, text: str) -> None:
    path = tmp_path / "K.txt"
    path.write_text(text)
    for lenses in (read_intrinsics("500,510,320,241"), read_intrinsics(str(path))):
        assert lenses.names == ()
        assert lenses.size.tolist() == [[0, 0]]
        assert lenses.intrinsics.tolist() == [matrix(500, 510, 320, 241).tolist()]


def test_lines_of_names_give_each_photo_its_own(tmp_path: Path) -> None:
    path = tmp_path / "lenses.txt"
    path.write_text("# NAME fx fy cx cy\nmy photo.jpg 500 501 320 240\nb.jpg, 600, 601, 321, 241\n")
    lenses = read_intrinsics(str(path))
    assert lenses.names == ("my photo.jpg", "b.jpg")
    found = know(
        lenses,
        ["b.png", "my photo.jpg", "x/b.jpg"][:2],
        SIZE.repeat(2, 1),
        lenses.intrinsics.flip(0),
    )
    assert found.intrinsics.tolist() == lenses.intrinsics.flip(0).tolist()
    assert found.group == (0, 1)
    assert found.fixed
    with pytest.raises(InputError, match=r"no intrinsics for c.jpg"):
        know(lenses, ["b.jpg", "c.jpg"], SIZE.repeat(2, 1), lenses.intrinsics)


@pytest.mark.parametrize("text", ["", "a b c d\n", "1 2 3\n", "500 500 320 nan\n", "0 500 320 240"])
def test_text_without_intrinsics_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "K.txt").write_text(text)
    with pytest.raises(InputError):
        read_intrinsics(str(tmp_path / "K.txt"))


def test_a_colmap_models_camera_serves_every_photo(tmp_path: Path) -> None:
    cameras = scattered()
    write_model(tmp_path, cameras)
    for name in (tmp_path, tmp_path / "cameras.bin"):
        lenses = read_intrinsics(str(name))
        assert lenses.names == ()
        assert lenses.size.tolist() == [[480, 640]]
        assert lenses.intrinsics.tolist() == cameras.intrinsics[:1].tolist()
        assert not lenses.distorted


def test_a_models_distortion_makes_its_intrinsics_a_start(tmp_path: Path) -> None:
    (tmp_path / "cameras.txt").write_text("1 SIMPLE_RADIAL 640 480 500 320 240 -0.1\n")
    lenses = read_intrinsics(str(tmp_path / "cameras.txt"))
    known = know(lenses, ["a.jpg"], SIZE, lenses.intrinsics)
    assert not known.fixed
    assert "distortion" in known.warnings[0]
    (tmp_path / "cameras.txt").write_text("1 OPENCV_FISHEYE 640 480 500 500 320 240 0 0 0 0\n")
    with pytest.raises(InputError, match="OPENCV_FISHEYE"):
        read_intrinsics(str(tmp_path))


def test_intrinsics_of_a_transforms_json_are_read_as_nerfstudio_and_instant_ngp_mean_them(
    tmp_path: Path,
) -> None:
    poses = written(scattered(), Reading(True, OPENGL), True)
    whole = {"fl_x": 500, "fl_y": 510, "cx": 320, "cy": 241, "w": 640, "h": 480}
    angle = {"camera_angle_x": 2 * math.atan(0.64), "w": 640, "h": 480}
    for values, k in ((whole, matrix(500, 510, 320, 241)), (angle, matrix(500, 500, 320, 240))):
        path = write_transforms(tmp_path / "transforms.json", poses, **values)
        lenses = read_intrinsics(str(path))
        torch.testing.assert_close(lenses.intrinsics, k[None])
        assert lenses.size.tolist() == [[480, 640]]
        assert not lenses.distorted
    content = json.loads(path.read_text())
    content["frames"][1]["fl_x"] = 600.0
    content["k1"] = 0.01
    path.write_text(json.dumps(content))
    lenses = read_intrinsics(str(path))
    assert lenses.distorted
    assert lenses.intrinsics[:3, 0, 0].tolist() == pytest.approx([500, 600, 500])
    assert len(lenses.names) == 7
    path.write_text(json.dumps({"frames": content["frames"][:1], "camera_angle_x": 1.0}))
    with pytest.raises(InputError, match="no fl_x"):
        read_intrinsics(str(path))


# Intrinsics of photos


def test_intrinsics_of_another_size_are_scaled_and_of_another_aspect_refused() -> None:
    lenses = Lenses("K", (), matrix(1000, 1020, 640, 482)[None], torch.tensor([[960, 1280]]))
    known = know(
        lenses, ["a.jpg", "b.jpg"], SIZE.repeat(2, 1), matrix(500, 510, 320, 240).repeat(2, 1, 1)
    )
    assert known.intrinsics[1].tolist() == matrix(500, 510, 320, 241).tolist()
    assert known.group == (0, 0)
    assert known.warnings == ()
    with pytest.raises(
        InputError, match=r"of images of 1280 x 960, the photo a.jpg is 480 x 640"
    ) as e:
        know(lenses, ["a.jpg"], SIZE.flip(1), known.intrinsics[:1])
    assert "as stored" in e.value.hint
    with pytest.raises(InputError, match=r"1280 x 960, the photo a.jpg is 640 x 320"):
        know(lenses, ["a.jpg"], torch.tensor([[320, 640]]), known.intrinsics[:1])


def test_a_principal_point_of_other_pixels_is_noticed() -> None:
    lenses = Lenses("K", (), matrix(1000, 1000, 640, 480)[None], torch.tensor([[0, 0]]))
    with pytest.raises(
        InputError, match=r"640, 480 is not near the middle, the photo a.jpg is 640"
    ):
        know(lenses, ["a.jpg"], SIZE, lenses.intrinsics)


def test_focal_lengths_far_from_the_prediction_are_named_with_figures() -> None:
    lenses = Lenses("K", (), matrix(500, 500, 320, 240)[None], SIZE)
    predicted = torch.stack([matrix(520, 520, 320, 240), matrix(700, 700, 320, 240)])
    known = know(lenses, ["a.jpg", "b.jpg"], SIZE.repeat(2, 1), predicted)
    assert len(known.warnings) == 1
    assert "1 of 2" in known.warnings[0]
    assert "b.jpg: 500 px given, 700 px predicted" in known.warnings[0]


# Names


def test_photos_pair_across_folders_and_endings() -> None:
    photos = ["cam1/0001.jpg", "cam2/0001.jpg", "cam2/0002.JPG", "frame.0007.png"]
    given = ["images/cam2/0001.png", ".\\images\\cam1\\0001.jpg", "./train/0002", "frame.0007"]
    assert pair(photos, given) == {0: 1, 1: 0, 2: 2, 3: 3}
    assert pair(["a/0.jpg", "b/0.jpg"], ["c/0.jpg"]) == {}
    assert pair(["a b/c.d.jpg"], ["a_b__c_d.jpg"]) == {0: 0}


# What the matrices mean


@pytest.mark.parametrize("transforms", [False, True])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("camera_to_world", [False, True])
def test_every_misreading_of_an_asymmetric_set_is_named(
    transforms: bool, axes: str, camera_to_world: bool
) -> None:
    true = scattered()
    reading = Reading(camera_to_world, axes)
    poses = written(move(true, drawn(5)), reading, transforms)
    found = mistake(poses, list(range(7)), predicted_witness(disturbed(true, 4, 0.08).extrinsics))
    if reading == documented(poses):
        assert found is None
    else:
        assert found is not None
        assert found.reading == reading
        assert reading.words in found.words
        assert documented(poses).words in found.words
        assert found.hint


@pytest.mark.parametrize("transforms", [False, True])
@pytest.mark.parametrize("axes", [a for a in AXES if "turned" not in a])
@pytest.mark.parametrize("camera_to_world", [False, True])
def test_the_hint_mends_the_file(transforms: bool, axes: str, camera_to_world: bool) -> None:
    true = scattered()
    poses = written(true, Reading(camera_to_world, axes), transforms)
    found = mistake(poses, list(range(7)), predicted_witness(true.extrinsics))
    mended = poses.matrices.clone()
    for step in found.hint.split("; then ") if found else []:
        if step.startswith("invert"):
            mended = invert(mended)
            continue
        said = re.match(r"negate (column|row)s? ([123 and]+) of (R|\[R \| t\])", step)
        assert said
        chosen = [int(n) - 1 for n in said[2].split(" and ")]
        assert said[3] == ("R" if said[1] == "column" else "[R | t]")
        if said[1] == "column":
            mended[:, :, chosen] *= -1
        else:
            mended[:, chosen] *= -1
    torch.testing.assert_close(replace(poses, matrices=mended).extrinsics, true.extrinsics)


def test_a_mirrored_world_with_proper_rotations_is_named(tmp_path: Path) -> None:
    true = scattered()
    # Left-handed positions and rotations taken for right-handed ones: x turns its sign in both.
    flip = torch.diag(MIRROR[:3])
    mirrored = flip @ true.extrinsics * MIRROR
    assert (torch.linalg.det(mirrored[:, :, :3]) > 0).all()
    model = write_model(tmp_path, replace(true, extrinsics=mirrored))
    with pytest.raises(InputError, match="mirrored") as error:
        place(read_poses(model), NAMES, disturbed(true, 3, 0.05))
    assert "negate column 1 of R, which mirrors the world back" in error.value.hint


def test_a_level_circle_of_opengl_cameras_is_named_so() -> None:
    angle = torch.linspace(0, 2, 7).double()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = [angle.cos(), zero, -angle.sin(), zero, one, zero, angle.sin(), zero, angle.cos()]
    rotation = torch.stack(rows, -1).view(-1, 3, 3)
    extrinsics = torch.cat(
        [rotation, torch.tensor([0.0, 0, 5]).double().expand(7, 3)[..., None]], -1
    )
    true = replace(scattered(), extrinsics=extrinsics)
    poses = written(true, Reading(False, OPENGL), False)
    found = mistake(poses, list(range(7)), predicted_witness(extrinsics))
    assert found is not None
    assert found.reading == Reading(False, OPENGL)


def test_poses_of_another_order_are_no_misreading() -> None:
    true = scattered()
    poses = written(
        replace(true, extrinsics=true.extrinsics.flip(0)), Reading(False, OPENCV), False
    )
    assert mistake(poses, list(range(7)), predicted_witness(true.extrinsics)) is None
    placed = place(poses, NAMES, true)
    assert "disagree" in placed.warnings[0]


def test_tracks_tell_what_poses_are_where_the_prediction_fails() -> None:
    true = disturbed(arc(7), 15, 0.7, seed=4)
    tracks = noisy(tracks_of(true, 400), 0.5, wrong=0.1)
    failed = replace(true, extrinsics=scattered(seed=9).extrinsics)
    guessed = replace(failed, intrinsics=true.intrinsics * torch.tensor([[1.05], [1.05], [1.0]]))
    for axes in AXES:
        for way in (False, True):
            poses = written(true, Reading(way, axes), False)
            if (way, axes) == (False, OPENCV):
                assert "disagree" in place(poses, NAMES, guessed, tracks).warnings[0]
                continue
            with pytest.raises(InputError, match=r"feature tracks are .* off") as error:
                place(poses, NAMES, guessed, tracks)
            assert Reading(way, axes).words in str(error.value)


def test_tracks_confirm_the_prediction_or_not_where_perspective_alone_tells() -> None:
    """Run around backwards and turned inside out, a small thing looks nearly the same."""
    true = arc(7)
    tracks = noisy(tracks_of(true, 400), 0.5, wrong=0.1)
    wide = true.intrinsics * torch.tensor([[1.1], [1.1], [1.0]])
    backwards = from_first(invert(true.extrinsics))
    right = written(true, Reading(False, OPENCV), False)
    failed = replace(true, extrinsics=backwards, intrinsics=wide)
    assert misread(right, NAMES, failed.extrinsics)
    assert "not certain" in place(right, NAMES, failed, tracks).warnings[0]
    wrong = written(true, Reading(True, OPENCV), False)
    with pytest.raises(InputError, match=r"camera-to-world with OpenCV.* from the prediction"):
        place(wrong, NAMES, replace(disturbed(true, 4, 0.08), intrinsics=wide), tracks)


def test_few_photos_without_tracks_only_warn() -> None:
    true = scattered(3)
    wrong = written(true, Reading(True, OPENCV), False)
    assert "not certain" in place(wrong, NAMES[:3], true).warnings[0]


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            self.numbers = max(self.numbers, one.numel() if isinstance(one, Tensor) else 0)
        return made


@pytest.mark.parametrize(("frames", "off"), [(2, 1e-9), (7, 1e-9), (300, 0.05)])
def test_pairs_of_photos_disagree_by_their_median_of_all_or_of_many(
    frames: int, off: float
) -> None:
    true = arc(frames).extrinsics.double()
    other = disturbed(arc(frames), 20, 0.3).extrinsics.double()
    rotation, direction = relative_pose_errors(other, true)
    expected = float(torch.maximum(rotation, direction).quantile(0.5))
    assert disagreement(other, true) == pytest.approx(expected, rel=off)


def test_pairs_of_thousands_of_photos_are_never_all_listed() -> None:
    true = arc(3000).extrinsics
    with Largest() as largest:  # type: ignore[no-untyped-call]
        disagreement(true, true)
    assert largest.numbers < 20 * PAIRS  # of 4,498,500 pairs


# Placed in the predicted world


def test_poses_of_another_world_come_to_lie_on_the_prediction() -> None:
    true = scattered()
    similarity = drawn(4)
    poses = written(move(true, similarity), Reading(True, OPENGL), True)
    placed = place(poses, NAMES, true)
    torch.testing.assert_close(placed.cameras.extrinsics, true.extrinsics, atol=1e-9, rtol=0)
    assert placed.cameras.extrinsics[0].tolist() == torch.eye(3, 4).tolist()
    assert placed.rotation.max() < 1e-4
    assert placed.shift.max() < 1e-8
    assert placed.warnings == ()
    torch.testing.assert_close(placed.original, move(true, similarity).extrinsics)


def test_a_photo_without_a_pose_keeps_the_predicted_one_and_is_named() -> None:
    true = scattered()
    poses = written(move(true, drawn(4)), Reading(False, OPENCV), False)
    fewer = replace(poses, names=NAMES[1:], matrices=poses.matrices[1:])
    placed = place(fewer, NAMES, true)
    assert NAMES[0] in placed.warnings[0]
    assert placed.original[0].isnan().all()
    assert placed.rotation[0].isnan()
    torch.testing.assert_close(placed.cameras.extrinsics, true.extrinsics, atol=1e-9, rtol=0)


def test_one_pose_that_is_far_off_is_named_with_figures() -> None:
    true = scattered()
    moved = true.extrinsics.clone()
    turn = rotation_from_quaternion(torch.tensor([0.0, 0.5, 0, 1]).double())
    moved[4] = torch.cat([turn @ moved[4, :, :3], turn @ moved[4, :, 3:]], -1)  # same centre
    poses = written(replace(true, extrinsics=moved), Reading(False, OPENCV), False)
    placed = place(poses, NAMES, true)
    angle = math.degrees(2 * math.atan(0.5))
    assert float(placed.rotation[4]) == pytest.approx(angle, abs=1e-3)
    assert f"{NAMES[4]} ({angle:.0f} degrees, 0 % of" in placed.warnings[0].replace("%", " %")
    assert len(placed.warnings) == 1


def test_fewer_than_two_poses_are_refused() -> None:
    poses = written(scattered(), Reading(False, OPENCV), False)
    with pytest.raises(InputError, match=r"poses of 1 of 2 photos.*0000.jpg.*0001.jpg, other.jpg"):
        place(poses, ["0001.jpg", "other.jpg"], scattered(2))


def test_matrices_of_a_left_handed_set_are_never_used() -> None:
    """Of photos on a level circle the prediction cannot tell; the determinant can."""
    true = arc(7)
    level = true.extrinsics.clone()
    poses = written(replace(true, extrinsics=level), Reading(True, list(AXES)[8]), True)
    with pytest.raises(InputError, match="mirrored"):
        place(poses, NAMES, true)


# Against the photos


def test_kept_poses_stay_and_their_lens_is_found() -> None:
    true = arc(6)
    start = replace(true, intrinsics=true.intrinsics * torch.tensor([[1.06], [1.06], [1.0]]))
    start = replace(
        start, intrinsics=torch.cat([start.intrinsics[..., :2], true.intrinsics[..., 2:]], -1)
    )
    tracks = noisy(tracks_of(true, 300), 0.3)
    refined = refine(start, tracks, [0] * 6, RefineOptions(fixed_poses=True))
    assert refined.verdict.method == "ba"
    assert torch.equal(refined.cameras.extrinsics, true.extrinsics)
    assert float(refined.cameras.intrinsics[0, 0, 0]) == pytest.approx(560, rel=5e-3)
    assert {image.outcome for image in refined.images} == {"given"}


def test_poses_and_intrinsics_that_are_kept_leave_nothing_to_adjust() -> None:
    true = arc(6)
    tracks = noisy(tracks_of(true, 300), 0.3)
    options = RefineOptions(fixed_poses=True, fixed_intrinsics=True)
    refined, warnings = refine_given(true, disturbed(true, 3, 0.05), tracks, [0] * 6, options)
    assert torch.equal(refined.cameras.extrinsics, true.extrinsics)
    assert torch.equal(refined.cameras.intrinsics, true.intrinsics)
    assert len(refined.tracks.xyz) > 200
    assert warnings == ()


def test_wrong_poses_are_not_used_or_kept_under_protest() -> None:
    true = arc(6)
    tracks = noisy(tracks_of(true, 300), 0.3)
    wrong = replace(true, extrinsics=from_first(true.extrinsics[[0, 4, 2, 3, 1, 5]]))
    kept, warnings = refine_given(wrong, true, tracks, [0] * 6, RefineOptions(fixed_poses=True))
    assert torch.equal(kept.cameras.extrinsics, wrong.extrinsics)
    assert "kept all the same" in warnings[0]


def test_wrong_intrinsics_are_questioned_with_figures_and_right_ones_are_not() -> None:
    true = arc(6)
    tracks = noisy(tracks_of(true, 300), 0.3)
    options = RefineOptions(method="ba", fixed_intrinsics=True)
    wrong = true.intrinsics.clone()
    wrong[:, 0, 0] = wrong[:, 1, 1] = 700.0
    start = replace(disturbed(true, 1, 0.02), intrinsics=wrong)
    words = question_intrinsics(refine(start, tracks, [0] * 6, options), tracks, [0] * 6, options)
    assert "given 700 px" in words
    right = replace(start, intrinsics=true.intrinsics)
    refined = refine(right, tracks, [0] * 6, options)
    assert question_intrinsics(refined, tracks, [0] * 6, options) == ""


def test_the_reference_of_real_photos_is_taken_as_it_is_and_named_where_it_is_not(
    shared: Path, tmp_path: Path
) -> None:
    scene = shared / "data" / "herzjesu_p8"
    poses = read_poses(scene)
    model = colmap_read.read(colmap_read.locate(scene))
    names = [path.name for path in sorted((scene / "images").iterdir())]
    predicted = disturbed(model.cameras, 8, 0.15)
    placed = place(poses, names, predicted)
    assert placed.warnings == ()
    assert placed.rotation.max() < 20
    given = written(model.cameras, Reading(False, OPENCV), True)
    given = replace(given, names=model.names)
    path = write_transforms(tmp_path / "transforms.json", given)
    with pytest.raises(InputError, match="world-to-camera with OpenCV axes") as error:
        place(read_poses(path), names, predicted, model.tracks)
    assert error.value.hint.startswith("invert each matrix")
