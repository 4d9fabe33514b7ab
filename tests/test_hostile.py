"""Files that are broken, odd or made to hurt: skipped by name, or an error; no hang, no crash."""

import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image
from test_images import BALANCED, load, picture

from vggt_cli.errors import InputError
from vggt_cli.formats import files, headers, images
from vggt_cli.formats.export import output_names
from vggt_cli.formats.headers import header


def found(folder: Path | str) -> list[str]:
    root, paths = files.find(str(folder))
    return [files.name_in(root, path) for path in paths]


# Files that are none.


def test_pipes_sockets_broken_links_and_loops_are_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    picture().save("good.png")
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
    Path("gone.png").symlink_to("nowhere.png")
    Path("loop.png").symlink_to("loop.png")
    Path("device.png").symlink_to("/dev/zero")
    Path("folder.png").mkdir()
    loaded = load(Path())
    assert loaded.images.names == ("good.png",)
    reasons = dict(loaded.unreadable)
    assert set(reasons) == {"pipe.png", "socket.png", "gone.png", "loop.png", "device.png"}
    for name in ("pipe.png", "socket.png", "device.png"):
        assert reasons[name] == "not a regular file"
        assert header(Path(name)) == "cannot be read (OSError)"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture().save(tmp_path / "good.png")
    picture().save(tmp_path / "closed.png")
    (tmp_path / "closed.png").chmod(0)
    (tmp_path / "folder").mkdir(mode=0)
    assert [name for name, _ in load(tmp_path).unreadable] == ["closed.png"]
    assert "folder" in caplog.text


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    picture().save(tmp_path / "good.png")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def refuse(folder: str) -> object:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found(tmp_path) == ["good.png"]
    assert "left out, cannot be read: " in caplog.text
    assert "closed (Permission denied)" in caplog.text


# Where files lie, and what they are called.


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    inside, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (inside / "real").mkdir(parents=True)
    elsewhere.mkdir()
    picture().save(inside / "real/a.png")
    picture().save(elsewhere / "b.png")
    (inside / "a_link").symlink_to(inside / "real")
    (inside / "other").symlink_to(elsewhere)
    (inside / "real/loop").symlink_to(inside)
    (elsewhere / "back").symlink_to(tmp_path)
    assert found(inside) == ["other/b.png", "real/a.png"]


@pytest.mark.parametrize(
    "name", ["ünï cödé 图.png", "a b\tc.png", "-x.png", "new\nline.png", "'.png"]
)
def test_names_of_every_kind_are_found_read_and_made_plain(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mit Leerzeichen é"
    folder.mkdir()
    picture().save(folder / name)
    assert load(folder).images.names == (name,)
    plain = output_names([name])[0]
    assert not any(c.isspace() for c in plain)


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text")
def test_a_name_that_is_no_text_becomes_one(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    picture().save(tmp_path / name)
    assert load(tmp_path).images.names == (name,)
    assert output_names([name]) == ["caf_.png"]


def test_a_list_with_dots_in_its_paths_gives_names_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    picture().save(tmp_path / "a/1.png")
    picture().save(tmp_path / "a/b/2.png")
    lines = [f"{tmp_path}/a/b/../1.png\n", "\n", f"{tmp_path}/./a/b/2.png\r\n"]
    monkeypatch.setattr("sys.stdin", iter(lines))
    assert found("-") == ["1.png", "b/2.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text")
def test_a_list_may_hold_names_that_are_no_text(tmp_path: Path) -> None:
    code = "from vggt_cli.formats import files; print(ascii(files.find('-')[1][0].name))"
    run = subprocess.run(
        [sys.executable, "-c", code], input=bytes(tmp_path) + b"/caf\xe9.png\n",
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert run.stdout.split() == [b"'caf\\udce9.png'"], run.stderr


@pytest.mark.parametrize("pattern", [".cache/p/*.png", "../*/.cache/p/[12].png", ".cache/**/*.png"])
def test_hidden_folders_that_a_pattern_names_are_meant_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    for name in (".cache/p/1.png", ".cache/p/.hidden/3.png", ".cache/p/.4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    if "*/." not in pattern:
        assert found(pattern) == ["1.png"]
        assert found(str(tmp_path / pattern)) == ["1.png"]
    with pytest.raises(InputError, match="no images in"):
        files.find("*/p/*.png")


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "**x/***", "/dev/null", "[", "~nobody/x"])
def test_a_source_that_makes_no_sense_is_an_input_error(source: str) -> None:
    with pytest.raises(InputError):
        images.load(*files.find(source), BALANCED)


def test_ten_thousand_files_are_found_in_order_in_a_second_or_two(tmp_path: Path) -> None:
    for folder in range(10):
        (tmp_path / f"d{folder}").mkdir()
        for i in range(1000):
            (tmp_path / f"d{folder}/img{i}.jpg").touch()
    names = found(tmp_path)
    assert len(names) == 10_000
    assert names[:3] == ["d0/img0.jpg", "d0/img1.jpg", "d0/img2.jpg"]
    assert names[-1] == "d9/img999.jpg"


# What they hold.


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels, and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(200_000, 200_000))
    picture().save(tmp_path / "good.png")
    reason = dict(load(tmp_path).unreadable)["bomb.png"]
    assert reason.startswith("200000 x 200000 pixels, and at most ")
    assert reason.endswith(" megapixels are decoded here")


def test_the_bound_follows_the_memory_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(600, 400).save(tmp_path / "a.png")
    assert headers.most_pixels() >= 100e6  # a large panorama
    monkeypatch.setattr(os, "sysconf", lambda name: 2**11)  # a machine of 4 MB
    assert headers.most_pixels() == 2**17
    with pytest.raises(InputError, match="600 x 400 pixels, and at most 0 megapixels"):
        load(tmp_path)
    monkeypatch.delattr(os, "sysconf")
    assert headers.most_pixels() == headers.MOST_PIXELS


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    picture().save(tmp_path / "a.png", exif=exif)
    assert load(tmp_path).photos[0].size == (40, 60)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\xff" * 99])
def test_exif_that_is_nonsense_says_nothing(tmp_path: Path, exif: bytes) -> None:
    picture().save(tmp_path / "a.jpg", exif=exif)
    photo = load(tmp_path).photos[0]
    assert (photo.size, photo.rotated, photo.camera) == ((40, 60), False, "")


@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a", b"8BPS\0\1", b"<svg>", b"PK\3\4", b"\0" * 64]
)
def test_other_kinds_under_a_photos_name_are_not_opened(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(start + bytes(500))
    with pytest.raises(InputError, match=r"a\.jpg: not a photo of a known kind"):
        load(tmp_path)


# The whole command.


def vggt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vggt_cli", "reconstruct", "--model", "mini", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_strict_stops_at_a_bad_file_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture().save(tmp_path / "in/good.png")
    os.mkfifo(tmp_path / "in/pipe.jpg")
    done = vggt(str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--strict")
    assert done.returncode == 2
    assert "cannot be read: pipe.jpg (not a regular file)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
