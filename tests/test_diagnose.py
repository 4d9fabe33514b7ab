"""What is said about photo sets that are sound, and about the same sets spoilt in one way."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from posed import arc, noisy, tracks_of
from wall import S, wall

from vggt_cli.formats.images import load
from vggt_cli.reconstruction.diagnose import diagnose, disagreement, layers, soft, strangers, twice
from vggt_cli.reconstruction.improve import Improved
from vggt_cli.reconstruction.lenses import (
    against_headers,
    at_the_edges,
    bent,
    outward_lean,
    scattered,
)
from vggt_cli.reconstruction.looks import blurred, components, copies, edge_ratio, sharpness
from vggt_cli.reconstruction.tracks import FeatureTracks
from vggt_cli.scene import Cameras, Finding, Photo, Prediction, Refinement, Setup, Shaping, Tracks
from vggt_cli.terminal import words

RENDERED = sorted((Path(__file__).parents[1] / "examples" / "rendered").glob("*.jpg"))
NETWORK = Shaping("balanced", 128, 16)


def photo(name: str, focal_35mm: float = 0.0, size: tuple[int, int] = (480, 640)) -> Photo:
    return Photo(Path(name), name, size, focal_35mm=focal_35mm)


def picture(frame: int = 0) -> Image.Image:
    return Image.open(RENDERED[frame]).convert("RGB")


def lenses(focal: list[float]) -> Cameras:
    k = torch.tensor([[[f, 0, 320], [0, f, 240], [0, 0, 1.0]] for f in focal])
    poses = torch.eye(3, 4).expand(len(focal), 3, 4)
    return Cameras(poses, k, torch.tensor([[480, 640]] * len(focal)))


def test_groups_are_what_links_hold_together_largest_first() -> None:
    linked = torch.zeros(6, 6, dtype=torch.bool)
    linked[5, 1] = linked[1, 3] = linked[0, 4] = True
    assert components(linked) == [[1, 3, 5], [0, 4], [2]]
    assert components(torch.ones(6, 6, dtype=torch.bool)) == [[0, 1, 2, 3, 4, 5]]


def test_every_group_but_the_largest_is_named_whole() -> None:
    names = [f"{i}.jpg" for i in range(20)]
    found = strangers(names, [list(range(7, 20)), [0, 1, 2, 3, 4, 5], [6]], "feature")
    assert [f.files for f in found] == [tuple(names[:6]), ("6.jpg",)]
    assert "0.jpg, 1.jpg, 2.jpg and 3 more" in found[0].words
    assert strangers(names, [list(range(20))], "feature") == []
    assert strangers(["one.jpg"], [[0]], "feature") == []
    (alone,) = strangers(["a", "b"], [[0], [1]], "feature")
    assert alone.files == ("a", "b")


def test_photos_of_one_wall_agree_on_it_and_a_second_wall_is_a_layer() -> None:
    prediction, images = wall()
    everyone = torch.ones(S, S, dtype=torch.bool)
    apart = disagreement(prediction, images.valid, everyone)
    assert apart.diagonal().isnan().all()
    assert float(apart.nan_to_num(0).max()) < 1e-5
    assert layers(images.names, apart, None) == []
    prediction.depth[2] *= 1.3
    (finding,) = layers(images.names, disagreement(prediction, images.valid, everyone), None)
    assert finding.files[0] == "c"
    assert finding.command == "vggt refine SCENE"
    prediction.depth[1:3] = torch.tensor([2.5, 1.6])[:, None, None]
    everywhere = layers(images.names, disagreement(prediction, images.valid, everyone), None)
    assert "in layers" in everywhere[0].words


def test_what_is_hidden_in_another_photo_is_no_disagreement() -> None:
    prediction, images = wall()
    prediction.depth[0] = 0.5  # an obstacle right before the first camera
    pair = torch.zeros(S, S, dtype=torch.bool)
    pair[1, 0] = True
    assert bool(disagreement(prediction, images.valid, pair).isnan().all())


@pytest.mark.parametrize("blur", [2.0, 3.0])
def test_a_blurred_photo_is_less_sharp_than_the_others_and_noise_or_jpeg_is_not(
    blur: float, tmp_path: Path
) -> None:
    paths = [tmp_path / path.name for path in RENDERED]
    for path, source in zip(paths, RENDERED, strict=True):
        path.write_bytes(source.read_bytes())
    photos = [Photo(path, path.name, (1, 1)) for path in paths]
    assert soft(photos, sharpness(photos)) == []
    picture(3).save(paths[3], quality=50)
    assert soft(photos, sharpness(photos)) == []
    picture(3).filter(ImageFilter.GaussianBlur(blur)).save(paths[3], quality=90)
    (finding,) = soft(photos, sharpness(photos))
    assert finding.files == (paths[3].name,)


def test_a_black_photo_is_blurred_beside_the_rest() -> None:
    photos = [Photo(Path(name), name, (4, 4)) for name in ("a.png", "b.png")]
    (finding,) = soft(photos, [0.5, 0.0])
    assert finding.files == ("b.png",)
    assert "b.png (0%)" in finding.words
    assert soft(photos, [0.0, 0.0]) == []


def test_a_large_jpeg_is_as_sharp_as_the_same_photo_as_png(tmp_path: Path) -> None:
    large = picture().resize((4000, 3000), Image.Resampling.BICUBIC)
    for name in ("a.jpg", "b.png"):
        large.save(tmp_path / name, quality=95, compress_level=1)
    photos = [Photo(path, path.name, (3000, 4000)) for path in sorted(tmp_path.iterdir())]
    jpeg, png = sharpness(photos)
    assert jpeg == pytest.approx(png, rel=0.1)


@pytest.mark.parametrize("axis", [0, 1])
def test_motion_blur_shows_along_its_direction(axis: int) -> None:
    sharp = np.asarray(picture().convert("L"))
    moved = np.mean([np.roll(sharp, k, axis) for k in range(9)], axis=0).astype(np.uint8)
    assert edge_ratio(moved) < 0.67 * edge_ratio(sharp)


def test_a_smooth_wall_is_not_blurred() -> None:
    random = np.random.default_rng(0)
    plain = (128 + random.normal(0, 2, (480, 640))).round().astype(np.uint8)
    usual = edge_ratio(np.asarray(picture().convert("L")))
    assert blurred([usual, usual, edge_ratio(plain)]) == []
    assert math.isnan(edge_ratio(plain[:8, :8]))
    assert blurred([usual, math.nan, usual]) == []
    assert blurred([usual]) == []


def test_copies_are_found_smaller_brighter_and_encoded_anew_and_neighbours_are_not(
    tmp_path: Path,
) -> None:
    for frame in range(len(RENDERED)):
        picture(frame).save(tmp_path / f"{frame}.png")
    first = picture(0)
    first.save(tmp_path / "poor.jpg", quality=40)
    first.resize((first.width // 2, first.height // 2)).save(tmp_path / "small.png")
    first.point(lambda value: min(255, int(1.1 * value))).save(tmp_path / "bright.png")
    first.crop((first.width // 50, 0, first.width, first.height)).save(tmp_path / "moved.png")
    images = load(tmp_path, sorted(tmp_path.iterdir()), NETWORK).images
    (group,) = copies(images)
    assert {images.names[i] for i in group} == {"0.png", "poor.jpg", "small.png", "bright.png"}
    (finding,) = twice(images.names, [group])
    assert finding.command == "leave out all of these but 0.png"


def test_blank_photos_are_no_copies(tmp_path: Path) -> None:
    for i in range(2):
        Image.new("RGB", (128, 128), "gray").save(tmp_path / f"{i}.png")
    assert copies(load(tmp_path, sorted(tmp_path.iterdir()), NETWORK).images) == []


def test_focal_lengths_that_scatter_are_told_with_the_other_way_to_share_them() -> None:
    photos = [photo(name) for name in "abcde"]
    steady, wild = lenses([500, 505, 500, 495, 510]), lenses([500, 560, 440, 500, 590])
    assert scattered(photos, steady, [0] * 5) == []
    (shared,) = scattered(photos, wild, [0] * 5)
    assert shared.files == ("b", "c", "e")
    assert shared.command.endswith("--camera per-image")
    (apart,) = scattered(photos, wild, [0, 1, 2, 3, 4])
    assert apart.command.endswith("--camera shared")
    assert scattered(photos[:2], lenses([500, 900]), [0, 0]) == []


def test_a_focal_length_unlike_the_header_is_told_with_the_headers() -> None:
    header = photo("x", 35).focal_pixels
    photos = [photo("a", 35), photo("b", 35)]
    assert against_headers(photos, lenses([1.1 * header, 0.9 * header])) == []
    assert against_headers([photo("a"), photo("b")], lenses([100, 5000])) == []
    (finding,) = against_headers(photos, lenses([1.05 * header, 1.3 * header]))
    assert finding.files == ("b",)
    assert f"--intrinsics {header:.0f},{header:.0f},320,240" in finding.command
    (mixed,) = against_headers([photo("a", 28), photo("b", 35)], lenses([header, header]))
    assert mixed.command.endswith("--refine ba")


def setup(radial: float = 0.0, frames: int = 6) -> Setup:
    cameras = arc(frames, focal=1150.0)
    k = torch.full((frames,), radial, dtype=torch.float64)
    return Setup(cameras, k, tuple(range(frames)))


def spoilt(radial: float) -> Tracks:
    return noisy(tracks_of(setup().cameras, 4000, radial=radial), 0.2, wrong=0.02)


def lean(tracks: Tracks, setup: Setup) -> float:
    return outward_lean(at_the_edges(tracks, setup)[1])


def test_features_that_lean_inwards_tell_of_a_lens_that_nobody_measured() -> None:
    photos = [photo(str(i)) for i in range(6)]
    assert lean(spoilt(0.0), setup()) == 0
    assert bent(photos, spoilt(0.0), setup()) == []
    exact = setup().cameras
    single = Cameras(exact.extrinsics.float(), exact.intrinsics.float(), exact.image_size)
    assert lean(spoilt(-0.2), dataclasses.replace(setup(), cameras=single)) < 0
    assert lean(spoilt(-0.2), setup()) < 0
    assert lean(spoilt(0.2), setup()) > 0
    (finding,) = bent(photos, spoilt(-0.2), setup())
    assert finding.command.endswith("--camera shared")
    (whole,) = bent(photos, spoilt(-0.2), dataclasses.replace(setup(), group=(0,) * 6))
    assert "calibrate" in whole.command


def test_a_radial_term_that_moves_corners_is_told_and_a_tiny_one_is_not() -> None:
    photos = [photo(str(i)) for i in range(6)]
    (finding,) = bent(photos, spoilt(-0.2), setup(-0.2))
    assert "taken out" in finding.words
    assert bent(photos, spoilt(0.0), setup(0.001)) == []


def found(frames: int, pairs: list[tuple[int, int]]) -> FeatureTracks:
    empty = torch.zeros(0, dtype=torch.long)
    tracks = Tracks(torch.zeros(0, 3), empty, empty.int(), torch.zeros(0, 2))
    rows = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return FeatureTracks(tracks, (), rows, torch.full((len(rows),), 50))


def flat(frames: int, size: tuple[int, int]) -> Prediction:
    """All cameras at one place before one wall: nothing contradicts anything."""
    depth = torch.full((frames, *size), 2.0)
    k = torch.tensor([[120.0, 0, size[1] / 2], [0, 120, size[0] / 2], [0, 0, 1]])
    poses = torch.eye(3, 4).repeat(frames, 1, 1)
    cameras = Cameras(poses, k.repeat(frames, 1, 1), torch.tensor([size] * frames))
    return Prediction(cameras, depth, torch.ones_like(depth))


def kinds(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.kind for finding in findings]


def test_a_sound_set_has_no_findings_and_each_fault_is_found_with_the_rest(tmp_path: Path) -> None:
    loaded = load(RENDERED[0].parent, RENDERED, NETWORK)
    n = len(RENDERED)
    prediction = flat(n, loaded.images.size)
    group, before = [0] * n, Improved(loaded.images, prediction, None)
    assert diagnose(loaded.photos, before, prediction.cameras, group) == ()
    chain = [(i, i + 1) for i in range(n - 1)]
    assert (
        diagnose(
            loaded.photos,
            dataclasses.replace(before, found=found(n, chain)),
            prediction.cameras,
            group,
        )
        == ()
    )
    wide = prediction.cameras.intrinsics.clone()
    wide[::2, :2, :2] *= 1.4
    raw = dataclasses.replace(prediction.cameras, intrinsics=wide)
    prediction.depth[0] *= 1.5
    findings = diagnose(
        loaded.photos, dataclasses.replace(before, found=found(n, chain[:-1])), raw, group
    )
    assert kinds(findings) == ["group", "layers", "focal"]
    assert findings[0].files == (loaded.images.names[-1],)


def test_distortion_is_asked_for_only_where_cameras_were_refined() -> None:
    loaded = load(RENDERED[0].parent, RENDERED, NETWORK)
    n = len(RENDERED)
    prediction, group = flat(n, loaded.images.size), [0] * n
    tracks = found(n, [(i, i + 1) for i in range(n - 1)])
    radial = torch.full((n,), -0.2, dtype=torch.float64)
    for method, expected in (("none", []), ("ba", ["distortion"])):
        lens = Setup(prediction.cameras, radial, tuple(group))
        refinement = Refinement(method, prediction.cameras, lens, {}, ())
        improved = Improved(loaded.images, prediction, None, refinement)
        findings = diagnose(loaded.photos, dataclasses.replace(improved, found=tracks), None, group)
        assert kinds(findings) == expected


def test_findings_are_said_with_the_users_own_folders() -> None:
    command = "vggt reconstruct PHOTOS --out SCENE --camera shared"
    lines = words([Finding("focal", "they scatter", ("a", "b"), command)], "my photos", "out")
    assert lines == [
        "focal: they scatter",
        "  -> vggt reconstruct 'my photos' --out out --camera shared",
    ]
    assert words([], "photos", "out") == []


def test_findings_are_plain_enough_for_the_report() -> None:
    plain: dict[str, object] = dataclasses.asdict(Finding("blur", "soft", ("a",), "retake"))
    assert plain == {"kind": "blur", "words": "soft", "files": ("a",), "command": "retake"}
