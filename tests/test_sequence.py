"""Which frames of a set the network sees together."""

import pytest
import torch
from test_motion import WALL, H, W

from vggt_cli.reconstruction.sequence import _parts
from vggt_cli.reconstruction.windows import in_order
from vggt_cli.scene import ImageSet


def passing(places: list[int]) -> ImageSet:
    """Photos of a wall, from `places` on."""
    shown = [torch.from_numpy(WALL[40 : 40 + H, x : x + W]) / 255 for x in places]
    S, size = len(places), torch.tensor([[H, W]])
    return ImageSet(
        tuple(map(str, places)),
        torch.stack(shown).clamp(0, 1)[:, None].expand(S, 3, H, W),
        torch.ones(S, H, W, dtype=torch.bool),
        torch.eye(3, dtype=torch.float64).expand(S, 3, 3),
        size.expand(S, 2),
    )


def test_of_frames_that_are_all_but_the_same_keyframes_come_first() -> None:
    main, between = _parts(passing(list(range(0, 200))), 8)
    keyframes = sorted({frame for window in main for frame in window})
    assert 14 <= len(keyframes) <= 24  # ten pixels are a step
    assert {*keyframes}.union(*between) == {*range(200)}
    assert all(len({*window} & {*keyframes}) == 4 for window in between)


@pytest.mark.parametrize("step", [4, 15])
def test_where_neighbours_are_apart_all_frames_come_in_a_row(step: int) -> None:
    places = list(range(0, 600, step))
    main, between = _parts(passing(places), 8)
    assert main == in_order(len(places), 8, 4)
    assert between == []


def test_a_camera_that_rests_has_windows_in_order() -> None:
    main, between = _parts(passing([100] * 30), 8)
    assert main == in_order(30, 8, 4)
    assert between == []
