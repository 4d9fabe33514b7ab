"""Training: it learns, it repeats itself, it goes on where it stopped."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vggt_cli.learning import train
from vggt_cli.learning.train import TrainConfig
from vggt_cli.models.mini import Mini, MiniConfig

TINY = replace(
    MiniConfig(),
    embed_dim=48,
    heads=2,
    depth=2,
    registers=2,
    cached_layers=(0, 0, 1, 1),
    head_heads=2,
    features=16,
    level_channels=(8, 8, 8, 8),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "MiniConfig", lambda: TINY)


def config(folder: Path, steps: int) -> TrainConfig:
    """A run of seconds on few scenes, limited by steps: one by minutes depends on speed."""
    return TrainConfig(
        folder,
        minutes=math.inf,
        steps=steps,
        batch=4,
        frames=(2,),
        pixels=64,
        aspects=(1.0,),
        scenes=4,
        warm_up=20,
        workers=0,
    )


def run(folder: Path, steps: int) -> dict[str, Tensor]:
    """The weights after `steps`."""
    train.train(config(folder, steps), torch.device("cpu"))
    stored = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert stored["step"] == steps
    weights: dict[str, Tensor] = stored["network"]
    return weights


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_fifty_steps_lower_the_loss(tmp_path: Path) -> None:
    run(tmp_path, 100)
    with (tmp_path / "metrics.csv").open() as file:
        first, second = csv.DictReader(file)
    assert [first["step"], second["step"]] == ["50", "100"]
    assert float(second["loss"]) < 0.9 * float(first["loss"])


def test_the_same_seed_takes_the_same_steps_and_another_does_not(tmp_path: Path) -> None:
    first, again = run(tmp_path / "first", 2), run(tmp_path / "again", 2)
    assert equal(first, again)
    train.train(replace(config(tmp_path / "other", 2), seed=1), torch.device("cpu"))
    other = torch.load(tmp_path / "other/checkpoint.pt", weights_only=True)["network"]
    assert not equal(first, other)


def test_a_stopped_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    before = run(tmp_path, 2)
    assert equal(before, run(tmp_path, 2))  # nothing left to do
    assert not equal(before, run(tmp_path, 4))
    assert not (tmp_path / "checkpoint.new").exists()


def test_exported_weights_are_the_average_in_half_precision(tmp_path: Path) -> None:
    run(tmp_path, 2)
    target = tmp_path / "mini.safetensors"
    train.export(tmp_path, target)
    average = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["average"]
    with safe_open(target, "pt") as file:
        assert json.loads(file.metadata()["config"])["patch_size"] == 16
        assert set(file.keys()) == set(Mini(TINY).state_dict())  # nothing of the teacher
        for key in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(key), average[f"module.{key}"].half()), key
