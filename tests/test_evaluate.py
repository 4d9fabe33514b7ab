"""Measuring: the truth has no error, a constant prediction has that of the scenes."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from vggt_cli.geometry import encode_pose
from vggt_cli.learning import synthetic
from vggt_cli.learning.evaluate import Row, evaluate
from vggt_cli.learning.metrics import relative_pose_errors
from vggt_cli.learning.stream import FIRST_SEED
from vggt_cli.models.layers import Outputs
from vggt_cli.models.networks import Network

HELDOUT = Path(__file__).parents[1] / "weights/heldout.json"
SEEDS, PATH = range(3), synthetic.Path(3, (64, 80), 1.0)
FEW = {"seeds": SEEDS, "frames": [PATH.frames], "size": PATH.size, "spread": PATH.spread}


class Oracle(nn.Module):
    """A network that knows the scenes by their order and says three times their depth."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.scenes = iter([synthetic.sample(seed, PATH) for seed in SEEDS])

    def forward(self, images: Tensor, frames_per_chunk: int) -> Outputs:
        scene = next(self.scenes)
        assert scene.pixels.shape == images.shape[1:]
        cameras = scene.cameras
        encoding = encode_pose(cameras.extrinsics, cameras.intrinsics, PATH.size)
        encoding = torch.cat([encoding[:, :3] * self.scale, encoding[:, 3:]], -1)
        depth = scene.depth[None] * self.scale
        return Outputs(encoding[None, None], depth, torch.ones_like(depth))


def by_name(rows: list[Row]) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the network and of the constant prediction."""
    network, constant = rows
    assert [network["prediction"], constant["prediction"]] == ["network", "constant"]
    return cast(dict[str, float], network), cast(dict[str, float], constant)


def test_the_truth_at_another_scale_has_no_error() -> None:
    found, constant = by_name(evaluate(cast(Network, Oracle()), FEW))
    assert found["AUC@5"] == 100
    assert found["rotation"] == pytest.approx(0, abs=0.05)
    assert found["direction"] == pytest.approx(0, abs=0.05)
    assert found["AbsRel"] == pytest.approx(0, abs=1e-6)
    assert found["delta<1.25"] == 1
    assert found["field of view"] == pytest.approx(0, abs=1e-3)
    assert constant["direction"] == 90  # cameras that do not move have no direction
    assert constant["rotation"] > 10
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
