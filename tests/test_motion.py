"""How far a view moves: as far as it was moved, however little at a time, and only where to."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from vggt_cli.formats.motion import HOP, STEP, Array, Since, View, keyframes

H, W = 120, 160
DIAGONAL = math.hypot(H, W)


def wall(seed: int = 0, grain: float = 8) -> Array:
    """A texture much larger than what is seen of it."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 255, (60, 200), dtype=np.uint8)
    blurred = Image.fromarray(noise).resize((800, 240), Image.Resampling.BICUBIC)
    return np.asarray(blurred, np.float32) + random.normal(0, grain, (240, 800)).astype(np.float32)


WALL, SMOOTH = wall(), wall(grain=0)


def seen(x: float, y: float = 40, of: Array = WALL) -> View:
    """The wall from `x`, `y` on, whole pixels."""
    return View.of(of[round(y) : round(y) + H, round(x) : round(x) + W])


def passing(x: int) -> View:
    """An orbit's view: the upper half passes to one side, a bit of the lower one to the other."""
    upper, still = WALL[:50, 300 + x : 300 + x + W], WALL[100:150, 300 : 300 + W]
    return View.of(np.concatenate([upper, still, WALL[200:220, 300 - x : 300 - x + W]]))


def test_a_view_moved_by_some_pixels_has_moved_by_as_many() -> None:
    since = Since(seen(100))
    for x, y in ((100, 40), (103, 40), (110, 40), (110, 36), (100, 40)):
        distance = math.hypot(x - 100, y - 40)
        assert abs(since.moved(seen(x, y)) * DIAGONAL - distance) <= 1, (x, y)


def test_small_steps_add_up_beyond_what_can_be_seen_at_once() -> None:
    since = Since(seen(100))
    far = [since.moved(seen(x)) for x in range(100, 301)]  # more than the picture is wide
    assert abs(far[-1] * DIAGONAL - 200) < 10
    assert max(np.abs(np.array(far) * DIAGONAL - np.arange(201))) < 10


@pytest.mark.parametrize("of", [WALL, SMOOTH])
def test_keyframes_lie_a_step_apart_however_fast_the_view_moves(of: Array) -> None:
    for pixels in (1, 2, 5):
        places = list(range(0, 400, pixels))
        found = [places[k] for k in keyframes(seen(x, of=of) for x in places)]
        steps = np.diff(found) / DIAGONAL
        assert found[0] == 0
        assert steps.min() > 0.9 * STEP
        assert steps.max() < STEP + (pixels + 1) / DIAGONAL


def test_a_hand_that_trembles_goes_nowhere() -> None:
    random = np.random.default_rng(1)
    far = HOP * DIAGONAL  # from one frame to the next, so that shifts are added up
    places = 100 + far * random.uniform(-1, 1, (200, 2))
    assert keyframes(seen(x, y - 60) for x, y in places) == [0]


def test_an_orbit_moves_though_the_middle_of_its_view_does_not() -> None:
    found = keyframes(passing(x) for x in range(0, 100))
    assert 8 <= len(found) <= 14  # 100 pixels are ten steps


@pytest.mark.parametrize("grain", [8, 0])
def test_a_cut_is_a_keyframe_and_what_follows_is_measured_from_there(grain: float) -> None:
    first, second = wall(0, grain), wall(1, grain)
    views = [seen(100, of=first)] * 5 + [seen(100 + x, of=second) for x in range(12)]
    assert keyframes(views) == [0, 5, 15]
    assert Since(views[0]).moved(views[5]) == math.inf


def test_what_shows_nothing_neither_moves_nor_holds_others_back() -> None:
    ceiling = np.tile(np.linspace(200, 201, W, dtype=np.float32), (70, 1))
    below = [np.concatenate([ceiling, WALL[100:150, x : x + W]]) for x in range(0, 60)]
    found = keyframes(View.of(picture) for picture in below)
    assert len(found) == 6  # 59 pixels
    black = View.of(np.zeros((H, W), np.float32))
    assert keyframes([black] * 5 + [seen(0)] * 5) == [0, 5]


def test_what_is_not_found_moves_with_the_rest() -> None:
    x = np.arange(100, 100 + W)
    near = WALL[40 : 40 + H, x].copy()
    far = WALL[40 : 40 + H, x + 9].copy()
    random = np.random.default_rng(2)
    for picture in (near, far):  # somebody walks there
        picture[:, 100:] = random.uniform(0, 255, (H, W - 100))
    assert abs(Since(View.of(near)).moved(View.of(far)) * DIAGONAL - 9) <= 1


def test_blur_is_no_motion() -> None:
    sharp = Image.fromarray(WALL[40 : 40 + H, 100 : 100 + W].clip(0, 255).astype(np.uint8))
    soft = sharp.filter(ImageFilter.GaussianBlur(2))
    moved = Since(View.of(np.asarray(sharp))).moved(View.of(np.asarray(soft)))
    assert moved * DIAGONAL <= 1
