"""The real command: exit codes, words, what is on stdout, and nothing left behind."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_video import film

from vggt_cli import cli
from vggt_cli.formats import colmap_read
from vggt_cli.formats.colmap import pycolmap
from vggt_cli.reconstruction import pipeline

TIMEOUT = 120


def vggt(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "vggt_cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=environment,
        **options,
    )


@pytest.fixture(scope="module")
def pair(examples: Path) -> Path:
    return examples / "motorcycle"


@pytest.fixture(scope="module")
def done(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A finished scene of the example pair, with stdout and stderr of the run."""
    out = tmp_path_factory.mktemp("scenes") / "scene"
    run = vggt("reconstruct", pair, "--out", out, "--model", "mini", "--format", "colmap-txt",
               "--save-tokens", "--points", 5000)  # fmt: skip
    assert run.returncode == 0, run.stderr
    return out, run.stdout, run.stderr


def test_the_scene_is_printed_and_nothing_else(done: tuple[Path, str, str]) -> None:
    out, stdout, stderr = done
    assert stdout == f"{out}\n"
    stages = [line for line in stderr.splitlines() if not line.startswith("cameras ")]
    assert stages == [
        "load images", "load weights", "predict", "find tracks", "find features", "match features",
        "refine", "fuse", "diagnose", "write",
    ]  # fmt: skip
    assert {path.name for path in out.iterdir()} == {
        "images", "sparse", "points.ply", "confidence", "depth", "report.json", "scene.html",
        "tokens.npz",
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["scene"]


def test_what_was_written_is_broken_for_no_other_program(done: tuple[Path, str, str]) -> None:
    run = vggt("check", done[0])
    assert run.returncode == 0, run.stdout
    assert "broken" not in run.stdout
    assert re.search(r"3DGS +ok\n", run.stdout)


@pytest.mark.colmap
def test_pycolmap_reads_the_scene(done: tuple[Path, str, str]) -> None:
    found = pycolmap().Reconstruction(done[0] / "sparse/0")
    assert [image.name for _, image in sorted(found.images.items())] == ["left.png", "right.png"]
    assert 100 < found.num_points3D() <= 5000
    assert found.images[1].cam_from_world().matrix().tolist() == torch.eye(3, 4).tolist()
    assert found.num_cameras() == 1
    camera = found.cameras[1]
    assert camera.model.name == "PINHOLE"
    assert (camera.width, camera.height) == (741, 500)
    assert (camera.params[2], camera.params[3]) == (370.5, 250)


def test_the_report_names_the_weights_and_the_stages(done: tuple[Path, str, str]) -> None:
    report = json.loads((done[0] / "report.json").read_text())
    manifest = json.loads((Path(__file__).parents[1] / "weights/MANIFEST.json").read_text())
    assert report["model"]["model"] == "mini"
    assert report["model"]["sha256"] == manifest["mini"]["sha256"]
    stages = ["load images", "load weights", "predict", "find tracks", "refine", "fuse", "diagnose"]
    assert list(report["seconds"]) == stages
    assert report["options"]["points"] == 5000


def test_the_same_input_gives_the_same_scene(
    done: tuple[Path, str, str], pair: Path, tmp_path: Path
) -> None:
    again = vggt(
        "reconstruct", pair, "-o", tmp_path / "scene", "--model", "mini", "--points", 5000, "-q"
    )
    assert again.stderr == ""
    for name in ("sparse/0/points3D.bin", "sparse/0/images.bin", "points.ply", "scene.html"):
        assert (tmp_path / "scene" / name).read_bytes() == (done[0] / name).read_bytes(), name


def test_json_is_one_object_on_stdout(pair: Path, tmp_path: Path) -> None:
    run = vggt("reconstruct", pair, "-o", tmp_path / "s", "--model", "mini", "--json")
    report = json.loads(run.stdout)
    assert report["scene"] == str(tmp_path / "s")
    assert len(report["images"]) == 2


def test_a_dry_run_says_the_plan_and_writes_nothing(pair: Path, tmp_path: Path) -> None:
    run = vggt("reconstruct", pair, "-o", tmp_path / "s", "--model", "mini", "--dry-run", "--json")
    plan = json.loads(run.stdout)
    assert plan["images"] == 2
    assert plan["model"] == "mini"
    assert not (tmp_path / "s").exists()
    assert (
        "images: 2\n"
        in vggt("reconstruct", pair, "-o", tmp_path / "s", "--model", "mini", "--dry-run").stdout
    )


def test_a_plan_says_memory_and_seconds_and_refuses_what_cannot_fit(
    pair: Path, tmp_path: Path
) -> None:
    asked = ("reconstruct", pair, "-o", tmp_path / "s", "--model", "mini", "--dry-run")
    plan = json.loads(vggt(*asked, "--json").stdout)
    assert (plan["window"], plan["windows"]) == (2, 1)
    assert 10**8 < plan["peak_memory_bytes"] < 10**10
    assert plan["total_seconds"] == pytest.approx(sum(plan["seconds"].values()), abs=0.5)
    words = vggt(*asked).stdout
    assert "peak memory: " in words
    assert "find tracks" in words
    assert "find tracks" not in vggt(*asked, "--refine", "none").stdout
    refused(vggt(*asked, "--max-memory", "100MB"), 5, "2 images need", "even 2 at a time", "hint:")
    refused(vggt(*asked, "--max-memory", "plenty"), 2, "no amount of memory: plenty")


def test_windows_join_what_the_network_does_not_see_at_once(examples: Path, tmp_path: Path) -> None:
    run = vggt("reconstruct", examples / "rendered", "-o", tmp_path / "s", "--model", "mini",
               "--window", 5, "--refine", "none", "--json")  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert len(report["images"]) == 8
    assert report["windows"]["windows"] >= 2
    assert all(joint["residual"] < 0.2 for joint in report["windows"]["joints"])
    assert "frames in" in run.stderr


def test_numbers_of_another_kind_and_fewer_keys_are_as_asked(pair: Path, tmp_path: Path) -> None:
    run = vggt("reconstruct", pair, "-o", tmp_path / "s", "--model", "mini", "--refine", "none",
               "--precision", "int8", "--fewer-keys", "--json")  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["dtype"] == "int8"
    assert report["options"]["fewer_keys"] is True


def test_another_resolution_is_allowed_and_warned_about(pair: Path, tmp_path: Path) -> None:
    run = vggt("reconstruct", pair, "-o", tmp_path / "s", "--model", "mini", "--resolution", 96)
    assert run.returncode == 0
    assert "warning: --resolution 96" in run.stderr
    report = json.loads((tmp_path / "s/report.json").read_text())
    assert sum("--resolution 96" in words for words in report["warnings"]) == 1


# Errors: one line what, one line how; no traceback.


def refused(run: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert run.returncode == code, run.stderr
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in run.stderr


def test_wrong_usage_is_2(tmp_path: Path, pair: Path) -> None:
    refused(vggt("reconstruct", pair), 2, "--out")
    refused(vggt("reconstruct", pair, "--out", tmp_path / "s", "--points", 0), 2, "--points")
    refused(vggt("reconstruct", pair, "--out", tmp_path / "s", "--camera", "fisheye"), 2, "fisheye")
    refused(vggt("reconstrukt"), 2, "reconstrukt")


def test_bad_input_is_2(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "s", "--model", "mini")
    refused(vggt("reconstruct", tmp_path / "none", *out), 2, "error: no such folder", "hint: ")
    (tmp_path / "empty").mkdir()
    refused(vggt("reconstruct", tmp_path / "empty", *out), 2, "error: no images in")
    (tmp_path / "empty/x.png").write_bytes(b"not a png")
    refused(vggt("reconstruct", tmp_path / "empty", *out), 2, "x.png")
    refused(vggt("reconstruct", "-", *out, input=""), 2, "standard input")
    assert not (tmp_path / "s").exists()


def test_an_unknown_device_is_2(pair: Path, tmp_path: Path) -> None:
    for device in ("tpu", "cpu:1", "mps" if not torch.backends.mps.is_available() else "xpu"):
        run = vggt("reconstruct", pair, "-o", tmp_path / "s", "--device", device)
        refused(run, 2, f": {device}", "hint: ")


def test_an_unreadable_photo_is_left_out_or_stops_the_run(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "in")
    (tmp_path / "in/broken.png").write_bytes(b"")
    arguments = ("reconstruct", tmp_path / "in", "-o", tmp_path / "s", "--model", "mini")
    refused(vggt(*arguments, "--strict"), 2, "broken.png")
    run = vggt(*arguments)
    assert run.returncode == 0
    assert "warning: left out" in run.stderr
    report = json.loads((tmp_path / "s/report.json").read_text())
    assert [photo["name"] for photo in report["left_out"]] == ["broken.png"]


def test_existing_output_is_2_before_any_work(
    done: tuple[Path, str, str], pair: Path, tmp_path: Path
) -> None:
    run = vggt("reconstruct", pair, "--out", done[0])
    refused(run, 2, "error: output exists", "--overwrite")
    assert "load" not in run.stderr
    shutil.copytree(done[0], tmp_path / "s")
    replaced = vggt("reconstruct", pair, "-o", tmp_path / "s", "--model", "mini", "--overwrite")
    assert replaced.returncode == 0
    assert not (tmp_path / "s/tokens.npz").exists()


def test_weights_and_licence_are_4(pair: Path, tmp_path: Path) -> None:
    arguments = ("reconstruct", pair, "-o", tmp_path / "s", "--offline")
    environment = {**os.environ, "VGGT_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path)}
    for words, *more in (
        ("not on this machine", "--model", "vggt-1b"),
        ("unknown weights", "--model", "vggt-2b"),
        ("commercial", "--model", "omega-1b-512", "--require-commercial"),
    ):
        run = subprocess.run(
            [sys.executable, "-m", "vggt_cli", *map(str, (*arguments, *more))],
            capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment,
        )  # fmt: skip
        refused(run, 4, words, "hint: ")


def small(pair: Path, folder: Path) -> Path:
    """The example pair at a quarter of its size."""
    folder.mkdir()
    for path in pair.glob("*.png"):
        with Image.open(path) as photo:
            photo.resize((185, 125)).save(folder / path.name)
    return folder


def report_of(*arguments: object) -> dict[str, Any]:
    """What `vggt reconstruct` with mini and without refinement reports."""
    run = vggt("reconstruct", *arguments, "--model", "mini", "--refine", "none", "--json", "-q")
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_masked_pixels_become_no_points_and_masks_go_out(pair: Path, tmp_path: Path) -> None:
    photos = small(pair, tmp_path / "in")
    (tmp_path / "masks").mkdir()
    keep = Image.new("L", (185, 125))
    keep.paste(255, (0, 0, 185, 60))
    for name in ("left.png", "right.png.png"):
        keep.save(tmp_path / "masks" / name)
    out = tmp_path / "s"
    report = report_of(photos, "-o", out, "--masks", tmp_path / "masks", "--format", "nerfstudio")
    assert report["left_out"] == report["warnings"] == []
    tracks = colmap_read.read(out / "sparse/0").tracks
    assert len(tracks.xy) > 100
    assert float(tracks.xy[:, 1].max()) <= 60
    names = {"left.png", "left.png.png", "right.png", "right.png.png"}
    assert {path.name for path in (out / "masks").iterdir()} == names
    frames = json.loads((out / "transforms.json").read_text())["frames"]
    assert [frame["mask_path"] for frame in frames] == ["masks/left.png", "masks/right.png"]
    run = vggt("reconstruct", photos, "-o", tmp_path / "t", "--masks", tmp_path / "none")
    refused(run, 2, "no such folder of masks", "a.jpg.png")


def test_frames_of_a_video_are_as_many_as_asked(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.mp4", [8.0 * i for i in range(40)])  # two seconds
    report = report_of(path, "-o", tmp_path / "s", "--fps", 2)
    moments = [image["video"]["seconds"] for image in report["images"]]
    assert [int(2 * moment) for moment in moments] == [0, 1, 2, 3]
    report = report_of(path, "-o", tmp_path / "t", "--frames", 2)
    assert [image["video"]["file"] for image in report["images"]] == ["clip.mp4"] * 2
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "photos/a.png")
    run = vggt("reconstruct", tmp_path / "photos", "-o", tmp_path / "u", "--frames", 2)
    refused(run, 2, "--fps and --frames are of videos")


def test_poses_that_are_kept_are_those_of_the_scene(pair: Path, tmp_path: Path) -> None:
    photos, poses = small(pair, tmp_path / "in"), tmp_path / "transforms.json"
    frames = []
    for name, x in (("left.png", 0.0), ("right.png", 0.19)):  # rectified: level and parallel
        matrix = torch.eye(4)
        matrix[0, 3] = x
        frames.append({"file_path": name, "transform_matrix": matrix.tolist()})
    poses.write_text(json.dumps({"frames": frames}))
    known = ("--poses", poses, "--keep-poses", "--scale-from", "poses")
    report = report_of(photos, "-o", tmp_path / "s", *known)
    first, second = (torch.tensor(image["extrinsics"]) for image in report["images"])
    assert report["scale"] == "metric"
    assert torch.allclose(first, torch.eye(3, 4), atol=1e-6)
    assert torch.allclose(second[:, :3], torch.eye(3), atol=1e-6)
    assert torch.allclose(second[:, 3], torch.tensor([-0.19, 0, 0]), atol=1e-5)
    refused(vggt("reconstruct", photos, "-o", tmp_path / "t", "--keep-poses"), 2, "--poses")


def test_photos_of_one_transparent_colour_are_1(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (64, 48), (0, 0, 0, 0)).save(tmp_path / "in/a.png")
    run = vggt("reconstruct", tmp_path / "in", "-o", tmp_path / "s", "--model", "mini")
    refused(run, 1, "no pixel has a usable depth", "confidence")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on address space")
def test_out_of_memory_is_5(pair: Path, tmp_path: Path) -> None:
    # Without --window it would be refused before the work.
    arguments = ("-o", tmp_path / "s", "--model", "mini", "--resolution", 1600, "--window", 2)
    for gigabytes in (1.5, 2):  # too little for the network; too little for the points

        def limit(most: int = int(gigabytes * 2**30)) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

        run = vggt("reconstruct", pair, *arguments, preexec_fn=limit)
        refused(run, 5, "error: out of memory", "2 images of", "--resolution")
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_70_and_keeps_its_traceback(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("never")

    monkeypatch.setattr(pipeline, "reconstruct", broken)
    monkeypatch.setattr(sys, "argv", ["vggt", "reconstruct", str(pair), "-o", str(tmp_path / "s")])
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stop:
        cli.main()
    for number, handler in before.items():
        signal.signal(number, handler)
    assert stop.value.code == 70
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert "please report" in stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_130_and_leaves_nothing(pair: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "in").mkdir()
    for i in range(40):
        shutil.copy(pair / "left.png", tmp_path / f"in/{i}.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "vggt_cli", "reconstruct", tmp_path / "in", "-o", tmp_path / "s",
         "--model", "mini"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("predict"):
            break
    time.sleep(0.2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.endswith("interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_doubly_verbose_errors_have_a_traceback(tmp_path: Path) -> None:
    run = vggt("reconstruct", tmp_path / "none", "-o", tmp_path / "s", "-vv")
    assert run.returncode == 2
    assert "Traceback" in run.stderr


def test_the_version_is_said() -> None:
    assert vggt("--version").stdout.startswith("vggt 0.")
