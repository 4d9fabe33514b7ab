"""Mutated files: photos, masks, COLMAP models and maps are read, or are an InputError.

No other exception, no hang, no memory that the file does not need. Thousands of cases each under
the marker slow, a few hundred by default.
"""

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_colmap import model
from test_images import BALANCED, picture

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap, colmap_read, colmap_rows, copies, decode, headers, images

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about EXIF

FEW, MANY = 150, 5000
SECONDS = 20  # for one case, on a loaded machine; most take milliseconds
EXTREMES = (0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**64 - 1)


def few(cases: int) -> settings:
    return settings(
        max_examples=cases,
        deadline=SECONDS * 1000,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What is done to a file: cut, flipped, numbers blown up, parts repeated or moved."""
    kinds = draw(st.lists(st.sampled_from("cfnrz"), min_size=1, max_size=4))
    where = draw(st.lists(st.floats(0, 1), min_size=2 * len(kinds), max_size=2 * len(kinds)))
    # Headers are where a flipped bit hurts: half of the places lie near the start.
    near = draw(st.booleans())
    value = draw(st.integers(0, 255))
    extreme = draw(st.sampled_from(EXTREMES))
    width = draw(st.sampled_from([2, 4, 8]))
    order: bool = draw(st.booleans())

    def mutated(data: bytes) -> bytes:
        for i, kind in enumerate(kinds):
            span = min(len(data), 120) if near else len(data)
            a, b = (int(x * span) for x in where[2 * i : 2 * i + 2])
            if kind == "c":
                data = data[:a]
            elif kind == "f":
                data = data[:a] + bytes([value]) + data[a + 1 :]
            elif kind == "n":
                number = (extreme % 2 ** (8 * width)).to_bytes(width, "big" if order else "little")
                data = data[:a] + number + data[a + width :]
            elif kind == "r":
                data = data[:a] + data[b:] + data[a:b]
            else:
                data = data[:a] + bytes(b) + data[a:]
        return data

    return mutated


def photographs() -> dict[str, bytes]:
    """Small files of every kind that is read, with EXIF, alpha and an ICC-like block."""
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769).update({0x920A: 4.2, 0xA405: 28})
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 3.0), 3: "E", 4: (11.0, 0.0, 0.0)})
    small, said = picture(24, 16), {"exif": exif.tobytes()}
    alpha = small.convert("RGBA")
    alpha.putalpha(128)
    deep = Image.fromarray(np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 99)
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("JPEG", small, {**said, "icc_profile": bytes(200)}),
        ("JPEG", small.convert("CMYK"), {"progressive": True}),
        ("PNG", alpha, said),
        ("PNG", small.quantize(8), {"transparency": 0}),
        ("PNG", deep, {}),
        ("WEBP", alpha, said),
        ("WEBP", small, {"lossless": True, **said}),
        ("TIFF", small, {"compression": "tiff_lzw"}),
        ("TIFF", deep, {"compression": "tiff_adobe_deflate"}),
        ("TIFF", small, {"compression": "jpeg"}),
        ("BMP", small, {}),
        ("BMP", small.quantize(8), {}),
        ("MPO", small, {"save_all": True, "append_images": [small]}),
        ("HEIF", small, said),
        ("AVIF", small, said),
    ]
    result = {}
    for i, (kind, image, how) in enumerate(kinds):
        file = io.BytesIO()
        image.save(file, kind, **how)
        result[f"{i}-{kind}"] = file.getvalue()
    return result


PHOTOGRAPHS = photographs()


def photo_is_read_or_refused(folder: Path, data: bytes) -> None:
    path, copy, said = folder / "a.jpg", folder / "copy", ""
    path.write_bytes(data)
    headers.header(path)
    headers.gps(path)
    try:
        photo = images.load(folder, [path], BALANCED).photos[0]
        decode.kept(photo)
        decode.gray(path, 16)
        copies.upright_copy(photo, copy)
    except InputError as error:
        said = str(error)
    assert not said or "a.jpg" in said  # it says which


@pytest.fixture(autouse=True)
def _bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger photos are refused, so that thousands of cases fit a small machine."""
    monkeypatch.setattr(headers, "most_pixels", lambda: 2**22)


@few(FEW)
@given(kind=st.sampled_from(sorted(PHOTOGRAPHS)), edit=edits())
def test_a_mutated_photo_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, edit: Callable[[bytes], bytes]
) -> None:
    photo_is_read_or_refused(tmp_path_factory.getbasetemp(), edit(PHOTOGRAPHS[kind]))


@pytest.mark.slow
@few(MANY)
@given(kind=st.sampled_from(sorted(PHOTOGRAPHS)), edit=edits())
def test_many_mutated_photos_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, edit: Callable[[bytes], bytes]
) -> None:
    photo_is_read_or_refused(tmp_path_factory.getbasetemp(), edit(PHOTOGRAPHS[kind]))


# COLMAP models.

WORDS = (
    "nan",
    "inf",
    "-1",
    "1e999",
    "9" * 30,
    "",
    "#",
    "x",
    "0",
    "PINHOLE",
    "é",
    "1 2",
    "\0",
    "\n",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ and txt/: the same small model."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("bin", "txt"):
        (folder / kind).mkdir()
    colmap.write(model(), folder / "bin")
    colmap.write_text(model(), folder / "txt")
    return folder


@st.composite
def words(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Some words of a text are others, or lines are gone."""
    pairs = draw(
        st.lists(st.tuples(st.floats(0, 1), st.sampled_from(WORDS)), min_size=1, max_size=4)
    )

    def mutated(data: bytes) -> bytes:
        parts = data.decode().split(" ")
        for where, word in pairs:
            parts[int(where * (len(parts) - 1))] = word
        return " ".join(parts).encode()

    return mutated


def model_is_read_or_refused(
    folder: Path, models: Path, part: str, kind: str, edit: Callable[[bytes], bytes]
) -> None:
    changed = folder / f"changed_{kind}"
    changed.mkdir(exist_ok=True)
    for name in colmap_rows.PARTS:
        data = (models / kind / f"{name}.{kind}").read_bytes()
        (changed / f"{name}.{kind}").write_bytes(edit(data) if name == part else data)
    said = ""
    tracemalloc.start()
    try:
        found = colmap_read.read(changed)
        assert len(found.names) == len(found.cameras)
        found.point_errors()
    except InputError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6
    assert not said or str(changed) in said  # it says which


PART = st.sampled_from(colmap_rows.PARTS)
BINARY = st.tuples(PART, st.just("bin"), edits())
TEXT = st.tuples(PART, st.just("txt"), words() | edits())


@few(FEW)
@given(case=BINARY | TEXT)
def test_a_mutated_model_is_read_or_refused(
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[str, str, Callable[[bytes], bytes]],
) -> None:
    model_is_read_or_refused(tmp_path_factory.getbasetemp(), models, *case)


@pytest.mark.slow
@few(MANY)
@given(case=BINARY | TEXT)
def test_many_mutated_models_are_read_or_refused(
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[str, str, Callable[[bytes], bytes]],
) -> None:
    model_is_read_or_refused(tmp_path_factory.getbasetemp(), models, *case)


@pytest.mark.parametrize("part", colmap_rows.PARTS)
def test_a_count_of_two_to_the_sixty_allocates_nothing(
    models: Path, tmp_path: Path, part: str
) -> None:
    def blown_up(data: bytes) -> bytes:
        return (2**60).to_bytes(8, "little") + data[8:]

    with pytest.raises(InputError, match="cut short"):
        colmap_rows_of(tmp_path, models, part, blown_up)
    model_is_read_or_refused(tmp_path, models, part, "bin", blown_up)


def test_a_camera_of_more_pixels_than_an_integer_holds_is_an_error(
    models: Path, tmp_path: Path
) -> None:
    def blown_up(data: bytes) -> bytes:
        return data[:16] + (2**63).to_bytes(8, "little") + data[24:]  # the first camera's width

    with pytest.raises(InputError, match="9223372036854775808 x 600"):
        colmap_rows_of(tmp_path, models, "cameras", blown_up)


def colmap_rows_of(folder: Path, models: Path, part: str, edit: Callable[[bytes], bytes]) -> object:
    path = folder / f"{part}.bin"
    path.write_bytes(edit((models / "bin" / path.name).read_bytes()))
    read: dict[str, Callable[[Path], object]] = {
        "cameras": colmap_rows.cameras,
        "images": colmap_rows.images,
        "points3D": colmap_rows.points,
    }
    return read[part](folder)


# Maps.


@few(FEW)
@given(kind=st.sampled_from(["bin", "npy"]), edit=edits())
def test_a_mutated_map_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, edit: Callable[[bytes], bytes]
) -> None:
    values = np.arange(60, dtype="<f4").reshape(6, 10)
    file = io.BytesIO()
    np.save(file, values)
    data = b"10&6&1&" + values.tobytes() if kind == "bin" else file.getvalue()
    path = tmp_path_factory.getbasetemp() / f"map.{kind}"
    path.write_bytes(edit(data))
    said = ""
    tracemalloc.start()
    try:
        colmap_read.read_map(path)
    except InputError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6
    assert not said or str(path) in said
