"""Fixtures that several test files share."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("VGGT_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with specifications, golden numbers and photo sets; not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no golden numbers or photo sets at {SHARED} (set VGGT_SHARED)")
    return SHARED


def _devices() -> list[str]:
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    return [name for name in there if there[name]]


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def examples() -> Path:
    """The project's own example photos."""
    return Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features of test photos go into a folder of their own, not into the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VGGT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def _quiet_logger() -> Iterator[None]:
    """Commands that run in this process set up the log: back to what a fresh one has."""
    yield
    logger = logging.getLogger("vggt_cli")
    logger.setLevel(logging.NOTSET)
    logger.handlers = []
