"""Public data sets in their own layouts: cameras project as the data sets define it."""

import gzip
import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from test_datasets import write_photos
from test_evaluate import MOST, Knows
from test_geometry import random_rotations
from torch import Tensor
from torch.testing import assert_close

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap
from vggt_cli.formats.points import read_ply
from vggt_cli.geometry import project
from vggt_cli.learning import clouds, public, synthetic
from vggt_cli.learning.clouds import DtuScan
from vggt_cli.learning.evaluate import evaluate_trials
from vggt_cli.models.networks import Network
from vggt_cli.scene import Cameras, Prediction, Tracks

H, W = 6, 8
POINTS = torch.tensor([[0.3, -0.2, 4.0], [-1, 0.5, 5], [0, 0, 6]], dtype=torch.float64)


def poses(n: int) -> tuple[Tensor, Tensor]:
    """Rotations [n, 3, 3] by little and translations [n, 3]."""
    random = torch.Generator().manual_seed(0)
    skew = torch.randn(n, 3, 3, generator=random, dtype=torch.float64) * 0.1
    rotation = torch.matrix_exp(skew - skew.mT)
    return rotation, torch.randn(n, 3, generator=random, dtype=torch.float64) * 0.3


def picture(path: Path, size: tuple[int, int] = (H, W)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (90, 120, 150)).save(path)


def pixels(trial: public.Trial, frame: int) -> Tensor:
    """Where a frame of a trial sees POINTS."""
    cameras = trial.scene.model.cameras
    at = project(POINTS[:, None, None], cameras.intrinsics[frame], cameras.extrinsics[frame])
    assert (at[1] > 0).all()
    return at[0][:, 0, 0]


def test_frames_are_drawn_by_a_rule_that_never_changes() -> None:
    names = [f"frame{i:06d}.jpg" for i in range(100)]
    assert public.drawn(names, 3) == public.drawn(names[::-1], 3) == GOLDEN
    assert sorted(public.drawn(names, None)) == names


GOLDEN = ["frame000072.jpg", "frame000068.jpg", "frame000037.jpg"]


def write_co3d(root: Path) -> list[dict[str, Any]]:
    """Four sequences of apples, of which one is good, and one of balls; frames of all."""
    frames: list[dict[str, Any]] = []
    kinds = [("apple/good", 52), ("apple/vague", 60), ("apple/short", 49), ("apple/broken", 55)]
    for sequence, n in [*kinds, ("ball/good", 52)]:
        rotation, translation = poses(n)
        if "broken" in sequence:
            translation[7] = 1e6
        for i in range(n):
            path = f"{sequence}/images/frame{i + 1:06d}.jpg"
            picture(root / path)
            view = {
                "R": rotation[i].tolist(),
                "T": translation[i].tolist(),
                "focal_length": [2.0, 2.1],
                "principal_point": [0.1, -0.05],
                "intrinsics_format": "ndc_isotropic",
            }
            name = sequence.rpartition("/")[2]
            image = {"path": path, "size": [H, W]}
            frames.append(
                {"sequence_name": name, "frame_number": i + 1, "image": image, "viewpoint": view}
            )
    for category in ("apple", "ball"):
        ours = [f for f in frames if f["image"]["path"].startswith(category)]
        names = sorted({f["sequence_name"] for f in ours})
        quality = [
            {"sequence_name": n, "viewpoint_quality_score": 0.2 if n == "vague" else 0.9}
            for n in names
        ]
        for file, content in (("frame", ours), ("sequence", quality)):
            with gzip.open(root / category / f"{file}_annotations.jgz", "wt") as out:
                json.dump(content, out)
        lists = root / category / "set_lists/set_lists_fewview_dev.json"
        lists.parent.mkdir()
        rows = [[f["sequence_name"], f["frame_number"], f["image"]["path"]] for f in ours]
        lists.write_text(json.dumps({"train": [], "val": [], "test": rows}))
    return frames


def test_co3d_is_its_good_test_sequences_with_cameras_as_pytorch3d_projects(tmp_path: Path) -> None:
    entries = {entry["image"]["path"]: entry for entry in write_co3d(tmp_path)}
    (trial,) = public.co3d(tmp_path)
    assert trial.group == "apple"
    assert len(set(trial.scene.names)) == len(trial.scene) == 10
    assert all(name.startswith("apple/good/") for name in trial.scene.names)
    assert all(trial.scene.path(frame).is_file() for frame in range(10))
    assert trial.scene.model.lenses[0].size == (H, W)
    for frame, name in enumerate(trial.scene.names):
        view = entries[name]["viewpoint"]
        x, y, z = (POINTS @ torch.tensor(view["R"]).double() + torch.tensor(view["T"]).double()).T
        # x left, y up; from the centre in halves of the shorter side.
        ndc = torch.stack([2.0 * x / z + 0.1, 2.1 * y / z - 0.05], -1)
        assert_close(pixels(trial, frame), torch.tensor([W / 2, H / 2]) - ndc * H / 2)


def test_the_older_image_planes_of_co3d_count_each_side(tmp_path: Path) -> None:
    entry = write_co3d(tmp_path)[0]
    entry["viewpoint"]["intrinsics_format"] = "ndc_norm_image_bounds"
    _, intrinsics, _ = public._of_pytorch3d(entry)
    assert_close(intrinsics[0, :].tolist(), [2.0 * W / 2, 0.0, W / 2 - 0.1 * W / 2])
    assert_close(intrinsics[1, :].tolist(), [0.0, 2.1 * H / 2, H / 2 + 0.05 * H / 2])


def test_real_estate_is_the_sequences_whose_frames_are_there(tmp_path: Path) -> None:
    rotation, translation = poses(14)
    extrinsics = torch.cat([rotation, translation[..., None]], -1)
    for name, n in (("aa", 14), ("few", 9), ("missing", 0)):
        rows = ["https://www.youtube.com/watch?v=none"]
        for i in range(14):
            pose = " ".join(map(repr, extrinsics[i].flatten().tolist()))
            rows.append(f"{33_000 * (i + 1)} 0.9 1.6 0.5 0.45 0.0 0.0 {pose}")
            if i < n:
                picture(tmp_path / "test" / name / f"{33_000 * (i + 1)}.png")
        (tmp_path / "test").mkdir(exist_ok=True)
        (tmp_path / f"test/{name}.txt").write_text("\n".join(rows) + "\n")
    (trial,) = public.real_estate(tmp_path)
    assert len(trial.scene) == 10
    for frame, name in enumerate(trial.scene.names):
        i = int(Path(name).stem) // 33_000 - 1
        x, y, z = (POINTS @ rotation[i].mT + translation[i]).T
        assert_close(
            pixels(trial, frame),
            torch.stack([(0.9 * x / z + 0.5) * W, (1.6 * y / z + 0.45) * H], -1),
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip


def write_dtu(root: Path, scale: float) -> tuple[Tensor, Tensor]:
    """Scan 1: its views' pictures and projections; their extrinsics and intrinsics."""
    rotation, translation = poses(public.DTU_VIEWS)
    extrinsics = torch.cat([rotation, 100 * translation[..., None]], -1)
    k = torch.tensor([[20.0, 0, 3.9], [0, 21, 3.1], [0, 0, 1]], dtype=torch.float64)
    (root / "Calibration/cal18").mkdir(parents=True)
    for view, pose in enumerate(extrinsics, 1):
        picture(root / f"Rectified/scan1/rect_{view:03d}_3_r5000.png")
        np.savetxt(root / f"Calibration/cal18/pos_{view:03d}.txt", (scale * k @ pose).numpy())
    return extrinsics, k


@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_projections_of_dtu_are_taken_apart(tmp_path: Path, scale: float) -> None:
    extrinsics, k = write_dtu(tmp_path, scale)
    (trial,) = public.dtu(tmp_path)
    cameras = trial.scene.model.cameras
    assert len(trial.scene) == 49
    assert trial.group == "scan1"
    assert_close(cameras.extrinsics, extrinsics, atol=1e-6, rtol=1e-6)
    centred = k + torch.tensor([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    assert_close(cameras.intrinsics, centred.expand(49, 3, 3).double(), atol=1e-6, rtol=1e-6)


PLY = """ply
format binary_little_endian 1.0
element vertex {count}
property float x
property float y
property float z
end_header
"""


def write_surface(root: Path) -> Tensor:
    """A wall of points 1 mm apart at z = 0, of which a strip lies below the table."""
    x, y = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    wall = torch.stack([x, y, torch.zeros_like(x)], -1).reshape(-1, 3).double()
    (root / "Points/stl").mkdir(parents=True)
    (root / "ObsMask").mkdir()
    header = PLY.format(count=len(wall)).encode()
    content = wall.numpy().astype("<f4").tobytes()
    (root / "Points/stl/stl001_total.ply").write_bytes(header + content)
    mask = np.ones((21, 21, 11), np.uint8)
    mask[:5] = 0  # x below -5 + 4.5 is not observed
    box = np.array([[-5.0, 0, -5], [15, 20, 5]])
    voxels = {"ObsMask": mask, "BB": box, "Res": np.array([[1.0]])}
    savemat(root / "ObsMask/ObsMask1_10.mat", voxels)
    savemat(root / "ObsMask/Plane1.mat", {"P": np.array([[0.0], [1], [0], [-9.5]])})  # y > 9.5
    return wall


def test_dtu_counts_what_its_evaluation_counts(tmp_path: Path) -> None:
    wall = write_surface(tmp_path)
    scan = DtuScan(tmp_path, 1)
    assert_close(read_ply(tmp_path / "Points/stl/stl001_total.ply"), wall)
    observed = wall[wall[:, 0] < 15] + torch.tensor([0, 0, 0.15])
    out = torch.tensor([[-4.0, 3, 1], [-50, 0, 0]]).double()  # in the dark, out of the box
    found = scan.figures(torch.cat([observed, observed + 0.001, out]))
    assert found["accuracy"] == pytest.approx(0.15, abs=1e-3)
    # Back: y of 10 to 19, x of 0 to 19; those of 15 to 19 are 1 to 5 mm from the nearest x = 14.
    far = [math.hypot(max(x - 14, 0), 0.15) for x in range(20)]
    assert found["completeness"] == pytest.approx(sum(far) / 20, abs=1e-3)
    assert found["overall"] == pytest.approx((found["accuracy"] + found["completeness"]) / 2)
    lone = torch.tensor([[3.0, 3, 4]]).double()
    assert scan.figures(lone)["accuracy"] == pytest.approx(4)  # back: most are within 20 mm
    assert scan.figures(out) == {}
    with pytest.raises(InputError, match=r"ObsMask2_10\.mat"):
        DtuScan(tmp_path, 2).figures(lone)


def test_predicted_points_of_dtu_are_aligned_by_their_cameras(tmp_path: Path) -> None:
    write_surface(tmp_path)
    rotation = torch.eye(3).double().repeat(3, 1, 1)
    centers = torch.tensor([[2.0, 12, -30], [8, 12, -30], [8, 16, -32]]).double()
    k = torch.tensor([[60.0, 0, W / 2], [0, 60, H / 2], [0, 0, 1]]).double().repeat(3, 1, 1)
    size = torch.tensor([[H, W]]).repeat(3, 1)
    true = Cameras(torch.cat([rotation, -(rotation @ centers[..., None])], -1), k, size)
    small = Cameras(torch.cat([rotation, -(rotation @ centers[..., None]) / 7], -1), k, size)
    depth = -centers[:, 2, None, None].expand(3, H, W)
    unknown = torch.zeros(3, H, W, dtype=torch.bool)
    prediction = Prediction(small, depth / 7, torch.ones(3, H, W))
    found = DtuScan(tmp_path, 1)(prediction, true, depth, unknown)
    assert found["accuracy"] < 0.75  # on the wall, whose points are 1 mm apart
    still = Cameras(true.extrinsics[[0, 0, 0]], k, size)
    wrong = Prediction(still, depth, torch.ones(3, H, W))
    assert DtuScan(tmp_path, 1)(wrong, true, depth, unknown) == {}


def write_eth3d(scene: synthetic.Sample, folder: Path) -> None:
    """A scene in ETH3D's layout; its depth is that of an equidistant fisheye of the same axes."""
    write_photos(scene, folder / "images/dslr_images_undistorted")
    n = len(scene.pixels)
    names = [f"dslr_images_undistorted/{i}.png" for i in range(n)]
    no_tracks = Tracks(
        torch.zeros(0, 3), torch.zeros(0).long(), torch.zeros(0).int(), torch.zeros(0, 2)
    )
    rgb = np.zeros((0, 3), np.uint8)
    model = colmap.Model(tuple(names), scene.cameras, (0,) * n, no_tracks, rgb)
    colmap.write_text(model, folder / "dslr_calibration_undistorted")
    originals = folder / "dslr_calibration_jpg"
    originals.mkdir()
    f, h, w = 150.0, 240, 320
    lens = f"THIN_PRISM_FISHEYE {w} {h} {f} {f} {w / 2} {h / 2} 0 0 0 0 0 0 0 0"
    (originals / "cameras.txt").write_text(f"1 {lens}\n")
    text = (folder / "dslr_calibration_undistorted/images.txt").read_text()
    (originals / "images.txt").write_text(text.replace("dslr_images_undistorted", "dslr_images"))
    (originals / "points3D.txt").write_text("")
    y, x = np.mgrid[:h, :w] + 0.5
    x, y = (x - w / 2) / f, (y - h / 2) / f
    angle = np.hypot(x, y)  # equidistant: the radius is the angle
    stretch = np.tan(angle) / np.maximum(angle, 1e-9)
    k = scene.cameras.intrinsics[0].numpy()
    column = np.floor(x * stretch * k[0, 0] + k[0, 2]).astype(int)
    row = np.floor(y * stretch * k[1, 1] + k[1, 2]).astype(int)
    H, W = scene.depth.shape[1:]
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    depths = folder / "ground_truth_depth/dslr_images"
    depths.mkdir(parents=True)
    for i, (depth, valid) in enumerate(zip(scene.depth, scene.valid, strict=True)):
        known = torch.where(valid, depth, torch.inf).numpy()
        seen = known[row.clip(0, H - 1), column.clip(0, W - 1)]
        np.where(inside, seen, np.inf).astype("<f4").tofile(depths / f"{i}.png")


@pytest.fixture(scope="module")
def rendered() -> synthetic.Sample:
    found = synthetic.sample(5, synthetic.Path(3, (256, 256), 0.3))
    return synthetic.Sample(
        (found.pixels * 255).round() / 255, found.cameras, found.depth, found.valid
    )


@pytest.mark.colmap
def test_depth_of_eth3d_is_found_through_the_lens_of_the_original(
    tmp_path: Path, rendered: synthetic.Sample
) -> None:
    write_eth3d(rendered, tmp_path / "hall")
    (trial,) = public.eth3d(tmp_path)
    assert trial.group == "hall"
    assert sorted(trial.scene.names) == [f"dslr_images_undistorted/{i}.png" for i in range(3)]
    for frame, name in enumerate(trial.scene.names):
        i = int(Path(name).stem)
        depth, valid = trial.scene.depth(frame, torch.eye(3).double(), (256, 256))
        assert valid.float().mean() > 0.5 * rendered.valid[i].float().mean()
        off = (depth / rendered.depth[i] - 1).abs()[valid & rendered.valid[i]]
        assert off.quantile(0.9) < 0.03  # the nearest pixel of a map that is stretched
        assert_close(
            trial.scene.model.cameras.extrinsics[frame].float(), rendered.cameras.extrinsics[i]
        )
    (tmp_path / "hall/ground_truth_depth/dslr_images/0.png").write_bytes(b"none")
    (trial,) = public.eth3d(tmp_path)
    with pytest.raises(InputError, match="float32"):
        trial.scene.depth(
            trial.scene.names.index("dslr_images_undistorted/0.png"), torch.eye(3).double(), (4, 4)
        )


@pytest.mark.colmap
def test_the_truth_about_eth3d_has_no_error_and_groups_have_a_mean(
    tmp_path: Path, rendered: synthetic.Sample
) -> None:
    for name in ("hall", "yard"):
        write_eth3d(rendered, tmp_path / name)
    (first, _) = public.eth3d(tmp_path)
    order = [int(Path(name).stem) for name in first.scene.names]
    truth = synthetic.Sample(
        rendered.pixels[order],
        rendered.cameras[order],
        rendered.depth[order],
        rendered.valid[order],
    )
    rows = evaluate_trials(cast(Network, Knows(truth)), MOST, public.eth3d(tmp_path))
    assert [(r["scene"], r.get("sets"), r["prediction"]) for r in rows] == [
        ("hall", 1, "network"), ("hall", 1, "constant"),
        ("yard", 1, "network"), ("yard", 1, "constant"),
        ("mean of 2", None, "network"), ("mean of 2", None, "constant"),
    ]  # fmt: skip
    hall, other = (cast(dict[str, float], row) for row in rows[:2])
    assert hall["AUC@3"] == 100
    assert hall["delta<1.25"] > 0.95
    assert hall["overall"] == (hall["accuracy"] + hall["completeness"]) / 2
    assert hall["overall"] < 0.2 * other["overall"]
    assert rows[4]["overall"] == pytest.approx(hall["overall"])
    assert len(list(public.eth3d(tmp_path, limit=1))) == 1


def test_points_of_pixels_are_compared_after_the_best_similarity() -> None:
    size = torch.tensor([[H, W]] * 2)
    k = torch.tensor([[9.0, 0, W / 2], [0, 9, H / 2], [0, 0, 1]]).repeat(2, 1, 1)
    extrinsics = torch.eye(3, 4).repeat(2, 1, 1)
    extrinsics[1, 0, 3] = -1
    true = Cameras(extrinsics, k, size)
    depth = 2 + torch.rand(2, H, W, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, H, W, dtype=torch.bool)
    turned = random_rotations(1).float()
    other = extrinsics.clone()
    other[:, :, :3] = turned
    other[:, :, 3] *= 3
    prediction = Prediction(Cameras(other, k, size), depth * 3, torch.ones(2, H, W))
    found = clouds.of_pixels(prediction, true, depth, valid)
    assert found == pytest.approx({"accuracy": 0, "completeness": 0, "overall": 0}, abs=1e-5)
    worse = Prediction(prediction.cameras, prediction.depth + 0.3, prediction.confidence)
    assert clouds.of_pixels(worse, true, depth, valid)["overall"] > 0.01
    assert clouds.of_pixels(prediction, true, depth, ~valid) == {}


@pytest.mark.parametrize("name", public.DATA_SETS)
def test_a_folder_that_is_no_such_data_set_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"nothing of this data set in: {tmp_path}"):
        next(public.DATA_SETS[name](tmp_path, None))


def test_a_file_without_points_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_text("none")
    for path in (tmp_path / "a.ply", tmp_path / "b.ply"):
        with pytest.raises(InputError, match=path.name):
            read_ply(path)
