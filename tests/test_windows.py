"""Long sequences: windows equal the whole, loops close, memory and time are those of a window."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from disturb import generator
from stand_in import StandIn, flawless
from torch import Tensor
from torch.testing import assert_close
from wall import EVERYTHING, wall

from vggt_cli.geometry import align_cameras, move
from vggt_cli.learning import synthetic
from vggt_cli.models import weights
from vggt_cli.reconstruction import loops
from vggt_cli.reconstruction.fuse import fuse
from vggt_cli.reconstruction.predict import predict
from vggt_cli.reconstruction.shelf import Shelf
from vggt_cli.reconstruction.windows import (
    Joined,
    between,
    by_looks,
    follows,
    in_order,
    predict_windows,
    stream,
)
from vggt_cli.scene import Cameras, ImageSet, Prediction

TESTS = Path(__file__).parent


def trajectory_error(network: StandIn, cameras: Cameras) -> float:
    """Root mean square distance of the centres from the truth, metres, best aligned."""
    placed = move(cameras, align_cameras(cameras, network.cameras)).centers
    return float((placed - network.cameras.centers).norm(dim=-1).square().mean().sqrt())


def descriptors(network: StandIn, frames: list[int]) -> Tensor:
    """As for sets without order: every frame for itself."""
    single = [network.images([frame]) for frame in frames]
    return loops.descriptors((images, network(images).tokens) for images in single)


def everything(network: StandIn) -> ImageSet:
    return network.images(list(range(network.count)))


def joined(network: StandIn, size: int) -> Joined:
    windows = in_order(network.count, size, size // 2)
    return predict_windows(network, everything(network), windows)


def test_windows_along_a_sequence_cover_it_and_overlap() -> None:
    windows = in_order(100, 30, 10)
    assert windows[0] == list(range(30))
    assert windows[-1] == list(range(70, 100))  # no short last one
    assert sorted({frame for window in windows for frame in window}) == list(range(100))
    for one, other in itertools.pairwise(windows):
        assert len({*one} & {*other}) >= 10
    assert in_order(30, 30, 10) == [list(range(30))]
    assert in_order(31, 30, 10) == [list(range(30)), list(range(1, 31))]
    assert in_order(5, 30, 10) == [list(range(5))]


def test_windows_between_keyframes_hold_the_rest_once_spread_over_a_stretch() -> None:
    main = list(range(0, 100, 7))
    windows = between(104, main, 16, 6)
    rest = [frame for window in windows for frame in window if frame not in main]
    assert sorted(rest) == [frame for frame in range(104) if frame not in main]
    for window in windows:
        around = [frame for frame in window if frame in main]
        inside = [frame for frame in window if frame not in main]
        assert around == main[main.index(around[0]) :][:6]
        assert len(inside) <= 10
        assert min(around) < min(inside)
        assert max(around) > max(inside) or max(around) == max(main)
        assert max(inside) - min(inside) > 20  # not a heap
    assert between(100, list(range(100)), 16, 6) == []
    assert between(6, [0, 2, 4], 4, 3) == [[0, 1, 2, 4], [0, 2, 3, 4], [0, 2, 4, 5]]
    for size, overlap, main in ((2, 1, [0, 3, 5]), (3, 1, [0, 3, 5]), (16, 8, [0, 3, 5])):
        assert {*main}.union(*between(9, main, size, overlap)) == {*range(9)}


@pytest.mark.parametrize("tokens", [True, False])
def test_windows_by_looks_hold_neighbours_whatever_the_order(tokens: bool) -> None:
    network = flawless(60, lap=80, tokens=tokens)
    shuffled = torch.randperm(60, generator=generator(3)).tolist()
    vectors = descriptors(network, shuffled)
    windows = by_looks(vectors, 16, 6)
    assert windows[0][0] == 0
    assert sorted({frame for window in windows for frame in window}) == list(range(60))
    taken: set[int] = set(windows[0])
    for window in windows[1:]:
        assert len(taken & {*window}) == 6
        taken |= {*window}
    assert max(len(window) for window in windows) == 16
    for window in windows:
        place = torch.tensor([shuffled[k] for k in window])
        apart = (place[:, None] - place).abs().fill_diagonal_(60).amin(1)
        assert (apart <= 4).float().mean() >= 0.8, place.sort().values
    assert not follows(vectors)
    along = dataclasses.replace(network, lap=200)
    assert follows(descriptors(along, list(range(60))))


def test_windows_of_a_flawless_network_equal_the_whole() -> None:
    network = flawless(24, lap=100)
    whole = network(network.images(list(range(24))))
    result = predict_windows(network, everything(network), in_order(24, 10, 5))
    ratio = whole.depth[0, 0, 0] / result.prediction.depth[0, 0, 0].float()  # each its own unit
    assert_close(result.prediction.depth.float() * ratio, whole.depth, rtol=3e-3, atol=0)
    cameras = result.prediction.cameras
    assert_close(cameras.extrinsics[0], torch.eye(3, 4))
    assert_close(cameras.extrinsics[..., :3], whole.cameras.extrinsics[..., :3], atol=1e-3, rtol=0)
    moved = cameras.extrinsics[..., 3] * ratio
    assert_close(moved, whole.cameras.extrinsics[..., 3], atol=2e-3, rtol=0)
    assert max(joint["residual"] for joint in result.drift["joints"]) < 1e-3


def test_a_shuffled_set_is_put_together_as_a_sequence_is() -> None:
    network = flawless(40, lap=60)
    order = torch.randperm(40, generator=generator(1)).tolist()
    windows = by_looks(descriptors(network, order), 12, 5)
    result = predict_windows(network, network.images(order), windows)
    cameras = result.prediction.cameras
    placed = move(cameras, align_cameras(cameras, network.cameras[order]))
    assert_close(placed.centers, network.cameras[order].centers.float(), atol=0.02, rtol=0)


def test_a_stream_gives_each_chunk_as_it_comes_in_the_world_of_the_first() -> None:
    network = flawless(24, lap=100)
    asked: list[int] = []

    def chunks() -> Iterator[ImageSet]:
        for start in range(0, 24, 6):
            asked.append(start)
            yield network.images(list(range(start, start + 6)))

    parts = []
    for k, part in enumerate(stream(network, chunks(), overlap=4)):
        assert asked == [6 * n for n in range(k + 1)]  # no chunk before it is needed
        assert len(part) == 6
        parts.append(part.cameras.extrinsics)
    found = Cameras(torch.cat(parts), *lens(network))
    assert_close(found.extrinsics[0], torch.eye(3, 4))
    assert trajectory_error(network, found) < 1e-3


def test_windows_that_take_lens_and_depth_for_longer_fit_the_others() -> None:
    network = flawless(30, lap=60)
    asked = 0

    def unsure(images: ImageSet) -> Prediction:
        nonlocal asked
        asked += 1
        seen = network(images)
        longer = 1.5 if asked % 3 == 0 else 1.0
        intrinsics = seen.cameras.intrinsics.clone()
        intrinsics[:, [0, 1], [0, 1]] *= longer
        cameras = dataclasses.replace(seen.cameras, intrinsics=intrinsics)
        return dataclasses.replace(seen, cameras=cameras, depth=longer * seen.depth)

    chunks = (network.images(list(range(start, start + 5))) for start in range(0, 30, 5))
    parts = list(stream(unsure, chunks, overlap=5))
    found = predict_windows(unsure, everything(network), in_order(30, 10, 5))
    even, rest = list(range(0, 30, 2)), between(30, list(range(0, 30, 2)), 12, 8)
    main = [[even[k] for k in part] for part in in_order(15, 8, 4)]
    first = predict_windows(unsure, everything(network), main, rest)
    truth = network(everything(network)).depth
    for depth, extrinsics in (
        (
            torch.cat([part.depth for part in parts]),
            torch.cat([p.cameras.extrinsics for p in parts]),
        ),
        (found.prediction.depth.float(), found.prediction.cameras.extrinsics),
        (first.prediction.depth.float(), first.prediction.cameras.extrinsics),
    ):
        assert trajectory_error(network, Cameras(extrinsics, *lens(network))) < 0.01
        ratio = (depth / truth).log()
        assert (ratio - ratio.median()).abs().quantile(0.9) < 0.02


def lens(network: StandIn) -> tuple[Tensor, Tensor]:
    return network.cameras.intrinsics.float(), network.cameras.image_size


@pytest.mark.parametrize("tokens", [True, False])
def test_a_loop_of_300_frames_closes(tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = StandIn(300, lap=280, turn=0.1, tokens=tokens)
    closed = joined(network, 20)
    found = closed.drift["loops"]
    assert found
    monkeypatch.setattr(loops, "candidates", lambda *_: [])
    opened = joined(network, 20)
    assert not opened.drift["loops"]
    errors = [trajectory_error(network, x.prediction.cameras) for x in (opened, closed)]
    print(f"error {errors[0]:.3f} m without the loop, {errors[1]:.3f} with; {found}")
    assert errors[1] < 0.6 * errors[0]
    ends = [x for x in found if abs(int(x["images"][0]) - int(x["images"][1])) > 250]
    assert ends
    assert all(x["after"]["distance"] < 0.3 * x["before"]["distance"] for x in ends)


def test_keyframes_first_drift_less_than_frames_in_a_row() -> None:
    network = StandIn(300, lap=400)
    keyframes = list(range(0, 300, 6))
    main = [[keyframes[k] for k in part] for part in in_order(len(keyframes), 16, 8)]
    rest = between(300, keyframes, 16, 8)
    result = predict_windows(network, everything(network), main, rest)
    error = trajectory_error(network, result.prediction.cameras)
    in_a_row = trajectory_error(network, joined(network, 16).prediction.cameras)
    print(f"error {error:.3f} m with keyframes first, {in_a_row:.3f} in a row")
    assert error < 0.5 * in_a_row


def test_frames_between_move_no_keyframe() -> None:
    network = StandIn(150, lap=100)
    keyframes = list(range(0, 150, 5))
    main = [[keyframes[k] for k in part] for part in in_order(len(keyframes), 12, 6)]
    rest = between(150, keyframes, 12, 6)
    whole = predict_windows(network, everything(network), main, rest)
    numbers = {frame: k for k, frame in enumerate(keyframes)}
    parts = [[numbers[frame] for frame in part] for part in main]
    alone = predict_windows(network, network.images(keyframes), parts)
    assert alone.drift["loops"]
    assert whole.drift["loops"] == alone.drift["loops"]
    assert_close(
        whole.prediction[keyframes].cameras.extrinsics, alone.prediction.cameras.extrinsics
    )
    assert_close(whole.prediction.depth[keyframes], alone.prediction.depth)
    named = [int(name) for joint in whole.drift["between"] for name in joint["images"]]
    assert sorted(named) == sorted({*range(150)} - {*keyframes})
    assert max(joint["residual"] for joint in whole.drift["between"]) < 0.05


def test_frames_that_only_look_alike_close_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twins(StandIn):
        def _tokens(self, cameras: Cameras, noise: Tensor) -> Tensor:
            """The far wall looks as the near one does."""
            turned = dataclasses.replace(cameras, extrinsics=cameras.extrinsics.clone())
            turned.extrinsics[:, 0] = cameras.extrinsics[:, 0].abs()
            turned.extrinsics[:, 2] = cameras.extrinsics[:, 2].abs()
            turned.extrinsics[..., 3] = 0
            return super()._tokens(turned, noise)

    network = Twins(140, lap=280, turn=0, stretch=0, rough=0, wrong=0)
    asked: list[bool] = []
    sees_both = loops.sees_both

    def listen(prediction: Prediction, valid: Tensor, first: int) -> bool:
        asked.append(sees_both(prediction, valid, first))
        return asked[-1]

    monkeypatch.setattr(loops, "sees_both", listen)
    result = joined(network, 20)
    assert asked  # they do look alike
    assert not any(asked)
    assert not result.drift["loops"]
    assert trajectory_error(network, result.prediction.cameras) < 0.02


def test_a_thousand_frames_on_four_laps() -> None:
    network = StandIn(1000, lap=250)
    result = joined(network, 60)
    error = trajectory_error(network, result.prediction.cameras)
    gaps = [(x["before"]["distance"], x["after"]["distance"]) for x in result.drift["loops"]]
    print(f"error {error:.3f} m on {len(gaps)} loops, widest {max(gaps)}")
    assert len(gaps) >= 5
    assert error < 0.1
    assert max(after for _, after in gaps) < 0.02


def test_windows_of_mini_come_near_the_whole() -> None:
    images = rendered(7, 12, (128, 160))
    network, _ = weights.load("mini", torch.device("cpu"), torch.float32)
    done: list[tuple[int, int]] = []
    windows = in_order(12, 8, 4)
    result = predict_windows(
        partial(predict, network), images, windows, progress=lambda *said: done.append(said)
    )
    assert done == [(1, 2), (2, 2)]
    whole = predict(network, images)
    cameras = result.prediction.cameras
    placed = move(cameras, align_cameras(cameras, whole.cameras))
    apart = (placed.centers - whole.cameras.centers).norm(dim=-1) / whole.depth.median()
    ratio = (result.prediction.depth.float() / whole.depth).log()
    bent = (ratio - ratio.median()).abs().median()
    print(f"centres {apart.mean():.4f} of the depth, {apart.max():.4f} at most; depth {bent:.4f}")
    assert apart.max() < 0.05
    assert bent < 0.1


def rendered(seed: int, frames: int, size: tuple[int, int]) -> ImageSet:
    random = torch.Generator().manual_seed(seed)
    world = synthetic.world(random)
    cameras = synthetic.cameras(random, world, synthetic.Path(frames, size, 0.7))
    shown = synthetic.render(world, cameras)
    identity = torch.eye(3, dtype=torch.float64).repeat(frames, 1, 1)
    names = tuple(str(i) for i in range(frames))
    sizes = torch.tensor([size]).repeat(frames, 1)
    return ImageSet(names, shown.pixels.clamp(0, 1), shown.valid, identity, sizes)


LONG = """
import json, resource, sys, time
import torch
from stand_in import StandIn
from test_windows import joined, trajectory_error
torch.set_num_threads(2)
network = StandIn(int(sys.argv[1]))
start = time.process_time()
result = joined(network, 60)
spent = time.process_time() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
error = trajectory_error(network, result.prediction.cameras)
loops = len(result.drift["loops"])
print(json.dumps({"seconds": spent, "MiB": peak, "error": error, "loops": loops}))
"""


@pytest.mark.slow
def test_ten_thousand_frames_take_under_a_minute_and_the_memory_of_a_window() -> None:
    figures = {}
    for count in (1000, 10_000):
        path = [str(TESTS), str(TESTS.parent / "benchmarks"), *sys.path]
        code = f"import sys; sys.path[:] = {path!r}" + LONG
        done = subprocess.run(
            [sys.executable, "-c", code, str(count)], capture_output=True, text=True, check=True
        )
        figures[count] = json.loads(done.stdout)
    print(figures)
    assert figures[10_000]["seconds"] < 60  # of processors
    assert figures[10_000]["error"] < 0.15  # metres on ten laps of 40
    # Cameras, looks, the graph; and the photos, 25 MiB, which lie in memory here.
    assert figures[10_000]["MiB"] - figures[1000]["MiB"] < 125


def test_what_is_put_on_the_shelf_comes_back() -> None:
    network = StandIn(6, tokens=False)
    prediction = network(network.images([4, 1]))
    prediction.depth[0, 0, 0] = 1e6
    shelf = Shelf.like(prediction, 6)
    shelf.put([4, 1], prediction)
    again = shelf.read([1, 4])
    assert again.depth.dtype == torch.float32
    assert_close(again.depth[0], prediction.depth[1], rtol=1e-3, atol=0)
    assert again.depth[1, 0, 0] == torch.finfo(torch.float16).max  # and not infinite
    assert_close(shelf.all.cameras.extrinsics[1], prediction.cameras.extrinsics[1])


def test_what_lies_on_disk_is_fused_as_it_is() -> None:
    prediction, images = wall()
    windows = in_order(len(images), 9, 1)
    result = predict_windows(lambda _: prediction, images, windows)
    in_memory = fuse(prediction, images, EVERYTHING)
    halved = dataclasses.replace(images, pixels=images.pixels.half())
    cloud = fuse(result.prediction, halved, EVERYTHING)
    assert cloud.xyz.dtype == torch.float32
    assert abs(len(cloud) - len(in_memory)) <= 0.02 * len(in_memory)
    assert_close(cloud.xyz[:, 2], torch.full_like(cloud.xyz[:, 2], 2), rtol=1e-3, atol=0)
    assert set(cloud.rgb.unique().tolist()) == set(in_memory.rgb.unique().tolist())


def test_a_pass_of_one_window_needs_no_graph() -> None:
    network = flawless(5)
    result = predict_windows(network, everything(network), in_order(5, 10, 4))
    assert result.drift == {"windows": 1, "joints": [], "loops": [], "between": []}
