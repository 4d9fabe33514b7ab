"""Formats are added to a finished scene: all of them or none."""

import errno
import json
import shutil
import sys
from pathlib import Path

import pytest
from rendered import scene_of, truth
from typer.testing import CliRunner

from vggt_cli.cli import app
from vggt_cli.errors import OutputError, VggtError
from vggt_cli.formats import export, scene_read, writers

EVERY = ["colmap-txt", "depth", "nerfstudio", "glb", "mesh"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    scene = scene_of(truth(frames=4, size=(48, 64)), folder / "photos")
    export.write(scene, folder / "scene")
    return folder / "scene"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "scene")
    return tmp_path / "scene"


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def add(folder: Path, formats: list[str], overwrite: bool = False) -> list[Path]:
    return export.add(scene_read.read(folder), folder, formats, overwrite)


def test_added_formats_are_those_of_a_scene_that_was_written_with_them(
    folder: Path, tmp_path: Path
) -> None:
    before = contents(folder)
    written = add(folder, EVERY)
    assert all(path.exists() for path in written)
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    export.write(scene_read.read(folder), tmp_path / "again", EVERY)
    whole = contents(tmp_path / "again")
    assert set(after) == set(whole)
    for name in set(after) - set(before) - {"mesh.ply"}:  # open3d orders triangles as it likes
        assert after[name] == whole[name], name


def test_what_formats_write_belongs_to_a_scene_and_is_written_again(folder: Path) -> None:
    assert scene_read.formats(folder) == []
    add(folder, EVERY)
    assert set(scene_read.formats(folder)) == set(EVERY)
    export.refuse_strangers(folder)
    (folder / (writers.DRAFT + "killed")).mkdir()
    export.refuse_strangers(folder)
    (folder / "mine.txt").touch()
    with pytest.raises(OutputError, match=r"would be lost: .*scene: mine\.txt"):
        export.refuse_strangers(folder)


def test_every_writer_s_places_are_known(folder: Path) -> None:
    assert set(writers.PLACES) == set(writers.WRITERS)
    for name in EVERY:
        before = set(contents(folder))
        add(folder, [name])
        for new in set(contents(folder)) - before:
            assert any(Path(new).is_relative_to(place) for place in writers.PLACES[name]), new


def test_a_format_that_is_there_is_refused_without_overwrite(folder: Path) -> None:
    add(folder, ["glb"])
    (folder / "scene.glb").write_bytes(b"mine")
    before = contents(folder)
    with pytest.raises(OutputError, match=r"exists: .*scene: scene\.glb"):
        add(folder, ["nerfstudio", "glb"])
    assert contents(folder) == before
    add(folder, ["nerfstudio", "glb"], overwrite=True)
    assert (folder / "scene.glb").read_bytes()[:4] == b"glTF"
    assert not list(folder.glob(".*"))


def test_a_failure_of_one_format_leaves_the_scene_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(writers.WRITERS, "glb", full)
    before = contents(folder)
    with pytest.raises(OutputError, match="No space left") as caught:
        add(folder, ["depth", "glb"])
    assert "free some space" in caught.value.hint
    assert contents(folder) == before

    def closed(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(writers.WRITERS, "glb", closed)
    with pytest.raises(OutputError, match="Permission denied") as caught:
        add(folder, ["depth", "glb"])
    assert "writable" in caught.value.hint
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("number", [0, 1, 4, 9])
def test_a_failure_between_renames_brings_all_of_the_old_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    add(folder, ["depth", "glb"])
    (folder / "scene.glb").write_bytes(b"mine")
    (folder / "depths/p0.png").write_bytes(b"mine too")
    before = contents(folder)
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        add(folder, ["depth", "glb"], overwrite=True)
    assert contents(folder) == before


def test_a_mesh_without_open3d_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open3d", None)
    before = contents(folder)
    for attempt in (lambda: writers.require(["mesh"]), lambda: add(folder, ["glb", "mesh"])):
        with pytest.raises(OutputError, match="a mesh needs open3d") as caught:
            attempt()
        assert "pip install open3d" in caught.value.hint
        assert "libegl1" in caught.value.hint
    writers.require(["glb", "depth"])
    assert contents(folder) == before


def test_reconstruct_refuses_a_mesh_without_open3d_before_the_work(
    examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open3d", None)
    arguments = ["reconstruct", str(examples / "motorcycle"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--dry-run", "--format", "mesh"])
    assert isinstance(result.exception, OutputError)
    assert "a mesh needs open3d" in str(result.exception)


def test_the_command_says_what_it_wrote(folder: Path) -> None:
    arguments = ["export", str(folder), "--format", "colmap-txt", "-f", "nerfstudio"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0
    texts = [str(folder / f"sparse/0/{part}.txt") for part in ("cameras", "images", "points3D")]
    wanted = [*texts, str(folder / "transforms.json")]
    assert json.loads(result.stdout) == {"scene": str(folder), "written": wanted}
    result = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert result.stdout.splitlines() == wanted


def test_the_command_takes_only_scenes_of_this_tool_and_known_formats(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    result = CliRunner().invoke(app, ["export", str(tmp_path / "other"), "-f", "glb"])
    assert isinstance(result.exception, VggtError)
    assert result.exception.exit_code == 2
    assert "not a scene of this tool" in str(result.exception)
    assert CliRunner().invoke(app, ["export", str(folder), "-f", "obj"]).exit_code == 2
    assert CliRunner().invoke(app, ["export", str(folder)]).exit_code == 2
