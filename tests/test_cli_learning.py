"""`vggt train` and `vggt evaluate`, for real and short."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vggt_cli.cli import app
from vggt_cli.models import weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a few seconds of training, from the bundled ones on."""
    run = tmp_path_factory.mktemp("runs") / "mini"
    start = weights.find("mini")
    arguments = ["train", "--out", str(run), "--minutes", "0.1", "--pixels", "64", "-q"]
    done = CliRunner().invoke(app, [*arguments, "--init", str(start), "--rate", "1e-5"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{run / 'mini.safetensors'}\n"
    return run / "mini.safetensors"


def test_training_goes_on_from_weights_and_writes_some_that_load(trained: Path) -> None:
    network, used = weights.load(trained, torch.device("cpu"), torch.float32)
    start, _ = weights.load("mini", torch.device("cpu"), torch.float32)
    assert used.name == "mini"
    before = dict(start.named_parameters())
    moved = [bool((p - before[name]).abs().max()) for name, p in network.named_parameters()]
    assert 0 < sum(moved) < len(moved)  # the local features stay


def test_evaluation_compares_with_a_constant_prediction(trained: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", "--model", str(trained), "--json", "-q"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(row["prediction"], row["frames"]) for row in rows] == [
        ("network", 4),
        ("constant", 4),
        ("network", 8),
        ("constant", 8),
    ]
    for network, constant in (rows[:2], rows[2:]):
        for figure in ("rotation", "direction", "AbsRel", "field of view"):
            assert network[figure] < constant[figure], figure
        assert network["AUC@30"] > constant["AUC@30"]
