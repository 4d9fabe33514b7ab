"""Which photos are compared, and how single matches become tracks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vggt_cli import device as devices
from vggt_cli.geometry import invert
from vggt_cli.reconstruction import matches
from vggt_cli.reconstruction.matches import count_matches, match, union
from vggt_cli.reconstruction.pairs import (
    EXHAUSTIVE,
    alike,
    choose,
    covisible,
    guess,
    guess_from_tracks,
)
from vggt_cli.scene import Cameras, ImageSet, Prediction, Tracks

S = EXHAUSTIVE + 10


def before_a_wall(x: float, turn: bool = False) -> Tensor:
    """Extrinsics of a camera at `x`, two units before a wall, or with its back to it."""
    rotation = torch.diag(torch.tensor([-1.0, 1.0, -1.0])) if turn else torch.eye(3)
    return invert(torch.cat([rotation, torch.tensor([[x], [0.0], [0.0]])], 1)[None])[0]


def wall() -> Prediction:
    """Three cameras whose images are two units wide on the wall, the last looks away."""
    extrinsics = torch.stack([before_a_wall(0), before_a_wall(0.5), before_a_wall(0, turn=True)])
    k = torch.tensor([[40.0, 0, 20], [0, 40, 16], [0, 0, 1]]).expand(3, 3, 3)
    cameras = Cameras(extrinsics, k, torch.tensor([[32, 40]] * 3))
    return Prediction(cameras, torch.full((3, 32, 40), 2.0), torch.ones(3, 32, 40))


def test_few_photos_are_all_compared() -> None:
    assert choose(torch.zeros(3, 3), torch.zeros(3, 3)) == [(0, 1), (0, 2), (1, 2)]
    assert len(choose(torch.zeros(EXHAUSTIVE, EXHAUSTIVE), torch.zeros(S, S))) == 190
    assert choose(torch.zeros(1, 1), torch.zeros(1, 1)) == []


def test_of_many_photos_those_that_see_the_same_are_compared_in_order_and_once() -> None:
    ring = (torch.arange(S)[:, None] - torch.arange(S)).abs()
    near = (10 - torch.minimum(ring, S - ring)).clamp(min=0) / 10
    pairs = choose(near, torch.zeros(S, S))
    assert pairs == sorted(set(pairs))
    assert all(i < j for i, j in pairs)
    assert {(i, i + 5) for i in range(S - 5)} <= set(pairs)
    assert (0, S - 1) in pairs  # the ring is closed
    assert all(near[i, j] > 0 for i, j in pairs)
    assert len(pairs) < S * (S - 1) / 3


def test_a_blind_prediction_does_not_keep_photos_apart() -> None:
    looks = torch.zeros(S, S)
    looks[3, 25] = looks[25, 3] = 40
    looks[4, 26] = looks[26, 4] = 2  # strangers
    pairs = choose(torch.zeros(S, S), looks)
    assert (3, 25) in pairs
    assert (4, 26) not in pairs
    assert all((i, i + step) in pairs for step in (1, 2) for i in range(S - step))


def test_frames_see_the_share_of_the_wall_that_both_have() -> None:
    prediction = wall()
    share = covisible(prediction, torch.ones(3, 32, 40, dtype=torch.bool))
    assert share.diagonal().tolist() == [1, 1, 1]
    assert share[0, 1].item() == pytest.approx(0.75, abs=0.03)
    assert share[1, 0].item() == pytest.approx(0.75, abs=0.03)
    assert share[0, 2] == share[2, 0] == 0
    left = torch.ones(3, 32, 40, dtype=torch.bool)
    left[:, :, 10:] = False  # of the first, the quarter that the second does not see
    assert covisible(prediction, left)[0, 1] == 0
    assert covisible(prediction, torch.zeros_like(left)).count_nonzero() == 0
    prediction.depth[1] = 3.0  # a surface of its own
    assert covisible(prediction, torch.ones(3, 32, 40, dtype=torch.bool))[0, 1] == 0


def test_a_guess_has_cameras_in_source_pixels() -> None:
    maps = torch.diag(torch.tensor([10.0, 10, 1], dtype=torch.float64)).expand(3, 3, 3)
    valid = torch.ones(3, 32, 40, dtype=torch.bool)
    pixels, size = torch.zeros(3, 3, 32, 40), torch.tensor([[320, 400]] * 3)
    made = guess(wall(), ImageSet(("a", "b", "c"), pixels, valid, maps, size))
    assert made.cameras.intrinsics[0].tolist() == [[400, 0, 200], [0, 400, 160], [0, 0, 1]]
    assert made.cameras.image_size.tolist() == size.tolist()


def test_frames_of_a_model_share_what_both_observe() -> None:
    point, frame = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 0, 1, 0])
    tracks = Tracks(torch.zeros(3, 3), point, frame.int(), torch.zeros(5, 2))
    made = guess_from_tracks(wall().cameras, tracks)
    assert made.covisible[0].tolist() == pytest.approx([1, 2 / 3, 0])
    assert made.covisible[1].tolist() == pytest.approx([1, 1, 0])
    assert made.covisible[2].tolist() == [0, 0, 0]


def test_photos_are_alike_by_the_number_of_their_common_features() -> None:
    random = torch.Generator().manual_seed(0)
    vectors = [torch.rand(40, 16, generator=random) for _ in range(3)]
    vectors[2] = torch.cat([vectors[0][:30].flip(0), vectors[2][:5]])
    looks = alike(vectors)
    assert looks[0, 2] == looks[2, 0] >= 30
    assert looks[0, 1] < 10
    assert alike([vectors[0], vectors[0][:0]]).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_matches_of_several_are_counted_as_one_by_one(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    first = (torch.rand(50, 32, generator=random) ** 2 * 250).to(dtype)
    others = [
        (first[torch.randperm(50, generator=random)[:n]] + torch.rand(n, 32, generator=random) * r)
        for n, r in ((0, 0), (1, 0), (2, 9), (30, 5), (50, 99), (49, 220))
    ]
    others = [x.clamp(0, 255).to(dtype) for x in others]
    others[-1][3] = others[-1][4]
    counts = count_matches(first, others)
    assert counts.tolist() == [len(match(first, x)[0]) for x in others]
    assert sum(counts) > 40
    assert count_matches(first[:0], others).tolist() == [0] * 6
    assert count_matches(first, []).tolist() == []


def test_matches_do_not_depend_on_how_many_rows_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    first = torch.rand(50, 16, generator=random)
    second = first[torch.randperm(50, generator=random)] + 0.01
    whole = match(first, second)
    assert len(whole[0]) > 40
    monkeypatch.setattr(matches, "ROWS", 7)
    for a, b in zip(match(first, second), whole, strict=True):
        assert a.tolist() == b.tolist()


def test_matches_of_whole_numbers_are_those_of_the_plain_definition_by_either_instruction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = torch.Generator().manual_seed(0)
    spread = (torch.rand(301, 128, generator=random) ** 4 * 255).round()
    noise = torch.randn(203, 128, generator=random) * torch.linspace(0, 60, 203)[:, None]
    first = spread.byte()
    second = (spread[:203] + noise).clamp(0, 255).byte()[torch.randperm(203, generator=random)]
    second[:4] = second[4]  # equal likeness
    first[9] = first[7]
    a, b = (F.normalize(x.double(), dim=1) for x in (first, second))
    likeness = a @ b.mT
    distance = (2 - 2 * likeness.topk(2, dim=1).values).clamp(min=0).sqrt()
    nearest, back = likeness.argmax(1), likeness.argmax(0)
    wanted = [
        (i, int(j))
        for i, j in enumerate(nearest)
        if back[j] == i and distance[i, 0] < 0.8 * distance[i, 1]
    ]
    assert 50 < len(wanted) < 200
    for there in (True, False):
        if there and not devices.multiplies_int8():
            continue
        monkeypatch.setattr(matches, "multiplies_int8", lambda there=there: there)
        rows, partners = match(first, second)
        assert list(zip(rows.tolist(), partners.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("width", [2, 63, 64, 65, 128, 200])
def test_the_two_largest_are_found_whatever_the_width(width: int) -> None:
    random = torch.Generator().manual_seed(width)
    first, second = (torch.randn(n, 8, generator=random) for n in (70, width))
    table = F.normalize(first, dim=1) @ F.normalize(second, dim=1).mT
    everything = match(first, second, ratio=1.0)
    mutual = [(i, int(j)) for i, j in enumerate(table.argmax(1)) if table.argmax(0)[j] == i]
    assert list(zip(*(x.tolist() for x in everything), strict=True)) == mutual
    distance = (2 - 2 * table.topk(2, dim=1).values).clamp(min=0).sqrt()
    clear = [pair for pair in mutual if distance[pair[0], 0] < 0.8 * distance[pair[0], 1]]
    assert list(zip(*(x.tolist() for x in match(first, second)), strict=True)) == clear


def joined(frame: list[int], edges: list[tuple[int, int]], weight: list[int]) -> list[int]:
    ends = torch.tensor(edges, dtype=torch.long).reshape(-1, 2)
    return union(torch.tensor(frame), ends, torch.tensor(weight)).tolist()


def test_a_track_is_all_that_is_connected_and_numbered_by_its_first_place() -> None:
    assert joined([0, 0, 1, 1, 2], [(3, 4), (0, 3), (1, 2)], [1, 1, 1]) == [0, 1, 1, 0, 0]
    assert joined([0, 1], [], []) == [0, 1]
    assert joined([], [], []) == []


def test_a_track_that_would_have_two_places_in_a_frame_is_split_at_its_weakest_match() -> None:
    # 0-2 and 1-3 are strong, 2-3 would bring places 0 and 1, both of frame 0, together.
    frame, edges = [0, 0, 1, 2], [(2, 3), (0, 2), (1, 3)]
    assert joined(frame, edges, [5, 9, 8]) == [0, 1, 0, 1]
    assert joined(frame, edges, [9, 8, 5]) == [0, 1, 0, 0]


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_no_track_has_two_places_in_a_frame_and_the_order_of_matches_is_nothing(
    data: st.DataObject,
) -> None:
    n = data.draw(st.integers(1, 12))
    frame = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    place = st.integers(0, n - 1)
    edges = data.draw(st.lists(st.tuples(place, place), max_size=20, unique=True))
    weight = data.draw(st.permutations(range(len(edges))))
    track = joined(frame, edges, weight)
    places = list(zip(track, frame, strict=True))
    assert len(set(places)) == len(places)
    assert all(t <= k and track[t] == t for k, t in enumerate(track))
    turned = joined(frame, edges[::-1], weight[::-1])
    assert turned == track
