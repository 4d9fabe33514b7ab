import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread

import pytest
import tiny
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from vggt_cli.cli_weights import app
from vggt_cli.errors import WeightsError
from vggt_cli.models import weights

FILE = "/facebook/VGGT-Omega/resolve/main/vggt_omega_1b_512.pt"


@dataclass
class Hub:
    """A server that answers for one file as the Hugging Face hub does."""

    url: str = ""
    content: bytes = b""
    refusal: tuple[int, str] | None = None  # status and X-Error-Code
    announced: str | None = None  # sha256, if not that of the content
    served: int | None = None  # bytes after which the connection is closed
    token: str | None = None  # what a client has to show
    requests: list[str] = field(default_factory=list)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            if self.answer():
                self.wfile.write(hub.content[: hub.served])

        def answer(self) -> bool:
            hub.requests.append(f"{self.command} {self.path}")
            status, code = hub.refusal or (200, "")
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                status, code = 401, "GatedRepo"
            if self.path != FILE:
                status, code = 404, "EntryNotFound"
            self.send_response(status)
            self.send_header("X-Repo-Commit", "0" * 40)
            if status == 200:
                digest = hub.announced or hashlib.sha256(hub.content).hexdigest()
                self.send_header("ETag", f'"{digest}"')
                self.send_header("Content-Length", str(len(hub.content)))
            else:
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
            self.end_headers()
            return status == 200

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    tiny.install(monkeypatch, tmp_path)
    stream = BytesIO()
    torch.save(tiny.state("omega-1b"), stream)
    hub = Hub(content=stream.getvalue())
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    point_to(f"http://127.0.0.1:{server.server_port}", hub, monkeypatch)
    yield hub
    server.shutdown()
    server.server_close()


def point_to(url: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when a process starts."""
    hub.url = url
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client tries again
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refused(words: str, offline: bool = False) -> WeightsError:
    """The error of a fetch that fails with `words`; nothing is there afterwards."""
    with pytest.raises(WeightsError, match=words) as caught:
        weights.fetch("omega-1b-512", offline)
    assert weights.find("omega-1b-512") is None
    return caught.value


def test_fetched_weights_are_checked_recorded_and_not_fetched_again(hub: Hub) -> None:
    told: list[int] = []
    path = weights.fetch("omega-1b-512", progress=lambda done, total: told.append(done))
    assert path.read_bytes() == hub.content
    assert told == [len(hub.content)]
    assert weights.find("omega-1b-512") == path
    assert weights.load("omega-1b-512", torch.device("cpu"), torch.float32)[1].path == path
    assert weights.verify("omega-1b-512") == hashlib.sha256(hub.content).hexdigest()
    asked = len(hub.requests)
    hub.refusal = (500, "")
    assert weights.fetch("omega-1b-512", offline=True) == path
    assert len(hub.requests) == asked


def test_a_file_that_another_tool_downloaded_is_found_with_its_hash(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = weights.fetch("omega-1b-512")
    monkeypatch.setenv("VGGT_HOME", str(tmp_path / "another"))
    assert weights.find("omega-1b-512") == path
    assert weights.identify(path)[0].name == "omega-1b-512"
    changed = bytearray(hub.content)
    changed[len(changed) // 2] ^= 1
    path.resolve().write_bytes(changed)
    with pytest.raises(WeightsError, match="changed since it was recorded"):
        weights.load("omega-1b-512", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("status", [401, 403])
def test_gated_weights_name_the_page_and_the_way_to_log_in(hub: Hub, status: int) -> None:
    hub.refusal = (status, "GatedRepo")
    hint = refused("no access to omega-1b-512").hint
    assert f"{hub.url}/facebook/VGGT-Omega" in hint
    assert "HF_TOKEN" in hint
    assert "hf auth login" in hint


def test_the_token_opens_gated_weights(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "secret"
    refused("no access to omega-1b-512")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert weights.fetch("omega-1b-512").read_bytes() == hub.content


@pytest.mark.parametrize("code", ["EntryNotFound", "RepoNotFound"])
def test_a_file_that_the_hub_does_not_have_is_named(hub: Hub, code: str) -> None:
    hub.refusal = (404, code)
    error = refused("not on the hub: facebook/VGGT-Omega/vggt_omega_1b_512.pt")
    assert "vggt weights import FILE --as omega-1b-512" in error.hint


def test_an_answer_that_means_nothing_is_passed_on(hub: Hub) -> None:
    hub.refusal = (503, "")
    assert hub.url in refused("cannot download omega-1b-512: .*503").hint


def test_without_a_network_the_mirror_and_the_import_are_named(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to("http://127.0.0.1:9", hub, monkeypatch)
    hint = refused("cannot download omega-1b-512: .*refused").hint
    assert "HF_ENDPOINT" in hint
    assert "vggt weights import" in hint


def test_a_connection_that_breaks_again_and_again_is_an_error(hub: Hub) -> None:
    hub.served = len(hub.content) // 2
    refused("cannot download omega-1b-512: .+")


def test_offline_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("offline, and not on this machine: omega-1b-512", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("offline, and not on this machine: omega-1b-512")
    assert not hub.requests


def test_a_download_with_another_hash_than_announced_is_refused(hub: Hub) -> None:
    hub.announced = "0" * 64
    refused("changed since it was recorded")
    hub.announced = None
    assert weights.fetch("omega-1b-512").read_bytes() == hub.content


def test_a_download_of_another_network_is_refused(hub: Hub) -> None:
    stream = BytesIO()
    torch.save(tiny.state("vggt-1b"), stream)
    hub.content = stream.getvalue()
    refused("does not fit omega-1b-512")


def test_mini_is_never_fetched(hub: Hub) -> None:
    with pytest.raises(WeightsError, match="comes with the tool: mini"):
        weights.fetch("mini")
    assert not hub.requests


def test_the_command_says_the_licence_first_and_prints_the_path(hub: Hub) -> None:
    done = CliRunner().invoke(app, ["fetch", "omega-1b-512"])
    assert done.stdout == f"{weights.find('omega-1b-512')}\n"
    assert "FAIR Noncommercial Research License v1" in done.stderr


def test_a_fresh_process_honours_the_variables_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.refusal = (401, "GatedRepo")
    command = [sys.executable, "-m", "vggt_cli", "weights", "fetch", "omega-1b-512"]
    away = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "VGGT_HOME": str(tmp_path)}
    for more, words in (
        ({}, f"{hub.url}/facebook/VGGT-Omega"),
        ({"HF_HUB_OFFLINE": "1"}, "offline"),
    ):
        done = subprocess.run(
            command, env=os.environ | away | more, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (4, "")
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert [request for request in hub.requests if FILE in request] == [f"HEAD {FILE}"]
