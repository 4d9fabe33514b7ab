"""What a run will take: constants add up, a window fits, what cannot fit says what would."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from stand_in import flawless

from vggt_cli.device import free_memory, memory
from vggt_cli.errors import InputError, MemoryExceeded, OutputError
from vggt_cli.formats import room
from vggt_cli.models.catalog import CATALOG
from vggt_cli.models.networks import CONFIGS
from vggt_cli.reconstruction import plan, sequence
from vggt_cli.reconstruction.plan import Work, amounts, fit, foresee, memory_of
from vggt_cli.reconstruction.stages import Stages, silent
from vggt_cli.reconstruction.windows import in_order
from vggt_cli.scene import ImageSet, Prediction

CPU = torch.device("cpu")
WORK = Work("mini", "cpu", "bfloat16", 1000, (192, 288), 32, 12e6, False, 200_000, 60)
KNOWN = [key.split() for key in plan.costs()["networks"]]


def test_windows_are_counted_as_they_are_made() -> None:
    for frames, size in ((1000, 60), (61, 60), (60, 60), (100, 7), (5, 60), (3, 2)):
        work = dataclasses.replace(WORK, frames=frames, window=size)
        assert work.windows == len(in_order(frames, size, size // 2)), (frames, size)


def test_amounts_name_all_that_costs_something() -> None:
    of = amounts(WORK)
    for steps in (plan.costs()["steps"], *plan.costs()["networks"].values()):
        for cost in steps.values():
            assert {*cost["seconds"], *cost["bytes"]} <= {*of}
    assert of["frames"] == 1000
    assert of["photos"] == 12e9
    assert of["whole pairs"] == of["all pairs"] == 0
    assert of["pairs"] == 17_000
    tokens = 6 * 9 + plan.SPECIAL
    assert of["window tokens"] == 60 * tokens
    assert of["held"] == 60 * 192 * 288
    few = amounts(dataclasses.replace(WORK, frames=10, refined=True))
    assert few["whole pairs"] == 45 * few["searched photo"]
    assert few["sightings"] == 0  # photos say what is seen where
    assert few["set attention"] == (10 * tokens) ** 2
    assert few["held"] == 10 * 192 * 288


def test_more_of_anything_never_takes_less() -> None:
    less = dataclasses.replace(WORK, frames=40, refined=True)
    before = foresee(less)
    for change in ({"frames": 80}, {"size": (288, 384)}, {"photo_pixels": 24e6}, {"window": 80}):
        after = foresee(dataclasses.replace(less, **change))
        assert after.peak_memory >= before.peak_memory, change
        assert sum(after.seconds.values()) >= sum(before.seconds.values()), change


def test_the_window_is_the_largest_that_fits() -> None:
    free = fit(WORK, 1 << 50, None)
    assert free.work.window == 60
    assert free.work.windows == 33
    small, large = (foresee(dataclasses.replace(WORK, window=n)).peak_memory for n in (10, 11))
    if small < large:
        chosen = fit(WORK, small, None)
        assert foresee(dataclasses.replace(WORK, window=chosen.work.window + 1)).peak_memory > small
    assert fit(WORK, 0, 7).work.window == 7  # the user's own is taken as it is
    assert fit(dataclasses.replace(WORK, frames=1), 1 << 50, None).work.windows == 1


def test_what_never_fits_says_what_it_needs() -> None:
    with pytest.raises(
        MemoryExceeded, match=r"1000 images need .* GB even 2 at a time; 0.1 GB"
    ) as e:
        fit(WORK, 10**8, None)
    assert "--resolution" in e.value.hint
    with pytest.raises(InputError, match="--window 1"):
        fit(WORK, 1 << 50, 1)


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
@pytest.mark.parametrize("config", sorted(CONFIGS))
def test_every_network_has_a_plan_that_says_what_it_rests_on(config: str, device: str) -> None:
    size = {"mini": 32, "omega-1b": 16, "omega-1b-text": 16}.get(config, 14)
    work = Work(config, device, "bfloat16", 8, (10 * size, 16 * size), size, 2e6, False, 1000, 8)
    found = foresee(work)
    measured = [config, device, "bfloat16"] in KNOWN
    assert found.basis.startswith("measured on" if measured else "computed")
    assert found.peak_memory > 0
    assert found.seconds["predict"] > 0
    assert json.loads(json.dumps(found.report()))["windows"] == 1


def test_a_computed_billion_parameters_come_near_what_was_published() -> None:
    """VGGT on one H100, 336 x 518, aggregator alone: 3.12 s and bfloat16 weights of 1.8 GB."""
    work = Work("vggt-1b", "cuda", "bfloat16", 100, (336, 518), 14, 2e6, False, 1000, 100)
    found = foresee(work)
    assert 1.5 < found.seconds["predict"] < 10
    assert 2e9 < found.peak_memory < 25e9


def test_amounts_of_memory_are_read_as_people_write_them() -> None:
    assert memory_of("10GB") == 10**10
    assert memory_of("7.5 GiB") == int(7.5 * 2**30)
    assert memory_of("800mb") == 8 * 10**8
    assert memory_of("4g") == 4 * 10**9
    for wrong in ("", "much", "10 apples", "-1GB"):
        with pytest.raises(InputError, match="no amount of memory"):
            memory_of(wrong)


def test_memory_at_hand_is_known() -> None:
    total, free = memory()
    assert 0 < free <= total
    assert 0 < free_memory(CPU) <= total


def test_every_network_bears_a_window() -> None:
    assert all(known.window >= plan.LEAST for known in CATALOG)


class Short:
    """A network that runs out of memory with more frames than it bears."""

    def __init__(self, bears: int) -> None:
        self.bears, self.network = bears, flawless(40, lap=60)
        self.asked: list[int] = []

    def __call__(self, network: object, images: ImageSet) -> Prediction:
        self.asked.append(len(images))
        if len(images) > self.bears:
            raise torch.OutOfMemoryError("out of memory")
        return self.network(images)


def through(
    short: Short, frames: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> sequence.Predicted:
    monkeypatch.setattr(sequence, "predict", short)
    work = dataclasses.replace(WORK, frames=frames, window=window)
    images = short.network.images(list(range(frames)))
    return sequence.predicted(None, images, work, Stages(CPU, silent))  # type: ignore[arg-type]


def test_a_set_that_fits_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Short(100)
    prediction, drift = through(short, 24, 60, monkeypatch)
    assert short.asked == [24]
    assert drift is None
    assert len(prediction) == 24


def test_out_of_memory_halves_the_window_once_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    short = Short(12)
    prediction, drift = through(short, 40, 24, monkeypatch)
    assert short.asked[:2] == [24, 12]
    assert drift is not None
    assert drift["windows"] == 6
    assert prediction.depth.dtype == torch.float32  # few enough to be held
    assert "out of memory with 24 frames at once; going on with 12" in caplog.text


def test_a_second_time_it_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Short(5)
    with pytest.raises(MemoryExceeded, match="with 24 and with 12 frames at once") as error:
        through(short, 40, 24, monkeypatch)
    assert error.value.exit_code == 5
    assert "--window 3 needs about" in error.value.hint
    with pytest.raises(torch.OutOfMemoryError):
        through(Short(0), 3, 3, monkeypatch)  # one frame alone has nothing to join


def test_what_is_put_on_disk_goes_with_its_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    x = room.on_disk((3, 5), torch.float16)
    assert (x == 0).all()
    x[1] = 2
    room.let_go()
    assert x[1].tolist() == [2] * 5
    assert not list(tmp_path.iterdir())  # no name: nothing is left, however the process ends
    assert room.on_disk((0, 4), torch.bool).shape == (0, 4)
    with pytest.raises(OutputError, match="no room for") as error:
        room.on_disk((1 << 60,), torch.float16)
    assert "TMPDIR" in error.value.hint
