"""Photos in: golden preprocessing, upright decoding, the way back, and what is refused."""

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from vggt_cli.errors import InputError
from vggt_cli.formats import copies, decode, files, images, lenses
from vggt_cli.scene import Photo, Shaping

BALANCED = Shaping("balanced", 64, 16)
LONGER = Shaping("longer-side", 70, 14)


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth coloured picture without symmetry."""
    noise = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def load(folder: Path, shaping: Shaping = BALANCED) -> images.Loaded:
    root, paths = files.find(str(folder))
    return images.load(root, paths, shaping)


# Golden preprocessing. The reference ignores EXIF, clips 16 bits, drops some alpha and crops:
# that decoding is done here; sizes, resampling, padding and stacking are ours.


def decoded_as_reference(path: Path) -> Image.Image:
    image: Image.Image = Image.open(path)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cropped_to_two_to_one(image: Image.Image) -> Image.Image:
    w, h = image.size
    if h / w < 0.5:
        width = min(w, max(1, round(h / 0.5)))
        return image.crop(((w - width) // 2, 0, (w - width) // 2 + width, h))
    if h / w > 2:
        height = min(h, max(1, round(w * 2)))
        return image.crop((0, (h - height) // 2, w, (h - height) // 2 + height))
    return image


def resized(image: Image.Image, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(decode.resized(image, size))


def as_bytes(pixels: Tensor) -> Tensor:
    exact = pixels * 255
    assert torch.equal(exact.round() / 255, pixels)
    return exact.round().to(torch.uint8)


def check(case: dict[str, Any], pixels: Tensor) -> None:
    assert list(pixels.shape) == case["shape"], case["tensor"]
    digest = hashlib.sha256(as_bytes(pixels).numpy().tobytes()).hexdigest()
    assert digest == case["sha256_of_uint8_bytes"], case["tensor"]


def stacked(rgba: list[Tensor]) -> Tensor:
    sizes = torch.tensor([[x.shape[1], x.shape[2]] for x in rgba])
    return images.stack([str(i) for i in range(len(rgba))], rgba, sizes).pixels


def test_golden_preprocessing_of_omega(shared: Path) -> None:
    folder = shared / "golden/vggt_omega/preprocess"
    golden = json.loads((folder / "preprocess.json").read_text())
    modes = {"balanced": "balanced", "max_size": "longer-side"}
    checked = 0
    for case in golden["cases"]:
        if "sha256_of_uint8_bytes" not in case:
            continue  # errors of the reference's own arguments
        resolution, patch = case["image_resolution"], case["patch_size"]
        shaping = Shaping(modes[case["mode"]], resolution, patch)  # type: ignore[arg-type]
        rgba = []
        for name in case["images"]:
            image = cropped_to_two_to_one(decoded_as_reference(folder / "inputs" / name))
            size = images.network_size(image.size[::-1], shaping)
            rgba.append(resized(image, size))
        check(case, stacked(rgba))
        checked += 1
    assert checked >= 60
    for row in golden["size_table"]:
        left, top, right, bottom = row["crop_box"]
        for key, size in row.items():
            if key.startswith(("balanced", "max_size")):
                mode, resolution, patch = key.rsplit("_", 2)
                shaping = Shaping(modes[mode], int(resolution), int(patch))  # type: ignore[arg-type]
                ours = images.network_size((bottom - top, right - left), shaping)
                assert list(ours) == size, (row, key)


@pytest.mark.parametrize("mode", ["longer-side", "balanced"])
def test_any_resolution_becomes_whole_patches(mode: Literal["longer-side", "balanced"]) -> None:
    for size in ((600, 800), (800, 600)):
        h, w = images.network_size(size, Shaping(mode, 300, 14))
        assert (h % 14, w % 14) == (0, 0)
        assert max(h, w) == pytest.approx(300 if mode == "longer-side" else 346, abs=14)


def vggt_case(case: dict[str, Any], image: Image.Image) -> Tensor:
    w, h = image.size
    if case["loader"] == "square":
        side = max(w, h)
        square = Image.new("RGB", (side, side), "black")
        square.paste(image, ((side - w) // 2, (side - h) // 2))
        return resized(square, (case["target_size"],) * 2)
    if case["mode"] == "crop":
        height = 14 * round(h * (518 / w) / 14)
        top = max(0, (height - 518) // 2)
        return resized(image, (height, 518))[:, top : top + 518]
    content = resized(image, images.network_size((h, w), Shaping("longer-side", 518, 14)))
    canvas = torch.full((4, 518, 518), 255, dtype=torch.uint8)
    top, left = (518 - content.shape[1]) // 2, (518 - content.shape[2]) // 2
    canvas[:, top : top + content.shape[1], left : left + content.shape[2]] = content
    return canvas


def test_golden_preprocessing_of_vggt(shared: Path) -> None:
    golden = json.loads((shared / "golden/vggt/preprocess/preprocess.json").read_text())
    inputs = shared / "golden/vggt_omega/preprocess/inputs"
    for case in golden["cases"]:
        rgba = [vggt_case(case, decoded_as_reference(inputs / name)) for name in case["images"]]
        check(case, stacked(rgba))
    for row in golden["size_table"]["rows"]:
        h, w = images.network_size(tuple(row["size_wh"][::-1]), Shaping("longer-side", 518, 14))
        expected = [max(14, side) for side in row["pad_inner_hw"]]  # we never shrink to nothing
        assert [h, w] == expected, row


# Decoding.


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_the_eight_exif_orientations_of_a_photo_give_the_same_image(
    tmp_path: Path, kind: str
) -> None:
    upright = picture()
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, transpose in undo.items():
        stored = upright if transpose is None else upright.transpose(transpose)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
        stored.save(tmp_path / f"{orientation}.{kind}", exif=exif, **options)
    loaded = load(tmp_path)
    assert [photo.size for photo in loaded.photos] == [(40, 60)] * 8
    assert [photo.rotated for photo in loaded.photos] == [False] + [True] * 7
    for frame in range(1, 8):
        assert torch.equal(loaded.images.pixels[frame], loaded.images.pixels[0]), frame + 1
        copy = tmp_path / f"copy.{kind}"
        copies.upright_copy(loaded.photos[frame], copy)
        with Image.open(copy) as image:
            assert image.getexif().get(0x0112, 1) == 1
            difference = np.asarray(image.convert("RGB")).astype(int) - np.asarray(upright)
            assert np.abs(difference).max() <= (0 if kind != "webp" else 30)


def test_an_upright_copy_of_a_jpeg_keeps_its_exif_and_profile(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "Camera"
    exif.get_ifd(0x8769)[0x829A] = 0.01  # exposure time: gsplat reads it
    picture().save(tmp_path / "a.jpg", exif=exif, icc_profile=b"profile")
    photo = load(tmp_path).photos[0]
    copies.upright_copy(photo, tmp_path / "b.jpg")
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.size == (40, 60)
        assert image.info["icc_profile"] == b"profile"
        assert image.getexif()[0x0110] == "Camera"
        assert 0x0112 not in image.getexif()
        assert float(image.getexif().get_ifd(0x8769)[0x829A]) == pytest.approx(0.01)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    gray = np.asarray(picture().convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(tmp_path / "deep.png")
    Image.fromarray((gray // 257).astype(np.uint8)).save(tmp_path / "flat.png")
    deep, flat = load(tmp_path).images.pixels
    assert torch.equal(deep, flat)


def test_transparency_becomes_white_and_is_not_valid(tmp_path: Path) -> None:
    rgba = picture().convert("RGBA")
    alpha = Image.new("L", rgba.size, 255)
    alpha.paste(0, (0, 0, 30, 40))
    rgba.putalpha(alpha)
    rgba.save(tmp_path / "rgba.png")
    rgba.convert("LA").save(tmp_path / "la.png")
    paletted = picture().quantize(8)
    paletted.info["transparency"] = 0
    paletted.save(tmp_path / "palette.png", transparency=0)
    loaded = load(tmp_path).images
    by_name = dict(zip(loaded.names, range(3), strict=True))
    for name in ("rgba.png", "la.png"):
        frame = by_name[name]
        assert torch.equal(loaded.pixels[frame, :, :, :30], torch.ones(3, 48, 30)), name
        assert not loaded.valid[frame, :, :36].any(), name
        assert loaded.valid[frame, :, 44:].all(), name
    frame = by_name["palette.png"]
    assert not loaded.valid[frame].all()
    assert loaded.valid[frame].any()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_look_like_their_picture(tmp_path: Path, mode: str) -> None:
    kind = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    converted = picture().convert(mode)
    converted.save(tmp_path / f"x.{kind}", quality=95)
    expected = np.asarray(converted.convert("RGB").resize((80, 48), Image.Resampling.BICUBIC))
    pixels = load(tmp_path).images.pixels[0].permute(1, 2, 0) * 255
    assert np.abs(pixels.numpy() - expected).mean() < 4


@pytest.mark.parametrize("kind", ["jpg", "JPEG", "png", "webp", "tif", "bmp"])
def test_every_named_kind_is_read(tmp_path: Path, kind: str) -> None:
    picture().save(tmp_path / f"x.{kind}", quality=95)
    expected = np.asarray(picture().resize((80, 48), Image.Resampling.BICUBIC))
    pixels = load(tmp_path).images.pixels[0].permute(1, 2, 0) * 255
    assert np.abs(pixels.numpy() - expected).mean() < 4


def test_drafted_jpegs_differ_by_less_than_a_grey_level(tmp_path: Path, examples: Path) -> None:
    with Image.open(examples / "motorcycle/left.png") as photo:
        large = photo.convert("RGB").resize((2964, 2000), Image.Resampling.LANCZOS)
    large.save(tmp_path / "x.jpg", quality=95)
    shaping = Shaping("longer-side", 518, 14)
    ours = load(tmp_path, shaping).images.pixels[0]
    size = images.network_size((2000, 2964), shaping)
    with Image.open(tmp_path / "x.jpg") as image:
        whole = resized(image.convert("RGB"), size)[:3] / 255
    difference = (ours - whole).abs().mean() * 255
    assert 0 < difference < 1  # 0: the draft was not used


# Sizes and the way back.


@pytest.mark.parametrize("shaping", [BALANCED, LONGER])
@pytest.mark.parametrize("size", [(40, 60), (60, 40), (10, 100), (100, 10), (33, 33)])
def test_any_aspect_is_kept_whole(tmp_path: Path, shaping: Shaping, size: tuple[int, int]) -> None:
    picture(size[1], size[0]).save(tmp_path / "x.png")
    loaded = load(tmp_path, shaping).images
    assert loaded.valid.all()
    H, W = loaded.size
    corners = torch.tensor([[0.0, 0, 1], [W, H, 1]], dtype=torch.float64)
    mapped = corners @ loaded.source_from_network[0].mT
    assert_close(mapped[:, :2], torch.tensor([[0, 0], [size[1], size[0]]], dtype=torch.float64))


def test_mixed_sizes_are_padded_around_their_centre_and_the_way_back_is_exact(
    tmp_path: Path,
) -> None:
    picture(60, 40).save(tmp_path / "1.png")
    picture(40, 60).save(tmp_path / "2.png")
    loaded = load(tmp_path).images
    assert loaded.size == (80, 80)
    for frame, (h, w) in enumerate([(40, 60), (60, 40)]):
        rows, columns = images.frame_of(loaded, frame)
        inside = torch.zeros(80, 80, dtype=torch.bool)
        inside[rows, columns] = True
        assert torch.equal(loaded.valid[frame], inside)
        assert (loaded.pixels[frame][:, ~inside] == 1).all()
        corners = torch.tensor([[columns.start, rows.start, 1.0], [columns.stop, rows.stop, 1.0]])
        mapped = corners.double() @ loaded.source_from_network[frame].mT
        assert_close(mapped[:, :2], torch.tensor([[0, 0], [w, h]], dtype=torch.float64))


# Finding.


def test_names_are_in_natural_order_with_nested_folders(tmp_path: Path) -> None:
    for name in ("img10.png", "img2.png", "IMG1.png", "b/img3.png", "img2b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name)
    (tmp_path / "._img1.png").write_bytes(b"a resource fork")
    (tmp_path / "notes.txt").write_text("not an image")
    loaded = load(tmp_path)
    assert loaded.images.names == ("b/img3.png", "IMG1.png", "img2.png", "img2b.png", "img10.png")


def test_a_pattern_a_file_and_a_list_on_stdin_are_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a1.png", "a2.png", "b1.png"):
        picture().save(tmp_path / name)
    assert [p.name for p in files.find(str(tmp_path / "a*.png"))[1]] == ["a1.png", "a2.png"]
    assert [p.name for p in files.find(str(tmp_path / "b1.png"))[1]] == ["b1.png"]
    listed = f"{tmp_path}/b1.png\n{tmp_path}/a1.png\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(listed))
    root, paths = files.find("-")
    assert root == tmp_path
    assert [p.name for p in paths] == ["b1.png", "a1.png"]  # the list's own order
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(InputError, match="no images in: standard input"):
        files.find("-")


def test_photos_of_unread_kinds_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.CR2").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert len(files.find(str(tmp_path))[1]) == 1
    assert "b.CR2" in caplog.text


@pytest.mark.parametrize("source", ["missing", "*.jpg", ""])
def test_nothing_to_read_is_an_input_error(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError):
        files.find(str(tmp_path / source))


def test_unreadable_photos_are_left_out_with_their_names(tmp_path: Path) -> None:
    picture().save(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    picture(600, 400).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((4, 4), 7.0, np.float32)).save(tmp_path / "float.tif")
    root, paths = files.find(str(tmp_path))
    loaded = images.load(root, [*paths, tmp_path / "gone.png"], BALANCED)
    assert loaded.images.names == ("good.png",)
    reasons = dict(loaded.unreadable)
    assert set(reasons) == {"empty.png", "cut.jpg", "float.tif", "gone.png"}
    assert reasons["gone.png"] == "no such file"
    assert "truncated" in reasons["cut.jpg"]
    assert "values outside" in reasons["float.tif"]


def test_no_readable_photo_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    root, paths = files.find(str(tmp_path))
    with pytest.raises(InputError, match=r"empty\.png"):
        images.load(root, paths, BALANCED)
    with pytest.raises(InputError):
        decode.upright_sizes(paths)


# Cameras.


def photo(
    name: str, size: tuple[int, int] = (40, 60), camera: str = "A", focal: str = "5"
) -> Photo:
    return Photo(Path(name), name, size, False, camera, focal)


def test_cameras_are_grouped_as_asked() -> None:
    shots = [photo("x/1"), photo("x/2", focal="9"), photo("y/3"), photo("y/4", camera="B")]
    assert lenses.camera_groups(shots, "auto") == [0, 1, 0, 2]
    assert lenses.camera_groups(shots, "per-image") == [0, 1, 2, 3]
    assert lenses.camera_groups(shots, "shared") == [0, 0, 0, 0]
    assert lenses.camera_groups(shots, "per-folder") == [0, 0, 1, 1]


@pytest.mark.parametrize("mode", ["shared", "per-folder"])
def test_photos_of_different_size_cannot_share_a_camera(mode: str) -> None:
    with pytest.raises(InputError, match="2 is 40 x 60"):
        lenses.camera_groups([photo("1"), photo("2", size=(60, 40))], mode)


def test_exif_names_the_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Maker ", "Model\0"
    exif.get_ifd(0x8769)[0x920A] = 4.2
    picture().save(tmp_path / "a.jpg", exif=exif)
    found = load(tmp_path).photos[0]
    assert found.camera == "Maker Model"
    assert float(found.focal_length) == pytest.approx(4.2)
