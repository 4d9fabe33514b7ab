"""One file of weights: whether it is whole, what it holds, and the network it becomes."""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vggt_cli.errors import WeightsError
from vggt_cli.models.layers import to_compute
from vggt_cli.models.networks import CONFIGS, Config, Network, build

KINDS = {".safetensors": "safetensors", ".pt": "PyTorch", ".pth": "PyTorch"}
AGAIN = "it is truncated or damaged: fetch or copy it again"


@dataclass(frozen=True)
class Checkpoint:
    """An open file; tensors stay on disk until `tensor` is called, and then are memory-mapped."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    tensor: Callable[[str], Tensor]

    def config(self, name: str) -> Config:
        """CONFIGS[name], with the numbers that the file itself carries under "config"."""
        config = CONFIGS[name]
        try:
            stored: dict[str, Any] = json.loads(self.metadata.get("config", "{}"))
        except ValueError:
            return config  # another tool's words
        if not stored.keys() <= {field.name for field in fields(config)}:
            return config  # another network's numbers; the keys will tell
        return replace(config, **{k: _frozen(value) for k, value in stored.items()})

    def differences(self, config: Config) -> list[str]:
        """What keeps the file from being loaded into the network of `config`, one line each."""
        expected = shapes(config)
        return [
            *(
                f"{key} is {list(self.shapes[key])} instead of {list(shape)}"
                for key, shape in expected.items()
                if self.shapes.get(key, shape) != shape
            ),
            *(f"{key} is missing" for key in expected if key not in self.shapes),
            *(f"{key} is unknown" for key in self.shapes if key not in expected),
        ]

    def network(self, config: Config, device: torch.device, dtype: torch.dtype) -> Network:
        """The network of `config` with these weights, ready to predict.

        The aggregator's matrices are in `dtype`, everything else in float32. Tensors are
        converted one by one, and those that `config` has no place for are never read.
        Raises WeightsError if values are not floating point.
        """
        network = skeleton(config)
        to_compute(network.aggregator, dtype)  # no values yet: sets what each becomes below
        state = {
            key: self._floating(key).to(device, place.dtype)
            for key, place in network.state_dict().items()
        }
        network.load_state_dict(state, assign=True)
        return network.eval().requires_grad_(False)

    def _floating(self, key: str) -> Tensor:
        tensor = self.tensor(key)
        if not tensor.is_floating_point():
            raise WeightsError(
                f"not floating point: {key} in {self.path} is {tensor.dtype}",
                hint="quantised files are not read; take the published one",
            )
        return tensor


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@cache
def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a file for `config` holds."""
    return {key: tuple(value.shape) for key, value in skeleton(config).state_dict().items()}


def skeleton(config: Config) -> Network:
    """The network of `config` without memory for its values."""
    with torch.device("meta"):
        return build(config)


def read(path: Path) -> Checkpoint:
    """The file of weights at `path`, opened but not read.

    Raises WeightsError if it is damaged, not what its name says, or needs code to be unpickled.
    """
    kind = _kind(path)
    if KINDS.get(path.suffix.lower()) != kind:
        ending = next(ending for ending in KINDS if KINDS[ending] == kind)
        raise WeightsError(
            f"{kind} file under another name: {path}", hint=f"rename it to end in {ending}"
        )
    return _read_safetensors(path) if kind == "safetensors" else _read_pytorch(path)


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return "PyTorch"
    if start[8:] == b"{":
        return "safetensors"
    raise WeightsError(
        f"not a file of weights: {path}",
        hint="neither safetensors nor PyTorch (1.6 or later); a login page or pointer saved "
        "instead of the file looks like this too",
    )


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        file: Any = safe_open(path, "pt")
    except SafetensorError as error:
        raise WeightsError(f"damaged file of weights: {path} ({error})", hint=AGAIN) from error
    found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return Checkpoint(path, found, file.metadata() or {}, file.get_tensor)


def _read_pytorch(path: Path) -> Checkpoint:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"holds more than tensors: {path}",
            hint="such a file can run code when opened and is refused; save its state dict alone",
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError) as error:
        raise WeightsError(f"damaged file of weights: {path}", hint=AGAIN) from error
    if isinstance(state, dict):
        state = state.get("model", state)  # training checkpoints wrap it
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(
            f"no state dict: {path}", hint='expected names and tensors, or those under "model"'
        )
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    return Checkpoint(path, found, {}, state.__getitem__)
