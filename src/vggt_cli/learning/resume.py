"""The checkpoint in a run's folder: written whole, read with care."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vggt_cli.errors import InputError, OutputError

NAMED = 5  # differences that an error spells out


def save(path: Path, numbers: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes `state` and the `numbers` of its run beside `path`, then puts it in its place.

    Raises OutputError if that fails; what was there before is then still there.
    """
    draft = path.with_suffix(".new")
    try:
        torch.save({"numbers": dict(numbers), **state}, draft)
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        draft.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write: {path} ({error})", hint="free some space; the same command goes on"
        ) from error


def load(path: Path, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The state that was saved at `path`, on the CPU; empty if there is none.

    Raises InputError if it is damaged, no checkpoint, or of a run with other `numbers`.
    """
    if not path.exists():
        return {}
    anew = "delete it to begin anew, or choose another --out"
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise InputError(f"not a checkpoint of a run: {path}", hint=anew) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError) as error:
        raise InputError(f"damaged checkpoint: {path}", hint=anew) from error
    if not isinstance(stored, dict) or "numbers" not in stored:
        raise InputError(f"not a checkpoint of a run: {path}", hint=anew)
    state: dict[str, Any] = stored
    there = state.pop("numbers")
    unlike = [key for key in {**there, **numbers} if there.get(key) != numbers.get(key)]
    if unlike:
        words = [f"{key} is {there.get(key)}, not {numbers.get(key)}" for key in unlike[:NAMED]]
        rest = f", and {len(unlike) - NAMED} more" if len(unlike) > NAMED else ""
        raise InputError(
            f"another run is in {path.parent}: there {', '.join(words)}{rest}",
            hint="give the same options to go on with it, or choose another --out",
        )
    return state
