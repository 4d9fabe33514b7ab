"""Rewritten photos: straight lines, agreement with the network's pixels, every kind of file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import load, picture
from torch import Tensor

from vggt_cli.formats import copies
from vggt_cli.geometry import pixel_centers, reframe, straight_intrinsics, undistort
from vggt_cli.reconstruction.straighten import straightened
from vggt_cli.scene import Cameras, Prediction, Setup, Shaping, Tracks

LENSES = [-0.1, 0.05]
SIZE = (240, 320)


def lens(size: tuple[int, int] = SIZE) -> Tensor:
    H, W = size
    focal = 0.875 * W
    return torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]], dtype=torch.float64)


def straight(
    folder: Path, name: str, radial: float = -0.1, size: tuple[int, int] = (40, 60)
) -> Path:
    """The undistorted copy of a photo in `folder`, which has no other."""
    photo = next(photo for photo in load(folder).photos if photo.name == name)
    assert photo.size == size
    K, k = lens(size), torch.tensor(radial).double()
    after = straight_intrinsics(K[None], k[None], torch.tensor([size]))[0]
    target = folder.parent / f"straight_{name}"
    copies.straight_copy(photo, target, (K, k, after))
    return target


def checkerboard(radial: float, straight: Tensor | None = None) -> Image.Image:
    """A photo of a board through a lens, turned a little; a pixel is the mean of 4 x 4 samples.

    straight: intrinsics of a pinhole camera that takes the photo instead.
    """
    xy = pixel_centers((SIZE[0] * 4, SIZE[1] * 4), lens()) / 4
    if straight is None:
        xy = undistort(xy, lens(), torch.tensor(radial).double())
    else:
        xy = reframe(xy, straight, lens())
    turned = (xy - lens()[:2, 2]) @ torch.tensor([[1, 0.1], [-0.1, 1]]).double()
    squares = (turned / 40).floor().sum(-1)
    mean = (squares % 2).reshape(SIZE[0], 4, SIZE[1], 4).mean((1, 3))
    return Image.fromarray((mean * 255).round().to(torch.uint8).numpy())


def bend(image: Image.Image) -> float:
    """Largest distance in pixels, over the board's lines, of edge crossings from a straight line.

    Each crossing of half grey in the middle row is followed upwards and down.
    """
    values = np.asarray(image).astype(float) - 127.5

    def crossings(row: int) -> np.ndarray[Any, Any]:
        at = np.flatnonzero(values[row, :-1] * values[row, 1:] < 0)
        at = at[(at > 3) & (at < SIZE[1] - 4)]
        beside = np.abs(values[row, at - 3]), np.abs(values[row, at + 4])
        at = at[np.minimum(*beside) > 120]  # not where the corners of squares meet
        a, b = values[row, at], values[row, at + 1]
        return np.asarray(at + a / (a - b))

    worst = []
    for start in crossings(SIZE[0] // 2):
        found = []
        for rows in (range(SIZE[0] // 2, SIZE[0]), range(SIZE[0] // 2, -1, -1)):
            x = start
            for row in rows:
                near = [at for at in crossings(row) if abs(at - x) < 2]
                if len(near) == 1:
                    x = near[0]
                    found.append((row, x))
        if len(found) > 0.7 * SIZE[0]:
            row, x = np.array(found).T
            worst.append(np.abs(x - np.polyval(np.polyfit(row, x, 1), row)).max())
    assert len(worst) >= 5
    return float(max(worst))


@pytest.mark.parametrize("radial", LENSES)
def test_straight_lines_are_straight_in_the_written_file(tmp_path: Path, radial: float) -> None:
    (tmp_path / "in").mkdir()
    photo, ruler = checkerboard(radial), checkerboard(0.0)
    photo.save(tmp_path / "in/a.png")
    with Image.open(straight(tmp_path / "in", "a.png", radial, SIZE)) as image:
        after = bend(image)
    assert bend(photo) > 0.7
    assert after < bend(ruler) + 0.1 < 0.25  # pixels: what the ruler itself reads, and resampling


@pytest.mark.parametrize("radial", LENSES)
def test_the_written_file_is_the_photo_that_the_new_camera_takes(
    tmp_path: Path, radial: float
) -> None:
    (tmp_path / "in").mkdir()
    checkerboard(radial).save(tmp_path / "in/a.png")
    after = straight_intrinsics(
        lens()[None], torch.tensor([radial]).double(), torch.tensor([SIZE])
    )[0]
    ideal = np.asarray(checkerboard(0.0, after)).astype(float)
    with Image.open(straight(tmp_path / "in", "a.png", radial, SIZE)) as image:
        off = ideal - np.asarray(image)
    assert np.abs(off).mean() < 6  # grey levels, of edges twice filtered
    for slope in np.gradient(ideal):
        shift = (off * slope).sum() / (slope * slope).sum()  # pixels, by least squares
        assert abs(shift) < 0.02


@pytest.mark.parametrize("radial", LENSES)
def test_the_written_file_and_the_straightened_network_image_agree(
    tmp_path: Path, examples: Path, radial: float
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with Image.open(examples / "motorcycle/left.png") as image:
        image.save(folder / "a.png")
    picture(500, 741).save(folder / "b.png")  # portrait: both are padded
    images = load(folder, Shaping("balanced", 224, 16)).images
    S, (H, W) = 2, images.size
    size = images.source_size
    intrinsics = torch.stack([lens((h, w)) for h, w in size.tolist()])
    cameras = Cameras(torch.eye(3, 4).repeat(S, 1, 1), intrinsics, size)
    setup = Setup(cameras, torch.full((S,), radial).double(), (0, 1))
    nothing = torch.zeros(0, dtype=torch.int32)
    tracks = Tracks(torch.zeros(0, 3), nothing.long(), nothing, torch.zeros(0, 2))
    prediction = Prediction(cameras, torch.ones(S, H, W), torch.ones(S, H, W))
    found, _, _, after = straightened(images, prediction, tracks, setup)
    out = tmp_path / "out"
    out.mkdir()
    for i, photo in enumerate(load(folder).photos):
        copies.straight_copy(
            photo, out / photo.name, (intrinsics[i], setup.radial[i], after.intrinsics[i])
        )
    written = load(out, Shaping("balanced", 224, 16)).images
    assert torch.equal(written.source_from_network, found.source_from_network)
    assert torch.equal(written.valid, found.valid)
    difference = (written.pixels - found.pixels).abs()[0, :, found.valid[0]].mean()
    lost = (written.pixels - images.pixels).abs()[0, :, found.valid[0]].mean()
    assert difference < 0.02  # of 1, in a photo full of detail
    assert lost > 2 * difference
    assert (written.pixels - found.pixels).abs()[1].max() < 0.03  # without detail


# Kinds of files.

DEEP = np.asarray(picture().convert("L").resize((60, 40))).astype(np.uint16) * 257
KINDS: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "jpeg": (picture(), "jpg", {"quality": 95}),
    "cmyk": (picture().convert("CMYK"), "jpg", {"quality": 95}),
    "grey jpeg": (picture().convert("L"), "jpg", {"quality": 95}),
    "png": (picture(), "png", {}),
    "grey": (picture().convert("L"), "png", {}),
    "grey with alpha": (picture().convert("LA"), "png", {}),
    "alpha": (picture().convert("RGBA"), "png", {}),
    "one colour is none": (picture(), "png", {"transparency": (1, 2, 3)}),
    "palette": (picture().quantize(256), "png", {}),
    "palette with a hole": (picture().quantize(255), "png", {"transparency": 255}),
    "16 bits": (Image.fromarray(DEEP), "png", {}),
    "tiff": (picture(), "tiff", {"compression": "tiff_lzw"}),
    "16 bits tiff": (Image.fromarray(DEEP), "tiff", {}),
    "big-endian tiff": (Image.fromarray(DEEP.astype(">u2")), "tiff", {}),
    "floats": (Image.fromarray(DEEP.astype(np.float32) / 65535), "tiff", {}),
    "palette tiff": (picture().quantize(256), "tiff", {}),
    "webp": (picture(), "webp", {"quality": 95}),
    "webp with alpha": (picture().convert("RGBA"), "webp", {"quality": 95}),
    "bmp": (picture(), "bmp", {}),
    "palette bmp": (picture().quantize(256), "bmp", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_stays_what_it_is_and_shows_the_same(tmp_path: Path, kind: str) -> None:
    image, ending, options = KINDS[kind]
    (tmp_path / "in").mkdir()
    image.save(tmp_path / f"in/a.{ending}", **options)
    picture().convert("L" if image.mode[0] in "LIF" else "RGB").save(tmp_path / "in/b.png")
    out = tmp_path / "out"
    out.mkdir()
    for name in (f"a.{ending}", "b.png"):
        straight(tmp_path / "in", name, radial=-0.4).rename(out / name)
    with Image.open(tmp_path / f"in/a.{ending}") as before, Image.open(out / f"a.{ending}") as now:
        assert now.format == before.format
        assert now.size == before.size
        if before.mode[0] in "IF":
            assert now.mode == before.mode
            assert len(np.unique(np.asarray(now))) > 300
    found, expected = load(out).images.pixels
    error = (found - expected).abs().mean()
    exact = "palette" not in kind and ending not in ("jpg", "webp")
    assert error < (0.005 if exact else 0.03)
    change = (found - load(tmp_path / "in").images.pixels[0]).abs().mean()
    assert change > (0.01 if exact else error)


def test_one_bit_becomes_grey(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture().convert("1").save(tmp_path / "in/a.png")
    with Image.open(straight(tmp_path / "in", "a.png")) as image:
        assert image.mode == "L"
        assert len(np.unique(np.asarray(image))) > 20


def test_hidden_colours_do_not_bleed_over_the_border_of_what_is_transparent(tmp_path: Path) -> None:
    rgba = np.zeros((40, 60, 4), np.uint8)
    rgba[:, :, 2] = 255  # blue, but under alpha 0
    rgba[:, 20:43] = [200, 100, 0, 255]
    (tmp_path / "in").mkdir()
    Image.fromarray(rgba).save(tmp_path / "in/a.png")
    with Image.open(straight(tmp_path / "in", "a.png")) as image:
        values = np.asarray(image).astype(int)
    assert 0.3 < (values[..., 3] > 0).mean() < 0.5
    assert ((values[..., 3] > 0) & (values[..., 3] < 255)).any()
    assert np.abs(values - [200, 100, 0, 0])[values[..., 3] > 20][:, :3].max() <= 1


@pytest.mark.parametrize("radial", LENSES)
def test_no_pixel_of_the_new_file_is_blank(tmp_path: Path, radial: float) -> None:
    (tmp_path / "in").mkdir()
    white = np.full((400, 300), 255, np.uint8)
    Image.fromarray(white).save(tmp_path / "in/a.png")
    with Image.open(straight(tmp_path / "in", "a.png", radial, (400, 300))) as image:
        assert (np.asarray(image) == 255).all()


def test_a_photo_on_its_side_keeps_its_exif_and_profile_and_is_straightened_upright(
    tmp_path: Path,
) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "Camera"
    exif.get_ifd(0x8769)[0x920A] = 4.5  # focal length
    (tmp_path / "in").mkdir()
    upright = picture(40, 60)
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "in/a.jpg", exif=exif, icc_profile=b"profile", quality=95)
    upright.save(tmp_path / "in/b.png")
    copy, same = (straight(tmp_path / "in", name, size=(60, 40)) for name in ("a.jpg", "b.png"))
    with Image.open(copy) as image, Image.open(same) as expected:
        assert image.size == (40, 60)
        assert image.info["icc_profile"] == b"profile"
        assert image.getexif()[0x0110] == "Camera"
        assert 0x0112 not in image.getexif()
        assert float(image.getexif().get_ifd(0x8769)[0x920A]) == pytest.approx(4.5)
        difference = np.asarray(image).astype(int) - np.asarray(expected)
        assert np.abs(difference).mean() < 3


def test_a_photo_of_several_strips_is_one_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    picture(300, 200).save(tmp_path / "in/a.png")
    with Image.open(straight(tmp_path / "in", "a.png", 0.05, (200, 300))) as image:
        whole = np.asarray(image)
    monkeypatch.setattr(copies, "ROWS", 7)
    with Image.open(straight(tmp_path / "in", "a.png", 0.05, (200, 300))) as image:
        assert np.abs(whole.astype(int) - np.asarray(image)).max() <= 1
