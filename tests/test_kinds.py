"""HEIC and AVIF: decoded upright once, written as JPEG with their EXIF; and without a reader."""

import sys
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from test_images import load, picture

from vggt_cli.errors import InputError
from vggt_cli.formats import copies
from vggt_cli.formats.export import output_names
from vggt_cli.formats.headers import gps, header


def rare(folder: Path, kind: str, orientation: int = 1) -> Path:
    """A 60 x 40 picture as HEIC or AVIF, stored so that it shows under `orientation`."""
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    exif.get_ifd(0x8769)[0x920A] = 4.2
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 0.0, 0.0), 3: "E", 4: (11.0, 0.0, 0.0)})
    path = folder / f"IMG 1.{kind}"
    image = picture()
    image.info["exif"] = exif.tobytes()  # from here pillow-heif takes the rotation of the file
    image.save(path, "HEIF" if kind == "heic" else "AVIF", quality=95, exif=exif.tobytes())
    return path


@pytest.mark.parametrize("kind", ["heic", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rare_kinds_are_turned_once_and_written_as_upright_jpeg(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    rare(tmp_path, kind, orientation)
    picture().save(tmp_path / "png.png", exif=exif_of(orientation))
    loaded = load(tmp_path)
    one, same = loaded.photos
    assert one.size == same.size == ((40, 60) if orientation < 5 else (60, 40))
    assert (loaded.images.pixels[0] - loaded.images.pixels[1]).abs().mean() < 0.02
    assert one.camera == "Maker"
    assert float(one.focal_length) == pytest.approx(4.2)
    assert gps(one.path) is not None
    assert one.rewritten
    copy = tmp_path / output_names([one.name])[0]
    assert copy.name == "IMG_1.jpg"
    copies.upright_copy(one, copy)
    copies.upright_copy(same, tmp_path / "same.png")
    with Image.open(copy) as written, Image.open(tmp_path / "same.png") as expected:
        assert written.format == "JPEG"
        assert written.getexif().get(0x0112, 1) == 1
        assert written.getexif()[0x010F] == "Maker"
        assert written.size == expected.size == one.size[::-1]
        difference = np.asarray(written, np.float32) - np.asarray(expected, np.float32)
    assert np.abs(difference).mean() < 4


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_heic_without_its_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rare(tmp_path, "heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match=r"IMG 1\.heic: HEIC: pip install 'vggt-cli\[heif\]'"):
        load(tmp_path)
    assert header(path) == "cannot be read (OSError)"


@pytest.mark.parametrize(("kind", "name"), [("heic", "a.jpg"), ("png", "a.jpg"), ("png", "a.heic")])
def test_a_photo_is_what_it_holds_whatever_its_name_says(
    tmp_path: Path, kind: str, name: str
) -> None:
    picture().save(tmp_path / "x.png") if kind == "png" else rare(tmp_path, kind)
    next(tmp_path.iterdir()).rename(tmp_path / name)
    photo = load(tmp_path).photos[0]
    assert photo.kind == {"heic": "HEIF", "png": "PNG"}[kind]
    assert photo.rewritten == (kind == "heic")
