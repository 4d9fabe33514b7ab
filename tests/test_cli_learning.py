"""`vggt train` and `vggt evaluate`, for real and short."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_evaluate import HELDOUT, photos
from test_public import write_eth3d
from typer.testing import CliRunner

from vggt_cli.cli import app
from vggt_cli.errors import InputError
from vggt_cli.learning import synthetic
from vggt_cli.models import store, weights

SMALL = ("--frames", "2", "2", "--batch-frames", "2", "--pixels", "64")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a few steps of training, from the bundled ones on."""
    run = tmp_path_factory.mktemp("runs") / "mini"
    arguments = ["train", "--out", str(run), "--init", "mini", "--steps", "4", *SMALL, "-q"]
    done = CliRunner().invoke(app, [*arguments, "--rate", "1e-5"])
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


@pytest.mark.parametrize(
    ("part", "prefix"),
    [("encoder", "aggregator.patch_embed."), ("depth-head", ("depth_head.", "match_head."))],
)
def test_all_but_one_part_can_stay(
    tmp_path: Path, part: str, prefix: str | tuple[str, ...]
) -> None:
    arguments = ["train", "--out", str(tmp_path), "--init", "mini", "--steps", "2", *SMALL, "-q"]
    done = CliRunner().invoke(app, [*arguments, "--freeze", f"all-but-{part}", "--rate", "1e-2"])
    assert done.exit_code == 0, done.output
    network, _ = weights.load(tmp_path / "mini.safetensors", torch.device("cpu"), torch.float32)
    start, _ = weights.load("mini", torch.device("cpu"), torch.float32)
    before = dict(start.named_parameters())
    moved = {name for name, p in network.named_parameters() if not p.equal(before[name])}
    assert moved
    assert all(name.startswith(prefix) for name in moved), moved


def test_a_smoke_run_says_that_the_loss_falls() -> None:
    done = CliRunner().invoke(app, ["train", "--smoke", "-q"])
    assert done.exit_code == 0, done.output
    words = done.stdout.split()
    assert float(words[2]) > float(words[8])


def test_a_run_without_a_folder_is_refused() -> None:
    done = CliRunner().invoke(app, ["train", "--steps", "1"])
    assert isinstance(done.exception, InputError)
    assert done.exception.hint == "give --out RUN"


def test_an_interrupted_command_saves_first(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vggt_cli", "train", "--out", str(tmp_path), *SMALL, "-q"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        while not (tmp_path / "config.json").exists() and running.poll() is None:
            time.sleep(0.1)
        time.sleep(1)  # its worker has started
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does, and torchrun
        _, words = running.communicate(timeout=120)
    assert running.returncode == 130
    assert words == "interrupted\n"
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] >= 1


ONCE = ("--no-sift", "-q")


def test_evaluation_compares_with_a_constant_prediction(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(HELDOUT.parent, tmp_path / "weights")
    listed = json.loads(HELDOUT.read_text())
    listed["seeds"] = listed["seeds"][:2]  # of 48, which take minutes
    (folder / "heldout.json").write_text(json.dumps(listed))
    monkeypatch.setattr(store, "bundled", lambda: folder)
    done = CliRunner().invoke(app, ["evaluate", "--model", str(trained), *ONCE, "--json"])
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


def test_photos_are_evaluated_as_a_table_and_as_json(trained: Path, tmp_path: Path) -> None:
    photos(tmp_path / "room")
    arguments = ["evaluate", str(tmp_path / "room"), "--model", str(trained), "-q"]
    rows = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [row["prediction"] for row in rows] == ["network", "constant", "SIFT"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    head = next(words for words in lines if words[:1] == ["scene"])
    assert head[1:7] == ["frames", "prediction", "AUC@3", "AUC@5", "AUC@15", "AUC@30"]
    printed = [words for words in lines if words[:1] == ["room"]]
    assert [words[1:3] for words in printed] == [["3", row["prediction"]] for row in rows]
    assert printed[0][7] == f"{rows[0]['rotation']:.2f}"
    assert "true intrinsics" in done.stdout


@pytest.mark.colmap
def test_a_public_data_set_is_a_table_that_says_whose_frames_it_has(
    trained: Path, tmp_path: Path
) -> None:
    for name in ("hall", "yard"):
        write_eth3d(synthetic.sample(5, synthetic.Path(3, (96, 128), 0.3)), tmp_path / name)
    arguments = ["evaluate", str(tmp_path), "--protocol", "eth3d", "--model", str(trained)]
    done = CliRunner().invoke(app, [*arguments, "--limit", "1", *ONCE])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    head = next(words for words in lines if words[:1] == ["scene"])
    assert head[1:4] == ["sets", "frames", "prediction"]
    assert head[-3:] == ["accuracy", "completeness", "overall"]
    assert [words[:4] for words in lines if words[:1] == ["hall"]] == [
        ["hall", "1", "3", "network"],
        ["hall", "1", "3", "constant"],
    ]
    assert "yard" not in done.stdout
    assert "published tables" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "dtu"], "--protocol dtu needs one folder"),
        (["--method", "sfm"], "--method sfm needs photos"),
    ],
)
def test_options_without_their_photos_are_refused(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert isinstance(done.exception, InputError)
    assert words in str(done.exception)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vggt_cli", "evaluate", str(tmp_path), "-q"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"no COLMAP model in reference, sparse/0, sparse: {tmp_path}" in done.stderr
