"""Measuring: the truth has no error, a constant prediction has that of the scenes."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
from test_datasets import write_dense_workspace
from torch import Tensor, nn
from torch.nn import functional as F

from vggt_cli.errors import InputError
from vggt_cli.formats.colmap import Lens
from vggt_cli.geometry import encode_pose
from vggt_cli.learning import sift, synthetic
from vggt_cli.learning.datasets import open_scene
from vggt_cli.learning.evaluate import Row, evaluate, evaluate_photos
from vggt_cli.learning.metrics import relative_pose_errors
from vggt_cli.learning.stream import FIRST_SEED
from vggt_cli.models.layers import Outputs
from vggt_cli.models.networks import Network
from vggt_cli.reconstruction.matches import match
from vggt_cli.scene import Shaping

HELDOUT = Path(__file__).parents[1] / "weights/heldout.json"
SEEDS, PATH = range(3), synthetic.Path(3, (64, 80), 1.0)
FEW = {"seeds": SEEDS, "frames": [PATH.frames], "size": PATH.size, "spread": PATH.spread}


class Oracle(nn.Module):
    """A network that knows the scenes by their order and says three times their depth."""

    def __init__(self, size: tuple[int, int] = PATH.size) -> None:
        super().__init__()
        self.scale, self.size = nn.Parameter(torch.tensor(3.0)), size
        self.scenes = iter([synthetic.sample(seed, PATH) for seed in SEEDS])

    def forward(self, images: Tensor, frames_per_chunk: int) -> Outputs:
        scene, size = next(self.scenes), (images.shape[-2], images.shape[-1])
        assert size == self.size
        cameras = scene.cameras
        encoding = encode_pose(cameras.extrinsics, cameras.intrinsics, PATH.size)
        encoding = torch.cat([encoding[:, :3] * self.scale, encoding[:, 3:]], -1)
        depth = F.interpolate(scene.depth[None], size) * self.scale
        return Outputs(encoding[None, None], depth, torch.ones_like(depth))


def by_name(rows: list[Row]) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the network and of the constant prediction."""
    network, constant = rows
    assert [network["prediction"], constant["prediction"]] == ["network", "constant"]
    return cast(dict[str, float], network), cast(dict[str, float], constant)


@pytest.mark.parametrize(
    ("size", "shaping"), [(PATH.size, None), ((160, 192), Shaping("balanced", 176, 32))]
)
def test_the_truth_at_another_scale_has_no_error(
    size: tuple[int, int], shaping: Shaping | None
) -> None:
    network = cast(Network, Oracle(size))
    found, constant = by_name(evaluate(network, FEW, shaping=shaping))
    assert found["AUC@5"] == 100
    assert found["rotation"] == pytest.approx(0, abs=0.05)
    assert found["direction"] == pytest.approx(0, abs=0.05)
    assert found["AbsRel"] == pytest.approx(0, abs=1e-6)
    assert found["delta<1.25"] == 1
    assert found["field of view"] == pytest.approx(0, abs=1e-3)
    assert constant["direction"] == 90  # cameras that do not move have no direction
    assert constant["rotation"] > 5
    assert constant["AbsRel"] > 0.2
    assert constant["AUC@30"] == 0


def test_held_out_scenes_turn_by_25_degrees_and_are_never_trained_on() -> None:
    listed = json.loads(HELDOUT.read_text())
    assert max(listed["seeds"]) < FIRST_SEED
    turns = []
    for seed in listed["seeds"]:
        random = torch.Generator().manual_seed(seed)
        world = synthetic.world(random)
        path = synthetic.Path(8, tuple(listed["size"]), listed["spread"])
        extrinsics = synthetic.cameras(random, world, path).extrinsics
        still = torch.eye(3, 4).expand_as(extrinsics)
        turns.append(relative_pose_errors(still, extrinsics)[0].median())
    assert torch.stack(turns).median() >= 25


BOTH = ("sift", "sfm")
MOST = Shaping("balanced", 128, 16)


def photos(folder: Path, frames: int = 3) -> synthetic.Sample:
    """A scene of photos twice as large as the network sees them; its truth at that size."""
    large = synthetic.sample(5, synthetic.Path(frames, (256, 256), 0.3))
    eight_bit = (large.pixels * 255).round() / 255
    large = synthetic.Sample(eight_bit, large.cameras, large.depth, large.valid)
    write_dense_workspace(large, folder)
    return large


class Knows(nn.Module):
    """A network that says the truth about one scene, at half its size."""

    def __init__(self, large: synthetic.Sample) -> None:
        super().__init__()
        self.large, self.scale = large, nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, frames_per_chunk: int) -> Outputs:
        assert images.shape[-2:] == (128, 128)
        cameras = self.large.cameras
        encoding = encode_pose(cameras.extrinsics, cameras.intrinsics, (256, 256))
        encoding = torch.cat([encoding[:, :3] * self.scale, encoding[:, 3:]], -1)
        depth = self.large.depth[None, :, 1::2, 1::2] * self.scale
        return Outputs(encoding[None, None], depth, torch.ones_like(depth))


def test_the_truth_about_photos_has_no_error_and_sift_comes_close(tmp_path: Path) -> None:
    large = photos(tmp_path / "room")
    network = cast(Network, Knows(large))
    rows = evaluate_photos(network, MOST, [open_scene(tmp_path / "room")], BOTH)
    assert [(r["scene"], r["frames"], r["prediction"]) for r in rows] == [
        ("room", 3, "network"),
        ("room", 3, "constant"),
        ("room", 3, "SIFT"),
        ("room", 3, "SfM"),
    ]
    found, constant, classical, mapped = (cast(dict[str, float], row) for row in rows)
    assert found["AUC@5"] == 100
    assert found["rotation"] == pytest.approx(0, abs=0.05)
    assert found["direction"] == pytest.approx(0, abs=0.05)
    assert found["field of view"] == pytest.approx(0, abs=1e-3)
    assert found["AbsRel"] == pytest.approx(0, abs=1e-5)
    assert found["delta<1.25"] == 1
    assert constant["AUC@30"] < 50
    assert constant["AbsRel"] > 0.05
    assert classical["rotation"] < 1
    assert classical["direction"] < 10
    assert set(classical) - {"scene", "frames", "prediction"} == {
        "AUC@3", "AUC@5", "AUC@15", "AUC@30", "rotation", "direction"
    }  # fmt: skip
    assert mapped["registered"] in (0, pytest.approx(200 / 3), 100)
    assert "AbsRel" not in mapped


def test_two_photos_have_no_area_under_a_curve_and_one_has_no_pair(tmp_path: Path) -> None:
    network = cast(Network, Knows(photos(tmp_path / "two", 2)))
    found, _ = evaluate_photos(network, MOST, [open_scene(tmp_path / "two")])
    assert not any(name.startswith("AUC") for name in found)
    assert found["rotation"] == pytest.approx(0, abs=0.05)
    photos(tmp_path / "one", 1)
    with pytest.raises(InputError, match="single photo"):
        evaluate_photos(network, MOST, [open_scene(tmp_path / "one")])


def test_a_photo_that_does_not_fit_its_camera_is_named(tmp_path: Path) -> None:
    network = cast(Network, Knows(photos(tmp_path)))
    scene = open_scene(tmp_path)
    Image.new("RGB", (100, 100)).save(tmp_path / "images/1.png")
    with pytest.raises(InputError, match=r"\[100, 100\], its camera \[256, 256\].*1\.png"):
        evaluate_photos(network, MOST, [scene])
    (tmp_path / "images/1.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"cannot be read.*1\.png"):
        evaluate_photos(network, MOST, [scene])


def test_matches_are_mutual_and_clearer_than_the_second() -> None:
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    first, second = turn[:5], turn[[4, 0, 2]]
    rows, partners = match(first, second)
    assert list(zip(rows.tolist(), partners.tolist(), strict=True)) == [(0, 1), (2, 2), (4, 0)]
    apart = torch.cat([second + 0.2 * turn[5], second[:1] + 0.2 * turn[6]])
    assert match(first, apart)[0].tolist() == [0, 2]  # row 4 has two partners as near
    both = torch.cat([first, first[:1] + 0.5 * turn[7]])  # 5 wants row 1, which wants 0
    assert match(both, second)[0].tolist() == [0, 2, 4]
    assert len(match(first, second[:0])[0]) == len(match(first[:0], second)[0]) == 0


@pytest.mark.colmap
def test_sift_is_the_same_every_time_and_says_where_it_found_nothing() -> None:
    scene = synthetic.sample(5, synthetic.Path(2, (128, 160), 0.3))
    k = scene.cameras.intrinsics[0]
    lens = Lens("PINHOLE", (128, 160), (float(k[0, 0]), float(k[1, 1]), 80.0, 64.0))
    grays = [(p.mean(0) * 255).to(torch.uint8).numpy() for p in scene.pixels]
    views = [sift.View(gray, lens) for gray in (*grays, 0 * grays[0])]
    poses = sift.relative_poses(views)
    assert poses[0].equal(sift.relative_poses(views)[0])
    assert poses[0].isfinite().all()
    assert poses[1:].isnan().all()
