"""Many scenes: read, made, resumed, killed, and never one because of another."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import killed_batch
import pytest
from PIL import Image
from test_cli import refused, vggt
from typer.testing import CliRunner, Result

from vggt_cli import cli_batch
from vggt_cli.cli import app
from vggt_cli.errors import InputError, OutputError
from vggt_cli.formats import scene_read
from vggt_cli.formats.claims import claimed
from vggt_cli.formats.images import Loaded
from vggt_cli.models import weights
from vggt_cli.reconstruction import batch, inputs, pipeline
from vggt_cli.reconstruction.batch import How, Job
from vggt_cli.reconstruction.settings import Options

USUAL = Options(model="mini", device="cpu", refine="none", points=500)


@pytest.fixture
def photos(examples: Path, tmp_path: Path) -> Path:
    """Two small photos."""
    (tmp_path / "photos").mkdir()
    for side in ("left", "right"):
        with Image.open(examples / f"motorcycle/{side}.png") as photo:
            photo.resize((96, 64)).save(tmp_path / f"photos/{side}.png")
    return tmp_path / "photos"


def job(photos: Path, out: Path, **options: Any) -> Job:
    return Job(str(photos), out, replace(USUAL, **options))


# Jobs.


def test_lines_are_jobs_with_options_of_their_own() -> None:
    more = {"points": 7, "confidence": 5, "save_tokens": True}
    second_line = {"input": "b", "out": "2", "format": ["colmap-txt"], "html": False, **more}
    lines = ['{"input": "a", "out": "1"}', "", json.dumps(second_line)]
    first, second = batch.read_jobs(lines, USUAL)
    assert first == Job("a", Path("1"), USUAL)
    options = replace(USUAL, points=7, confidence=5, save_tokens=True)
    assert second == Job("b", Path("2"), options, ("colmap-txt", "tokens"), False)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["no"], "line 1 is no JSON"),
        (["", "[1]"], "line 2 is no object"),
        (['{"input": "a"}'], "line 1 lacks input or out"),
        (['{"input": "a", "out": "b", "pionts": 3}'], "no such option: pionts"),
        (['{"input": "a", "out": "b", "points": "3"}'], 'points cannot be "3"'),
        (['{"input": "a", "out": "b", "points": true}'], "points cannot be true"),
        (['{"input": "a", "out": "b", "points": 0}'], "points cannot be 0"),
        (['{"input": "a", "out": "b", "confidence": 100}'], "confidence cannot be 100"),
        (['{"input": "a", "out": "b", "fps": "2"}'], 'fps cannot be "2"'),
        (['{"input": "a", "out": "b", "masks": 2}'], "masks cannot be 2"),
        (['{"input": "a", "out": "b", "refine": "all"}'], 'refine cannot be "all"'),
        (['{"input": "a", "out": "b", "camera": "one"}'], 'camera cannot be "one"'),
        (['{"input": "a", "out": "b", "format": "glb"}'], "format is a list"),
        (['{"input": "a", "out": "b", "format": 3}'], "format is a list"),
        (['{"input": "a", "out": "b", "html": "no"}'], "html is true or false"),
        (['{"input": "a", "out": "b", "format": ["obj"]}'], "no such format: obj"),
        (['{"input": "a", "out": "b"}', '{"input": "c", "out": "./b"}'], "lines 1 and 2 write"),
    ],
)
def test_a_line_that_cannot_be_is_named(lines: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        batch.read_jobs(lines, USUAL)


def test_a_line_ends_where_json_lines_end_it(tmp_path: Path) -> None:
    names = ["a\u2028b", "a\x85b"]
    lines = [json.dumps({"input": n, "out": n[::-1]}, ensure_ascii=False) for n in names]
    (tmp_path / "jobs.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    jobs = batch.read_jobs(cli_batch._lines(str(tmp_path / "jobs.jsonl")), USUAL)
    assert [one.source for one in jobs] == names


def test_a_job_for_another_folder_takes_its_files_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("masks", "poses", "mini"):
        Path(name).mkdir()
    Path("own.safetensors").touch()
    options = {"masks": "masks", "poses": "poses", "intrinsics": "9,9,5,5"}
    far = batch._absolute(job(Path("photos"), Path("out"), **options))
    assert (far.source, far.out) == (str(tmp_path / "photos"), tmp_path / "out")
    assert far.options.masks == str(tmp_path / "masks")
    assert far.options.poses == str(tmp_path / "poses")
    assert (far.options.intrinsics, far.options.model) == ("9,9,5,5", "mini")
    own = batch._absolute(job(Path("photos"), Path("out"), model="own.safetensors"))
    assert own.options.model == str(tmp_path / "own.safetensors")


def test_parts_of_the_jobs_make_up_all_of_them() -> None:
    jobs = [Job(str(i), Path(str(i)), USUAL) for i in range(7)]
    parts = [batch.shard(jobs, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(j.source for part in parts for j in part) == [str(i) for i in range(7)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(InputError, match="no part"):
            batch.shard(jobs, wrong)


# One after the other.


def test_a_failure_is_a_line_and_the_rest_goes_on_with_one_network(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = weights.load

    def counted(model: str, *arguments: Any) -> Any:
        loads.append(model)
        return load(model, *arguments)

    monkeypatch.setattr(weights, "load", counted)
    jobs = [
        job(photos, tmp_path / "1"),
        job(tmp_path / "nothing", tmp_path / "2"),
        job(photos, tmp_path / "3", points=400),
    ]
    lines = list(batch.run(jobs, How()))
    assert [line["ok"] for line in lines] == [True, False, True]
    assert lines[1]["exit_code"] == 2
    assert "nothing" in lines[1]["error"]
    assert loads == ["mini"]
    assert scene_read.is_ours(tmp_path / "3")
    assert not (tmp_path / "2").exists()


def test_our_own_mistakes_are_lines_too(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(pipeline, "reconstruct", broken)
    (line,) = batch.run([job(photos, tmp_path / "1")], How())
    assert (line["ok"], line["exit_code"]) == (False, 70)
    assert "ZeroDivisionError: oh" in line["error"]


def test_what_is_done_is_left_and_what_changed_is_made_again(photos: Path, tmp_path: Path) -> None:
    def skipped(one: Job) -> bool:
        (line,) = batch.run([one], How(resume=True))
        assert line["ok"], line
        return bool(line["skipped"])

    first = job(photos, tmp_path / "scene")
    assert not skipped(first)
    before = (tmp_path / "scene/report.json").read_bytes()
    assert skipped(first)
    assert skipped(replace(first, options=replace(first.options, offline=True)))
    assert (tmp_path / "scene/report.json").read_bytes() == before
    assert not skipped(replace(first, options=replace(first.options, seed=1)))
    assert not skipped(replace(first, options=replace(first.options, seed=1), formats=("glb",)))
    assert not skipped(replace(first, html=False))
    assert skipped(replace(first, html=False))
    assert not skipped(replace(first, html=True))  # the page is missing
    with Image.open(photos / "left.png") as photo:
        turned = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned.save(photos / "left.png")
    assert not skipped(first)
    (photos / "left.png").rename(photos / "links.png")
    assert not skipped(first)


def test_photos_are_the_same_by_whatever_way_they_are_found(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ways = ["../photos", "../photos/*.png", str(photos), str(photos / "../photos/*")]
    assert len({pipeline.content_key(way, USUAL) for way in ways}) == 1


def test_a_photo_that_changes_during_the_work_counts_as_it_was(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pipeline.content_key(str(photos), USUAL)
    read = inputs.read

    def reads_late(*arguments: Any) -> Loaded:
        loaded = read(*arguments)
        Image.new("RGB", (96, 64)).save(photos / "left.png")
        return loaded

    monkeypatch.setattr(inputs, "read", reads_late)
    assert pipeline.reconstruct(str(photos), USUAL).made_by.content == before
    assert pipeline.content_key(str(photos), USUAL) != before


def test_a_mask_of_another_photo_is_another_content(photos: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (96, 64)).save(masks / "left.png")
    with_masks = replace(USUAL, masks=str(masks))
    before = pipeline.content_key(str(photos), with_masks)
    (masks / "left.png").rename(masks / "right.png")
    assert pipeline.content_key(str(photos), with_masks) != before
    (masks / "right.png").rename(masks / "left.png")
    masks.rename(tmp_path / "elsewhere")
    masks.mkdir()
    (masks / "linked").symlink_to(tmp_path / "elsewhere")
    assert pipeline.content_key(str(photos), with_masks) != before
    elsewhere = replace(USUAL, masks=str(tmp_path / "elsewhere"))
    assert pipeline.content_key(str(photos), elsewhere) == before


def test_without_resume_or_overwrite_a_scene_is_not_touched(photos: Path, tmp_path: Path) -> None:
    one = job(photos, tmp_path / "scene")
    assert [line["ok"] for line in batch.run([one, one], How())] == [True, False]
    (line,) = batch.run([one], How(overwrite=True))
    assert line["ok"]
    assert not line["skipped"]


# One run for a folder.


def test_two_runs_on_one_folder_refuse_each_other(tmp_path: Path) -> None:
    with claimed(tmp_path / "scene", tmp_path / "locks"):
        with (
            pytest.raises(OutputError, match="another run"),
            claimed(tmp_path / "scene", tmp_path / "locks"),
        ):
            pass
        with claimed(tmp_path / "other", tmp_path / "locks"):
            pass
    with claimed(tmp_path / "scene", tmp_path / "locks"):
        pass


def test_what_a_killed_run_left_is_cleared_and_its_scene_comes_back(tmp_path: Path) -> None:
    for name in (".scene.abcd1234", ".scene.x.abcd1234", ".scene.abcd12345", ".scene.abcd123_.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".scene.abcd123_.old/report.json").touch()
    with claimed(tmp_path / "scene", tmp_path / "locks"):
        assert (tmp_path / "scene/report.json").exists()
    left = {path.name for path in tmp_path.iterdir()} - {"locks"}
    assert left == {"scene", ".scene.x.abcd1234", ".scene.abcd12345"}  # not drafts of this scene


def test_locks_that_cannot_be_written_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"cannot write: .*file/locks") as caught,
        claimed(tmp_path / "scene", tmp_path / "file/locks"),
    ):
        pass
    assert "VGGT_HOME" in caught.value.hint


def test_a_link_to_a_folder_stays_one_and_is_claimed_with_it(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/scene").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/scene")
    with (
        claimed(tmp_path / "link", tmp_path / "locks"),
        pytest.raises(OutputError, match="another run"),
        claimed(tmp_path / "disk/scene", tmp_path / "locks"),
    ):
        pass
    for _ in range(2):
        (line,) = batch.run([job(photos, tmp_path / "link")], How(overwrite=True))
        assert line["ok"], line
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk/scene/report.json").is_file()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["scene"]


# Side by side.


def _work(one: Job, how: How) -> dict[str, Any]:
    """What a worker does in these tests; the name says how it ends."""
    if one.source == "dies":
        time.sleep(0.3)
        os._exit(9)
    return {"input": one.source, "ok": True}


def test_a_process_that_dies_costs_its_own_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_work", _work)
    names = ["a", "dies", "b", "c", "d"]
    jobs = [Job(name, tmp_path / name, USUAL) for name in names]
    lines = list(batch.run(jobs, How(workers=2)))
    assert sorted((line["input"], line["ok"]) for line in lines) == [
        ("a", True), ("b", True), ("c", True), ("d", True), ("dies", False)
    ]  # fmt: skip


def write_jobs(path: Path, photos: Path, count: int) -> Path:
    options = {"refine": "none", "points": 500, "html": False}
    lines = [
        json.dumps({"input": str(photos), "out": str(path.parent / f"s{i}"), "seed": i, **options})
        for i in range(count)
    ]
    path.write_text("\n".join(lines))
    return path


def test_the_command_prints_a_line_each_and_exits_with_3_if_some_failed(
    photos: Path, tmp_path: Path
) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", photos, 2)
    with jobs.open("a") as file:
        file.write('\n{"input": "nowhere", "out": "%s"}\n' % (tmp_path / "s2"))
    run = vggt("batch", jobs, "--model", "mini", "--workers", 2)
    assert run.returncode == 3, run.stderr
    assert "1 of 3 scenes failed" in run.stderr
    lines = {line["out"]: line["ok"] for line in map(json.loads, run.stdout.splitlines())}
    assert lines == {str(tmp_path / f"s{i}"): i < 2 for i in range(3)}
    refused(vggt("batch", tmp_path / "none.jsonl"), 2, "none.jsonl")


def test_a_batch_that_is_killed_and_resumed_makes_the_scenes_of_one_left_alone(
    tmp_path: Path,
) -> None:
    numbers = random.Random(2)
    killed_batch.photographs(tmp_path / "photos", 5, numbers)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    spent = killed_batch.undisturbed(killed_batch.jobs(whole, 5))
    seen = killed_batch.disturbed(killed_batch.jobs(killed, 5), 1, numbers, 2, spent / 5)
    assert seen.kills.total() > 0
    assert seen.faults == []
    assert killed_batch.differences(whole / "scenes", killed / "scenes") == []
    assert killed_batch.differences(whole / "scenes", whole / "scenes/00")  # it sees some


def test_workers_end_with_a_parent_that_is_killed_and_their_scenes_are_free(
    photos: Path, tmp_path: Path
) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", photos, 4)
    command = ("batch", jobs, "--model", "mini", "-q")
    with begun(*command, "--workers", 2) as process:
        assert process.stdout is not None
        process.stdout.readline()  # both are at work
        process.kill()
        process.communicate(timeout=60)  # its end comes when no worker holds the pipe any more
    run = vggt(*command, "--resume")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_workers_leaves_nothing(photos: Path, tmp_path: Path, number: int) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", photos, 6)
    with begun("batch", jobs, "--model", "mini", "--workers", "2", "-q") as process:
        while not list(tmp_path.glob(".s*")):  # a scene is being written
            time.sleep(0.001)
        os.killpg(process.pid, number)  # as a terminal does
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "interrupted\n"
    assert not list(tmp_path.glob(".*"))


def begun(*arguments: object) -> subprocess.Popen[str]:
    """The command in processes of a group of their own."""
    return subprocess.Popen(
        [sys.executable, "-m", "vggt_cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.ray
def test_ray_runs_the_jobs(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: extra `ray`")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # its 15 starves beside any other work
    jobs = write_jobs(tmp_path / "jobs.jsonl", photos, 2)
    with jobs.open("a") as file:
        file.write('\n{"input": "nowhere", "out": "%s"}\n' % (tmp_path / "s2"))
    run = vggt("batch", jobs, "--model", "mini", "--device", "cpu", "--ray", "local", "-q")
    assert run.returncode == 3, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert sorted(line["ok"] for line in lines) == [False, True, True]
    assert all(scene_read.is_ours(tmp_path / f"s{i}") for i in range(2))


# Several inputs of `reconstruct`.


def test_each_of_several_inputs_becomes_a_scene_under_out(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with Image.open(photos / "left.png") as photo:
        photo.save(other / "1.png")

    def reconstruct(*arguments: object) -> Result:
        options = ("--model", "mini", "--device", "cpu", "--refine", "none", "--resume")
        done = CliRunner().invoke(app, ["reconstruct", *map(str, arguments), *options])
        assert done.exit_code == 0, done.output
        return done

    run = reconstruct(photos, other, "--out", tmp_path / "scenes")
    assert run.stdout.split() == [str(tmp_path / f"scenes/{name}") for name in ("photos", "other")]
    before = (tmp_path / "scenes/other/report.json").read_bytes()
    reconstruct(other, "--out", tmp_path / "scenes/other")
    assert (tmp_path / "scenes/other/report.json").read_bytes() == before
    with pytest.raises(InputError, match="two inputs"):
        cli_batch.one_each([str(photos), f"elsewhere/{photos.name}"], tmp_path)
