"""A headless Chromium, spoken to in its DevTools protocol over a pipe: no library needed."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--window-size=1000,700",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


class Browser:
    """One tab, what it asked for (`requests`) and what went wrong in it (`complaints`)."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands = os.fdopen(commands, "wb", buffering=0)
        self.answers = os.fdopen(answers, "rb")
        self.session: str | None = None
        self.number = 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Network", "Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a command; events that come before it are looked through."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        data = b""
        while not data.endswith(b"\0"):
            waiting = self.answers.peek()
            assert waiting, "the browser ended"
            data += self.answers.read(waiting.find(b"\0") + 1 or len(waiting))
        event: dict[str, Any] = json.loads(data[:-1])
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(parameters))
        return event

    def open(self, path: Path) -> None:
        """Waits until the page of this project has drawn, or has said why it cannot."""
        self.requests.clear()
        self.complaints.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.do(
            "new Promise(done => { const look = () => document.readyState === 'complete' && "
            "(document.body.dataset.drawn || !document.getElementById('message').hidden) ? "
            "requestAnimationFrame(() => done()) : setTimeout(look, 50); look(); })"
        )

    def do(self, script: str) -> Any:
        """The value of a script, awaited."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """kind: Moved, Pressed, Released or Wheel."""
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def click(self, x: float, y: float) -> None:
        for kind in ("Pressed", "Released"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def picture(self) -> Image.Image:
        """What is on the screen once it has been drawn anew."""
        self.do("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        data = self.call("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def find() -> str:
    """A Chromium on this machine; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no {', '.join(NAMES)} on this machine: apt install chromium")
    return found


@contextlib.contextmanager
def chromium(folder: Path, *flags: str) -> Iterator[Browser]:
    """A browser with its profile in `folder`, which ends with the block."""
    from_us, commands = os.pipe()
    answers, to_us = os.pipe()
    # Chromium reads commands from file 3 and answers on file 4; which ours are, only a shell moves.
    script = f'exec "$@" 3<&{from_us} 4>&{to_us}'
    command = ["bash", "-c", script, "bash", find(), *FLAGS, *flags, f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        command,
        pass_fds=(from_us, to_us),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(folder)},
    )
    os.close(from_us)
    os.close(to_us)
    try:
        browser = Browser(commands, answers)
        try:
            yield browser
        finally:
            browser.commands.close()
            browser.answers.close()
    finally:
        process.terminate()
        process.wait(timeout=30)
