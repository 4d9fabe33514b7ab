"""What other programs would do with a scene: every rule has a scene that fails it."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from vggt_cli import cli
from vggt_cli.errors import InputError
from vggt_cli.formats import check, colmap, colmap_rows, view_selection
from vggt_cli.formats.check_rules import ALL, BROKEN, MENDABLE, NOTE, RULES
from vggt_cli.scene import Cameras, Tracks

S, N, W, H = 6, 40, 64, 48
NAMES = tuple(f"{letter}.jpg" for letter in "abcdef")


def model() -> colmap.Model:
    """Six cameras in a row before a cloud that all of them see."""
    random = torch.Generator().manual_seed(0)
    extrinsics = torch.eye(3, 4).repeat(S, 1, 1)
    extrinsics[:, 0, 3] = torch.linspace(1.5, -1.5, S)
    extrinsics[:, 2, 3] = 4
    k = torch.tensor([[60.0, 0, W / 2], [0, 60.0, H / 2], [0, 0, 1]]).repeat(S, 1, 1)
    cameras = Cameras(extrinsics, k, torch.tensor([[H, W]]).repeat(S, 1))
    point, frame = torch.ones(N, S).nonzero().unbind(-1)
    xy = torch.rand(len(point), 2, generator=random) * torch.tensor([W, H])
    tracks = Tracks(torch.randn(N, 3, generator=random), point, frame.int(), xy)
    return colmap.Model(NAMES, cameras, (0,) * S, tracks, np.zeros((N, 3), np.uint8))


def write(folder: Path, made: colmap.Model | None = None, text: bool = False) -> Path:
    """A scene with photos in `folder` as we write it."""
    made = made or model()
    shutil.rmtree(folder / "sparse", ignore_errors=True)
    (colmap.write_text if text else colmap.write)(made, folder / "sparse/0")
    for name in made.names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (W, H)).save(folder / "images" / name)
    return folder


def only(made: colmap.Model, rows: torch.Tensor) -> colmap.Model:
    """The model with these observations alone."""
    t = made.tracks
    return replace(made, tracks=Tracks(t.xyz, t.point[rows], t.frame[rows], t.xy[rows]))


def moved(made: colmap.Model, extrinsics: torch.Tensor) -> colmap.Model:
    return replace(made, cameras=dataclasses.replace(made.cameras, extrinsics=extrinsics))


def first(made: colmap.Model, count: int) -> colmap.Model:
    """The model with its first images alone."""
    c, less = made.cameras, only(made, made.tracks.frame < count)
    cameras = Cameras(c.extrinsics[:count], c.intrinsics[:count], c.image_size[:count])
    used = made.camera_of_image[:count]
    return replace(less, names=made.names[:count], cameras=cameras, camera_of_image=used)


def lens(folder: Path, kind: int, parameters: tuple[float, ...], number: int = 1) -> None:
    """Cameras.bin with one camera of COLMAP's model `kind`."""
    head = struct.pack("<QIiQQ", 1, number, kind, W, H)
    path = folder / "sparse/0/cameras.bin"
    path.write_bytes(head + struct.pack(f"<{len(parameters)}d", *parameters))


def pose(folder: Path, values: tuple[float, ...]) -> None:
    """The pose of the first image, in the file."""
    path = folder / "sparse/0/images.bin"
    data = path.read_bytes()
    path.write_bytes(data[:12] + struct.pack("<7d", *values) + data[68:])


def edit(path: Path, start: int, content: bytes) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:start] + content + data[start + len(content) :])


def photo(folder: Path, size: tuple[int, int], orientation: int = 1, name: str = "b.jpg") -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(folder / "images" / name, exif=exif)


def in_folders(folder: Path) -> None:
    shutil.rmtree(folder / "images")
    write(folder, replace(model(), names=("x/a.jpg", "y/a.jpg", *NAMES[2:])))


def spaced(folder: Path) -> None:
    write(folder, replace(model(), names=("a 1.jpg", *NAMES[1:])))


def spaced_beside(folder: Path) -> None:
    spaced(folder)
    made = replace(model(), names=("a 1.jpg", *NAMES[1:]))
    colmap.write_text(made, folder / "sparse/0")


def tracks_of(folder: Path, length: int) -> None:
    write(folder, only(model(), model().tracks.frame < length))


def no_track(folder: Path) -> None:
    write(folder, only(model(), model().tracks.point != 3))


def single(folder: Path) -> None:
    write(folder, only(model(), (model().tracks.frame > 0) | (model().tracks.point > N)))


def alone(folder: Path) -> None:
    t = model().tracks
    write(folder, only(model(), (t.frame == 0) ^ (t.point > 3)))


def no_points(folder: Path) -> None:
    made = only(model(), model().tracks.frame < 0)
    none = Tracks(torch.zeros(0, 3), made.tracks.point, made.tracks.frame, made.tracks.xy)
    write(folder, replace(made, tracks=none, rgb=np.zeros((0, 3), np.uint8)))


def infinite_points(folder: Path) -> None:
    edit(folder / "sparse/0/points3D.bin", 16, struct.pack("<d", np.nan))


def one_place(folder: Path) -> None:
    write(folder, moved(model(), torch.eye(3, 4).repeat(S, 1, 1)))


def near(folder: Path) -> None:
    step = torch.eye(3, 4).repeat(S, 1, 1)
    step[:, 0, 3] = torch.linspace(0, 1e-3, S)
    step[:, 2, 3] = 4
    write(folder, moved(model(), step))


def two_lenses(folder: Path) -> None:
    made = replace(model(), camera_of_image=(0, 0, 0, 1, 1, 1))
    write(folder, made)
    cameras = struct.pack("<QIiQQ4d", 2, 1, 1, W, H, 60, 60, 32, 24)
    cameras += struct.pack("<IiQQ8d", 2, 5, W, H, 60, 60, 32, 24, 0.1, 0, 0, 0)
    (folder / "sparse/0/cameras.bin").write_bytes(cameras)


def old_ply(folder: Path) -> None:
    words = "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n0\n"
    (folder / "sparse/0/points3D.ply").write_text(words)


def large(folder: Path) -> None:
    edit(folder / "sparse/0/cameras.bin", 16, struct.pack("<QQ", 1664, 1248))
    for name in NAMES:
        photo(folder, (1664, 1248), name=name)


def gone(part: str) -> Callable[[Path], None]:
    return lambda folder: (folder / part).unlink()


def workspace(folder: Path) -> None:
    shutil.copytree(folder / "sparse/0", folder / "sparse", dirs_exist_ok=True)
    shutil.rmtree(folder / "sparse/0")
    (folder / "stereo").mkdir()
    (folder / "stereo/patch-match.cfg").touch()


def exported(folder: Path, *paths: str) -> None:
    """As a scene of ours into which `vggt export` wrote the files."""
    (folder / "depth").mkdir()
    for path in ("report.json", *paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def in_text(folder: Path) -> None:
    colmap.write_text(model(), folder / "sparse")


def in_colmap(folder: Path) -> None:
    shutil.move(folder / "sparse", folder / "colmap/sparse")


def quarter(folder: Path) -> None:
    (folder / "images_4").mkdir()


def nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """To whom a rule says what of the scene that `bad` makes, and not of that of `good`."""

    consumer: str
    level: str
    bad: Callable[[Path], object]
    good: Callable[[Path], object] = nothing


CASES = {
    "readable": Case("3dgs", BROKEN, gone("sparse/0/images.bin")),
    "images": Case("3dgs", BROKEN, lambda f: write(f, first(model(), 0))),
    "cameras": Case("gsplat", BROKEN, lambda f: lens(f, 1, (60, 60, 32, 24), number=9)),
    "twice": Case("gsplat", BROKEN,
                  lambda f: write(f, replace(model(), names=("b.jpg", *NAMES[1:])))),
    "poses": Case("nerfstudio", BROKEN, lambda f: pose(f, (np.nan, 0, 0, 0, 0, 0, 0))),
    "left-out": Case("brush", NOTE, lambda f: pose(f, (0, 0, 0, 0, 0, 0, 0))),
    "quaternions": Case("3dgs", BROKEN, lambda f: pose(f, (2, 0, 0, 0, 0, 0, 0))),
    "one-place": Case("nerfstudio", BROKEN, one_place),
    "tracks": Case("colmap", BROKEN,
                   lambda f: edit(f / "sparse/0/points3D.bin", 8 + 51, struct.pack("<I", 77))),
    "models": Case("gsplat", NOTE, lambda f: colmap.write(model(), f / "sparse/1")),
    "photos": Case("gsplat", BROKEN, gone("images/b.jpg")),
    "some-photos": Case("brush", NOTE, gone("images/b.jpg")),
    "all-photos": Case("brush", BROKEN, lambda f: shutil.rmtree(f / "images")),
    "base-names": Case("3dgs", BROKEN, in_folders),
    "sizes": Case("nerfstudio", BROKEN, lambda f: photo(f, (2 * W, 2 * H))),
    "shapes": Case("3dgs", BROKEN, lambda f: photo(f, (H, W))),
    "scales": Case("gsplat", BROKEN, lambda f: photo(f, (2 * W, 2 * H))),
    "turned": Case("colmap", NOTE, lambda f: photo(f, (W, H), orientation=3)),
    "spaces": Case("openmvs", BROKEN, spaced),
    "spaces-beside": Case("nerfstudio", MENDABLE, spaced_beside),
    "lens": Case("3dgs", MENDABLE, lambda f: lens(f, 2, (60, 32, 24, 0.1))),
    "stuck-lens": Case("3dgs", BROKEN, lambda f: lens(f, 2, (60, 32, 24, 0))),
    "no-plane": Case("fusion", BROKEN, lambda f: lens(f, 17, (W, H))),
    "mixed-lenses": Case("nerfstudio", MENDABLE, two_lenses),
    "simple-pinhole": Case("openmvs", MENDABLE, lambda f: lens(f, 0, (60, 32, 24))),
    "principal-point": Case("3dgs", NOTE, lambda f: lens(f, 1, (60, 60, 30, 24))),
    "points": Case("3dgs", BROKEN, no_points),
    "no-start": Case("brush", NOTE, no_points),
    "finite": Case("gsplat", BROKEN, infinite_points),
    "no-track": Case("openmvs", BROKEN, no_track),
    "short-tracks": Case("colmap", MENDABLE, lambda f: tracks_of(f, 2)),
    "no-neighbours": Case("patch-match", BROKEN, near),
    "neighbours": Case("patch-match", NOTE, alone),
    "few": Case("patch-match", MENDABLE, lambda f: write(f, first(model(), 2))),
    "few-to-fuse": Case("fusion", MENDABLE, lambda f: write(f, first(model(), 4))),
    "blank": Case("instant-ngp", BROKEN, single),
    "workspace": Case("patch-match", MENDABLE, nothing, good=workspace),
    "own-workspace": Case("fusion", MENDABLE,
                          lambda f: exported(f, "colmap_dense/stereo/fusion.cfg")),
    "text": Case("openmvs", MENDABLE, nothing, good=in_text),
    "place": Case("nerfstudio", MENDABLE, nothing, good=in_colmap),
    "factor": Case("gsplat", MENDABLE, nothing, good=quarter),
    "large": Case("nerfstudio", MENDABLE, large),
    "ply": Case("3dgs", MENDABLE, old_ply),
}  # fmt: skip


def test_every_rule_has_a_case() -> None:
    assert list(CASES) == [rule.name for rule in RULES]
    assert all(CASES[rule.name].consumer in rule.verdicts for rule in RULES)
    assert all(rule.why and rule.source for rule in RULES)
    assert set(ALL) == set(check.LABELS) == set(check.COMMANDS)


def levels(folder: Path, consumer: str) -> dict[str, str]:
    (verdict,) = check.check_folder(folder, [consumer])
    return {finding.rule: finding.level for finding in verdict.findings}


@pytest.mark.parametrize("rule", CASES)
def test_the_rule_fires_on_a_scene_that_fails_it_and_not_on_one_that_does_not(
    tmp_path: Path, rule: str
) -> None:
    case = CASES[rule]
    case.good(write(tmp_path / "good"))
    case.bad(write(tmp_path / "bad"))
    assert rule not in levels(tmp_path / "good", case.consumer)
    assert levels(tmp_path / "bad", case.consumer).get(rule) == case.level
    (verdict,) = check.check_folder(tmp_path / "bad", [case.consumer])
    for finding in verdict.findings:
        assert not finding.file.startswith("/"), "seen from the scene"
    assert bool(verdict.commands) == (verdict.verdict == MENDABLE)
    if case.level == BROKEN:
        assert verdict.verdict == BROKEN


def test_a_scene_as_we_write_it_is_broken_for_nobody(tmp_path: Path) -> None:
    found = {v.consumer: v.verdict for v in check.check_folder(write(tmp_path))}
    assert found == dict.fromkeys(ALL, MENDABLE) | dict.fromkeys(("colmap", "3dgs", "brush"), "ok")


# The commands do what they promise.


def perform(command: str) -> None:
    """A command that was given, COLMAP's by pycolmap, trainers left out."""
    for step in command.split(" && "):
        program, *words = shlex.split(step)
        if program in ("mkdir", "rm", "sed", "cp"):
            subprocess.run(["bash", "-c", step], check=True)
        elif program == "colmap" and words[0] in ("image_undistorter", "model_converter"):
            value = dict(zip(words[1::2], words[2::2], strict=True))
            into, source = value["--output_path"], value["--input_path"]
            if words[0] == "image_undistorter":
                colmap.pycolmap().undistort_images(into, source, value["--image_path"])
            else:
                found = colmap.pycolmap().Reconstruction(source)
                text = value["--output_type"] == "TXT"
                (found.write_text if text else found.write_binary)(into)


@pytest.mark.colmap
@pytest.mark.parametrize("consumer", ["3dgs", "gsplat", "nerfstudio", "openmvs", "patch-match"])
@pytest.mark.parametrize("rule", ["lens", "mixed-lenses", "simple-pinhole", "ply", "text"])
def test_after_the_commands_the_scene_is_as_the_program_wants_it(
    tmp_path: Path, consumer: str, rule: str
) -> None:
    CASES[rule].bad(write(tmp_path / "scene"))
    (before,) = check.check_folder(tmp_path / "scene", [consumer])
    assert before.verdict != BROKEN
    for command in before.commands:
        perform(command)
    root = tmp_path / "scene"
    if any("image_undistorter" in command for command in before.commands):
        root /= "undistorted"
    (after,) = check.check_folder(root, [consumer])
    left = {finding.rule for finding in after.findings if finding.level != NOTE}
    # gsplat and nerfstudio are told by an option instead.
    assert left <= {"gsplat": {"factor"}, "nerfstudio": {"place"}}.get(consumer, set())


def commands(folder: Path, consumer: str) -> tuple[str, ...]:
    (verdict,) = check.check_folder(folder, [consumer])
    return verdict.commands


def test_a_scene_of_ours_needs_no_colmap_to_become_text(tmp_path: Path) -> None:
    exported(write(tmp_path))
    first, copy, last = commands(tmp_path, "openmvs")
    assert first == f"vggt export {tmp_path} --format colmap-txt"
    assert commands(tmp_path, "instant-ngp")[0] == first
    colmap.write_text(model(), tmp_path / "sparse/0")  # what it does
    assert commands(tmp_path, "openmvs") == (copy, last)
    perform(copy)
    assert levels(tmp_path, "openmvs") == {}
    assert levels(tmp_path, "instant-ngp") == {}


def test_exported_depth_maps_are_fused_without_patch_match(tmp_path: Path) -> None:
    exported(write(tmp_path, first(model(), 2)), "colmap_dense/stereo/fusion.cfg")
    assert commands(tmp_path, "fusion") == (
        f"colmap stereo_fusion --workspace_path {tmp_path}/colmap_dense "
        f"--output_path {tmp_path}/fused.ply --StereoFusion.min_num_pixels 2",
    )
    assert levels(tmp_path, "fusion") == {"own-workspace": MENDABLE, "few-to-fuse": MENDABLE}
    assert "image_undistorter" in commands(tmp_path, "patch-match")[0]


def test_nerfstudio_takes_a_scene_with_our_transforms_json_as_it_is(tmp_path: Path) -> None:
    large(write(tmp_path))
    (tmp_path / "transforms.json").touch()
    assert set(levels(tmp_path, "nerfstudio")) == {"place", "large"}  # anyone's says nothing
    exported(tmp_path)
    assert levels(tmp_path, "nerfstudio") == {}


@pytest.mark.colmap
def test_colmap_itself_splits_names_of_text_files_at_spaces(tmp_path: Path) -> None:
    write(tmp_path, replace(model(), names=("a 1.jpg", *NAMES[1:])), text=True)
    found = colmap.pycolmap().Reconstruction(tmp_path / "sparse/0")
    assert "a" in {image.name for image in found.images.values()}
    assert levels(tmp_path, "colmap")["spaces"] == BROKEN


def test_text_beside_binary_files_is_kept_from_nerfstudio(tmp_path: Path) -> None:
    CASES["spaces-beside"].bad(write(tmp_path))
    (before,) = check.check_folder(tmp_path, ["nerfstudio"])
    perform(before.commands[0])
    assert not (tmp_path / "colmap/sparse/0/images.txt").exists()
    assert (tmp_path / "colmap/sparse/0/images.bin").is_file()
    assert "--colmap-path colmap/sparse/0" in before.commands[-1]


def test_what_needs_a_colmap_command_is_broken_where_colmap_is(tmp_path: Path) -> None:
    CASES["tracks"].bad(write(tmp_path))
    assert levels(tmp_path, "instant-ngp") == {"tracks": BROKEN}
    assert "tracks" not in levels(tmp_path, "3dgs")


# Every kind of folder.


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("place", ["sparse/0", "sparse", "colmap/sparse/0", "reference", "."])
def test_a_model_is_found_where_people_keep_it(tmp_path: Path, place: str, text: bool) -> None:
    write(tmp_path, text=text)
    shutil.move(tmp_path / "sparse", tmp_path / "old")
    shutil.copytree(tmp_path / "old/0", tmp_path / place, dirs_exist_ok=True)
    verdicts = check.check_folder(tmp_path)
    assert not [str(f) for v in verdicts for f in v.findings if f.level == BROKEN]
    options = (
        next(v.commands[-1] for v in verdicts if v.consumer == "nerfstudio" and v.commands)
        if place != "colmap/sparse/0"
        else f"--colmap-path {place}"
    )
    assert f"--colmap-path {place}" in options


@pytest.mark.parametrize("part", ["cameras", "images", "points3D"])
@pytest.mark.parametrize("text", [False, True])
def test_a_file_that_is_cut_or_missing_is_named_to_all_who_read_it(
    tmp_path: Path, part: str, text: bool
) -> None:
    write(tmp_path, text=text)
    path = tmp_path / f"sparse/0/{part}.{'txt' if text else 'bin'}"
    whole = path.read_bytes()
    spared = {"brush", "instant-ngp"} if part == "points3D" else set()
    for content in [b"4 words" if text else whole[: len(whole) // 2], None]:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        for verdict in check.check_folder(tmp_path):
            if verdict.consumer not in spared:
                assert verdict.verdict == BROKEN
                assert verdict.findings[0].file == f"sparse/0/{path.name}"
                assert str(tmp_path) not in str(verdict.findings[0])


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_damage_to_the_files_is_more_than_a_verdict(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write(tmp_path_factory.mktemp("scenes"), text=data.draw(st.booleans()))
    path = data.draw(st.sampled_from(sorted((folder / "sparse/0").iterdir())))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(new)] = new
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    assert len(check.check_folder(folder)) == len(ALL)


def test_nothing_is_written(tmp_path: Path) -> None:
    write(tmp_path)

    def state() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")}

    before = state()
    check.check_folder(tmp_path)
    assert state() == before


def test_a_folder_without_a_model_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no COLMAP model"):
        check.check_folder(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        check.check_folder(tmp_path / "gone")


@pytest.mark.parametrize("size", [(W, H), (H, W)])
def test_photos_that_exif_turns_fit_those_who_turn_them(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    photo(write(tmp_path), size, orientation=6)
    turned = size == (H, W)  # upright they have the size of the camera
    assert ("sizes" in levels(tmp_path, "patch-match")) == (not turned)
    assert ("sizes" in levels(tmp_path, "nerfstudio")) == turned


# COLMAP's own choice of views.


@pytest.mark.colmap
@pytest.mark.parametrize("seed", range(4))
def test_images_without_neighbours_are_those_of_colmap(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(seed)
    made = model()
    rows = torch.rand(len(made.tracks.point), generator=random) < 0.25
    t = made.cameras.extrinsics.clone()
    t[:, 0, 3] = torch.randn(S, generator=random)
    colmap.write(moved(only(made, rows), t), tmp_path / "sparse")
    theirs = colmap.pycolmap().MVSModel()
    theirs.read_from_colmap(tmp_path)
    images, points = (
        colmap_rows.images(tmp_path / "sparse"),
        colmap_rows.points(tmp_path / "sparse"),
    )
    some = set()
    for angle in (1.0, 10, 20, 25, 30, 35, 40, 45, 50):
        monkeypatch.setattr(view_selection, "MIN_ANGLE", angle)
        chosen = theirs.get_max_overlapping_images(20, angle)
        expected = {theirs.get_image_name(i) for i, others in enumerate(chosen) if not others}
        assert set(view_selection.without_neighbours(images, points)) == expected
        some.add(len(expected))
    assert len(some) > 2, "the angles tell images apart"
    monkeypatch.setattr(view_selection, "MIN_ANGLE", 1.0)
    monkeypatch.setattr(view_selection, "ENOUGH_PAIRS", 5)  # looks at few points first
    assert view_selection.without_neighbours(images, points) == []


# The command.


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["check", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def test_only_broken_programs_make_the_command_fail(tmp_path: Path) -> None:
    write(tmp_path)
    code, words = run(tmp_path)
    assert code == 0
    assert re.search(r"3DGS +ok\n", words)
    assert "$S/undistorted" in words
    (tmp_path / "images/b.jpg").unlink()
    code, words = run(tmp_path)
    assert code == 1
    assert "images/b.jpg: missing; every photo of the model is opened [photos]" in words
    code, words = run(tmp_path, "--for", "brush", "--for", "colmap")
    assert code == 0
    assert "3DGS" not in words


@pytest.mark.parametrize("name", ["out", "colmap", "default", "a/image", "my scene", "."])
def test_printed_commands_are_those_of_json_but_for_a_long_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    _, words = run(name)
    before, _, printed = words.partition("\nCommands")
    assert before
    said = re.search(r", with S=(.*)", printed)
    assert bool(said) == ("/" in name)
    if said:
        assert "$S/undistorted" in printed
        printed = printed.replace("$S", said[1])
    for verdict in json.loads(run(name, "--json")[1])["verdicts"]:
        for command in verdict["commands"]:
            assert f"  {command}\n" in printed


def test_json_holds_all_that_is_printed(tmp_path: Path) -> None:
    folder = tmp_path / "my scene"
    code, words = run(write(folder), "--json")
    content = json.loads(words)
    assert code == 0
    assert (content["model"], content["images"], content["points"]) == ("sparse/0", S, N)
    found = {verdict["consumer"]: verdict for verdict in content["verdicts"]}
    assert list(found) == list(ALL)
    assert found["3dgs"] == {"consumer": "3dgs", "verdict": "ok", "commands": [], "findings": []}
    assert f"--data '{folder}'" in found["nerfstudio"]["commands"][-1]
    assert found["gsplat"]["findings"][0]["rule"] == "factor"


def test_torch_is_not_waited_for(tmp_path: Path) -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from vggt_cli.cli import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "check", str(write(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False"


def test_every_rule_stands_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs/consumers.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| .* \| (.*) \|$", text, re.MULTILINE))
    assert {rule.name: rule.why for rule in RULES}.items() <= rows.items()
