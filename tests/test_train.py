"""Training: it learns, it repeats itself, it goes on exactly where it stopped."""

import csv
import functools
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vggt_cli.errors import InputError, OutputError
from vggt_cli.learning import journal, synthetic, train
from vggt_cli.learning.journal import Journal
from vggt_cli.learning.objectives import objective
from vggt_cli.learning.stream import Data
from vggt_cli.learning.train import TrainConfig
from vggt_cli.models import networks, weights
from vggt_cli.models.catalog import entry
from vggt_cli.models.mini import Mini, MiniConfig
from vggt_cli.models.networks import Network

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
CPU = torch.device("cpu")
rendered = functools.cache(synthetic.sample)  # the tests share their few scenes


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "MiniConfig", lambda: TINY)
    monkeypatch.setattr(journal, "SEEDS", (900_000,))
    monkeypatch.setattr(synthetic, "sample", rendered)


def config(folder: Path, steps: int, **changes: Any) -> TrainConfig:
    """A run of seconds on few scenes."""
    data = Data(frames=(2,), batch_frames=4, pixels=32, aspects=(1.0,), near=1, rendered=4)
    whole = TrainConfig(folder, data=data, steps=steps, workers=0, look_steps=10_000, log_steps=1)
    return replace(whole, **changes)


def stored(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return checkpoint


def run(folder: Path, steps: int, **changes: Any) -> dict[str, Tensor]:
    """The weights after `steps`."""
    train.train(config(folder, steps, **changes), CPU)
    checkpoint = stored(folder)
    assert checkpoint["step"] == steps
    state: dict[str, Tensor] = checkpoint["network"]
    return state


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def rows(folder: Path, table: str = "metrics") -> list[dict[str, str]]:
    """A table without its clock."""
    with (folder / f"{table}.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "minutes"} for row in csv.DictReader(file)]


def sending(number: int, at: int) -> Callable[[str, int, int], None]:
    """A progress that sends this process a signal after step `at`."""

    def progress(stage: str, done: int, total: int) -> None:
        if done == at:
            signal.raise_signal(number)

    return progress


def test_the_loss_falls(tmp_path: Path) -> None:
    data = replace(config(tmp_path, 1).data, pixels=64, batch_frames=8)
    run(tmp_path, 60, data=data, log_steps=30)
    first, second = rows(tmp_path)
    assert [first["step"], second["step"]] == ["30", "60"]
    assert float(second["loss"]) < 0.9 * float(first["loss"])


def test_the_same_seed_takes_the_same_steps_and_another_does_not(tmp_path: Path) -> None:
    first, again = run(tmp_path / "first", 2), run(tmp_path / "again", 2)
    assert equal(first, again)
    data = replace(config(tmp_path, 2).data, seed=1)
    assert not equal(first, run(tmp_path / "other", 2, data=data))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT is heard, as a shell's background job would not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    steps, changes = 44, {"log_steps": 3, "look_steps": 22}  # beyond the first block of scenes
    run(tmp_path / "whole", steps, **changes)
    parted = config(tmp_path / "parted", steps, **changes)
    for at in (8, 42):
        with pytest.raises(KeyboardInterrupt):
            train.train(parted, CPU, sending(signal.SIGINT, at))
        assert stored(parted.out)["step"] == at + 1  # progress is told before the next step
    assert train.train(parted, CPU) == parted.out / "mini.safetensors"
    whole, again = stored(tmp_path / "whole"), stored(parted.out)
    for part in ("network", "teacher", "average"):
        assert equal(whole[part], again[part]), part
    for table in ("metrics", "validation"):
        assert rows(tmp_path / "whole", table) == rows(parted.out, table), table
    assert not list(parted.out.glob("*.new"))


def test_what_a_crash_lost_is_done_again(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 6)

    def crash(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise ZeroDivisionError

    crashed = config(tmp_path / "crashed", 6)
    with pytest.raises(ZeroDivisionError):
        train.train(replace(crashed, save_minutes=0), CPU, crash)
    assert stored(crashed.out)["step"] == 4
    assert len(rows(crashed.out)) == 5
    train.train(crashed, CPU)
    assert equal(whole, stored(crashed.out)["network"])
    assert rows(crashed.out) == rows(tmp_path / "whole")


def test_the_clock_stops_a_run_and_leaves_its_schedule_alone(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 3)
    stopping = config(tmp_path / "parted", 3, max_minutes=0)
    for step in (1, 2, 3):
        assert train.train(stopping, CPU) == stopping.out / "mini.safetensors"
        assert stored(stopping.out)["step"] == step
    assert equal(whole, stored(stopping.out)["network"])


def test_a_folder_with_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    run(tmp_path, 1)
    other = config(tmp_path, 1, learning_rate=1e-3, max_minutes=7, workers=1)
    with pytest.raises(InputError, match=r"there learning_rate is 0.0005, not 0.001$"):
        train.train(other, CPU)
    wider = replace(config(tmp_path, 1), data=replace(other.data, pixels=96))
    with pytest.raises(InputError, match="data pixels is 32, not 96"):
        train.train(wider, CPU)


@pytest.mark.parametrize("what", ["damaged", "foreign", "code"])
def test_what_is_no_checkpoint_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    words = "not a checkpoint"
    if what == "damaged":
        torch.save({"numbers": {}}, path)
        path.write_bytes(path.read_bytes()[:200])
        words = "damaged"
    else:
        torch.save({"model": 1} if what == "foreign" else Path, path)
    with pytest.raises(InputError, match=words):
        train.train(config(tmp_path, 1), CPU)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        train.train(config(tmp_path / "file" / "run", 1), CPU)


def test_a_step_without_a_finite_gradient_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def broken(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = objective(*arguments)
        return loss * math.nan, terms

    stopping = config(tmp_path, 3, max_minutes=0)
    train.train(stopping, CPU)
    before = stored(tmp_path)
    monkeypatch.setattr(train, "objective", broken)
    train.train(stopping, CPU)
    after = stored(tmp_path)
    assert after["step"] == before["step"] + 1
    assert equal(before["network"], after["network"])
    assert equal(before["average"], after["average"])


def test_exported_weights_are_the_average_in_half_precision(tmp_path: Path) -> None:
    target = train.train(config(tmp_path, 2), CPU)
    assert target == tmp_path / "mini.safetensors"
    average = stored(tmp_path)["average"]
    with safe_open(target, "pt") as file:
        assert json.loads(file.metadata()["config"])["patch_size"] == 32
        assert set(file.keys()) == set(Mini(TINY).state_dict())  # nothing of the teacher
        for key in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(key), average[key].half()), key


def test_the_average_begins_with_the_weights_and_then_lags() -> None:
    mean, value = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(mean.weight)
    nn.init.ones_(value.weight)
    train.follow(mean, value, 0)
    assert mean.weight.item() == pytest.approx(0.9)
    nn.init.zeros_(mean.weight)
    train.follow(mean, value, 100_000)
    assert mean.weight.item() == pytest.approx(0.001)


def test_the_rate_rises_and_falls_with_the_steps(tmp_path: Path) -> None:
    shares = [train.schedule(step, config(tmp_path, 100)) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 5, rel=0.01)
    assert max(shares) == shares[4] == pytest.approx(1, abs=0.01)
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert shares[100] == pytest.approx(0.02)


def test_groups_spare_the_encoder_and_what_is_no_matrix(tmp_path: Path) -> None:
    network, teacher = networks.build(tiny.OMEGA), nn.Linear(2, 2)
    train.freeze(network)
    found = train.groups(network, teacher, config(tmp_path, 1))
    names = {id(p): name for name, p in network.named_parameters()}
    for group in found:
        for p in group["params"]:
            encoder = names.get(id(p), "").startswith("aggregator.patch_embed.")
            assert group["share"] == (0.1 if encoder else 1)
            assert group["weight_decay"] == (0.02 if p.ndim > 1 else 0)
    assert sum(len(group["params"]) for group in found) == len(names) + 2


@pytest.mark.parametrize("numbers", [tiny.VGGT, tiny.OMEGA], ids=["vggt", "omega"])
@pytest.mark.parametrize("part", list(train.PARTS))
def test_what_is_frozen_has_no_gradient_no_optimizer_state_and_evaluates(
    part: str, numbers: networks.Config
) -> None:
    network = networks.build(numbers)
    train.freeze(network, (part,))
    modules = train.parts_of(network, part)
    frozen = {id(p) for module in modules for p in module.parameters()}
    assert frozen
    assert all(p.requires_grad == (id(p) not in frozen) for p in network.parameters())
    assert network.training
    assert not any(module.training for module in modules)
    listed = train.groups(network, nn.Linear(1, 1), TrainConfig(Path()))
    assert not frozen & {id(p) for group in listed for p in group["params"]}


def gradients(network: Network) -> dict[str, Tensor]:
    images = torch.rand(1, 3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(images)
    (outputs.pose_passes.square().mean() + outputs.depth.mean()).backward()
    return {k: p.grad for k, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("numbers", [tiny.VGGT, tiny.OMEGA], ids=["vggt", "omega"])
def test_gradients_are_the_same_when_blocks_are_computed_again(numbers: networks.Config) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.build(numbers)
    plain = gradients(network)
    assert len(plain) > 20
    network.zero_grad()
    train.recompute(network.aggregator)
    calls = []
    network.aggregator.get_submodule("frame_blocks.0.mlp").register_forward_hook(
        lambda *_: calls.append(1)
    )
    again = gradients(network)
    assert len(calls) == 2
    assert plain.keys() == again.keys()
    assert equal(plain, again)


def test_steps_are_the_same_when_blocks_are_computed_again(tmp_path: Path) -> None:
    again = run(tmp_path / "again", 2, checkpointing=True)
    assert equal(run(tmp_path / "plain", 2), again)


def test_a_run_from_weights_keeps_their_name_and_can_be_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.install(monkeypatch, tmp_path)
    before = networks.build(tiny.CONFIGS["mini"]).state_dict()
    start = tmp_path / "mini.safetensors"
    save_file(before, start)
    goes_on = config(tmp_path / "run", 1, init=str(start), freeze=("encoder",))
    target = train.train(goes_on, CPU)
    assert target == tmp_path / "run" / "mini.safetensors"
    network, used = weights.load(target, CPU, torch.float32)
    assert used.name == "mini"
    frozen = [k for k in before if k.startswith("aggregator.patch_embed.")]
    now = network.state_dict()
    assert all(torch.equal(before[k], now[k]) for k in frozen)
    assert not equal(before, now)


@pytest.mark.parametrize("name", ["vggt-1b-commercial", "omega-1b-416", "omega-1b-256-text"])
def test_an_exported_file_says_which_of_the_like_weights_it_was_made_of(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.install(monkeypatch, tmp_path)
    kind = entry(name).config
    network = networks.build(tiny.CONFIGS[kind])
    path = train.export(network, name, tmp_path / "any.safetensors")
    known, _ = weights.identify(path)
    assert known.name == name
    again, _ = weights.load(path, CPU, torch.float32, train.HEADS)
    assert equal(network.state_dict(), again.state_dict())


def test_held_out_scenes_are_measured_and_drawn(tmp_path: Path) -> None:
    run(tmp_path, 2, look_steps=2)
    (row,) = rows(tmp_path, "validation")
    assert row["step"] == "2"
    assert 0 < float(row["AbsRel"]) < 10
    with Image.open(tmp_path / "pictures" / "0000002.png") as picture:
        assert picture.size == (2 * 32, 4 * 32)  # two frames; photos, two of depth, confidence
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents*"))


def test_without_tensorboard_there_are_csv_files_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        Journal(tmp_path, 0).write("metrics", 1, {"loss": 2.5})
    assert len(caplog.records) == 1
    assert rows(tmp_path) == [{"step": "1", "loss": "2.5"}]


SECOND = """
import os, sys, torch
from dataclasses import replace
from pathlib import Path
import test_train as here
from vggt_cli.learning import journal, synthetic, train
train.MiniConfig, journal.SEEDS = lambda: here.TINY, (900_000,)
made, shared = train._network, []
def kept(*arguments):
    shared.append(made(*arguments))
    return shared[-1]
train._network = kept
file = train.train(here.config(Path(sys.argv[1]) / "run", 3), torch.device("cpu"))
rank = os.environ["RANK"]
assert (file is None) == (rank != "0")
torch.save(shared[0][1].state_dict(), Path(sys.argv[1]) / f"{rank}.pt")
"""


def test_two_processes_of_torchrun_end_with_equal_weights(tmp_path: Path) -> None:
    script = tmp_path / "second.py"
    script.write_text(SECOND)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second)
    assert equal(first, stored(tmp_path / "run")["network"])
    assert not equal(first, run(tmp_path / "alone", 3))  # whose batches are half as large
