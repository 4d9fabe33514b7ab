"""What a run is trained on: a function of the step, and not too much work."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Generator

from vggt_cli.errors import InputError
from vggt_cli.learning import stream, synthetic
from vggt_cli.learning.objectives import Batch
from vggt_cli.learning.stream import BLOCK, FEWEST, FIRST_SEED, MOST, Data, Stream, batches
from vggt_cli.scene import Cameras

CPU = torch.device("cpu")
SMALL = Data(pixels=32, frames=(2, 3), batch_frames=6, aspects=(1.0, 0.5, 2.0))
Seen = list[tuple[int, synthetic.Path]]


def drawn(seed: int, path: synthetic.Path) -> synthetic.Sample:
    """A sample that costs nothing: a wall of one colour, which tells the seed."""
    S, (H, W) = path.frames, path.size
    k = torch.tensor([[30.0, 0, W / 2], [0, 30.0, H / 2], [0, 0, 1]]).repeat(S, 1, 1)
    cameras = Cameras(torch.eye(3, 4).repeat(S, 1, 1), k, torch.tensor([[H, W]]).repeat(S, 1))
    shade = (seed % 97) / 97
    valid = torch.ones(S, H, W, dtype=torch.bool)
    return synthetic.Sample(torch.full((S, 3, H, W), shade), cameras, valid + 1.0, valid)


@pytest.fixture
def renders(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the renderer was asked for, and did not have to do."""
    asked: Seen = []

    def note(seed: int, path: synthetic.Path, device: torch.device) -> synthetic.Sample:
        asked.append((seed, path))
        return drawn(seed, path)

    monkeypatch.setattr(synthetic, "sample", note)
    return asked


def same(a: Batch, b: Batch) -> bool:
    tensors = zip((a.pixels, *a.truth), (b.pixels, *b.truth), strict=True)
    return all(torch.equal(x, y) for x, y in tensors)


def test_a_batch_depends_on_its_step_alone(renders: Seen) -> None:
    through = Stream(SMALL, 16, CPU)
    every = [through[step] for step in range(2 * BLOCK + 5)]
    for step in (2 * BLOCK + 3, 1, BLOCK - 1):
        assert same(Stream(SMALL, 16, CPU)[step], every[step]), step
    assert not same(every[0], every[1])
    assert not same(Stream(replace(SMALL, seed=1), 16, CPU)[0], every[0])


def test_a_step_renders_one_scene_and_chooses_from_many(renders: Seen) -> None:
    source = Stream(SMALL, 16, CPU)
    for step in range(2 * BLOCK):
        before = len(renders)
        source[step]
        new = len(renders) - before
        assert new == (FEWEST if step % BLOCK == 0 else 1), step
        assert FEWEST <= len(source.at_hand(step)) <= MOST
    seeds = [seed for seed, _ in renders]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= FIRST_SEED  # below are the held-out ones


def test_going_on_renders_no_more_than_what_is_at_hand(renders: Seen) -> None:
    Stream(SMALL, 16, CPU)[BLOCK - 1]
    assert len(renders) == MOST


def test_a_block_has_one_size_of_whole_patches_and_blocks_differ(renders: Seen) -> None:
    source = Stream(SMALL, 14, CPU)
    shapes = [source[step].pixels.shape[-2:] for step in range(0, 6 * BLOCK, 10)]
    assert all(len(set(shapes[i : i + 4])) == 1 for i in range(0, len(shapes), 4))
    assert len(set(shapes)) == len(SMALL.aspects)
    assert all(side % 14 == 0 for shape in shapes for side in shape)


def test_a_batch_holds_as_many_sequences_as_its_frames_allow(renders: Seen) -> None:
    shapes = {Stream(SMALL, 16, CPU)[step].pixels.shape[:2] for step in range(8)}
    assert shapes == {(3, 2), (2, 3)}
    long = replace(SMALL, frames=(9,))
    assert Stream(long, 16, CPU)[0].pixels.shape[:2] == (1, 9)  # one at least, from enough views


def test_cameras_spread_as_the_run_goes_on(renders: Seen) -> None:
    source = Stream(replace(SMALL, near=0.5, near_steps=BLOCK), 16, CPU)
    for step in range(BLOCK + 1):
        source[step]
    spreads = [path.spread for _, path in renders]
    assert spreads[:FEWEST] == [0.5] * FEWEST
    assert spreads[FEWEST : FEWEST + BLOCK - 1] == pytest.approx(
        [0.5 + 0.5 * step / BLOCK for step in range(1, BLOCK)]
    )
    assert spreads[-1] == 1


def test_processes_see_other_scenes_of_one_shape(renders: Seen) -> None:
    first, second = (Stream(SMALL, 16, CPU, rank, 2) for rank in range(2))
    for step in (0, BLOCK, 2 * BLOCK + 7):
        a, b = first[step], second[step]
        assert a.pixels.shape == b.pixels.shape
        assert not torch.equal(a.pixels, b.pixels)
    seeds = [seed for seed, _ in renders]
    assert len(set(seeds)) == len(seeds)


def test_any_number_of_workers_gives_the_same_order() -> None:
    data = replace(SMALL, pixels=16)
    orders = [list(batches(Stream(data, 16, CPU), range(3, 8), workers)) for workers in (0, 1, 2)]
    for others in orders[1:]:
        assert all(map(same, orders[0], others))


class Photos:
    """Stands for a scene of photos."""

    def __init__(self, folder: Path) -> None:
        self.count = int(folder.name)

    def __len__(self) -> int:
        return self.count

    def draw(self, random: Generator, count: int) -> torch.Tensor:
        return torch.randperm(self.count, generator=random)[:count]

    def sample(self, frames: torch.Tensor, size: tuple[int, int]) -> synthetic.Sample:
        return drawn(self.count, synthetic.Path(len(frames), size))


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vggt_cli.learning.datasets")
    module.open_scene = Photos  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules["vggt_cli.learning"], "datasets", module, raising=False)


@pytest.mark.usefixtures("datasets")
def test_scenes_of_photos_take_the_place_of_rendered_ones(renders: Seen) -> None:
    data = replace(SMALL, scenes=(Path("2"), Path("50"), Path("90")))
    source = Stream(data, 16, CPU)
    every = [source[step] for step in range(12)]
    shades = {round(float(x) * 97) for batch in every for x in batch.pixels[:, 0, 0, 0, 0]}
    assert shades == {2, 50, 90}
    lengths = {batch.pixels.shape[1] for batch in every}
    assert lengths == {2, 3}
    for batch in every:
        if batch.pixels.shape[1] == 3:  # the scene of two photos is too short
            assert 2 not in (batch.pixels[:, 0, 0, 0, 0] * 97).round()
    assert same(Stream(data, 16, CPU)[7], every[7])
    assert not renders


@pytest.mark.usefixtures("datasets")
def test_scenes_with_too_few_photos_are_refused() -> None:
    with pytest.raises(InputError, match="no scene has 3 photos: the largest of 1 has 2"):
        Stream(replace(SMALL, scenes=(Path("2"),)), 16, CPU)


def test_neighbouring_seeds_are_unlike(renders: Seen) -> None:
    seeds = [stream.seed_of(0, step) for step in range(100)]
    assert len(set(seeds)) == 100
    assert stream.seed_of(0, 1) != stream.seed_of(1, 0)
