"""Golden numbers of the networks: reading them, catching intermediates, how close is equal."""

import hashlib
import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vggt_cli.models.mini import Mini
from vggt_cli.models.networks import build
from vggt_cli.models.omega import OmegaConfig
from vggt_cli.models.tracker import TrackConfig
from vggt_cli.models.vggt import VGGT, VGGTConfig

SMALL_OMEGA = OmegaConfig(
    embed_dim=128,
    heads=2,
    encoder_depth=3,
    depth=4,
    registers=4,
    register_blocks=(1,),
    cached_layers=(0, 1, 2, 3),
    features=32,
    level_channels=(32, 48, 64, 64),
    text_head=True,
)
SMALL_VGGT = VGGTConfig(
    trained_grid=5,
    embed_dim=128,
    heads=2,
    encoder_depth=3,
    depth=4,
    cached_layers=(0, 1, 2, 3),
    features=32,
    level_channels=(32, 48, 64, 64),
    tracker=TrackConfig(width=32, hidden=64, depth=2, levels=3, radius=2),
)

# float64: absolute and relative, by the golden data's own advice. The tracker multiplies a
# difference by some hundreds in every iteration after the first.
FLOAT64 = 1e-9
FLOAT64_TRACKS = {"track": 1e-4, "track_iter_": 1e-4, "vis": 1e-5, "conf": 1e-5}
# float32: this many times the reference's own distance between float32 and float64.
FLOAT32_FACTOR = 4
FLOAT32_FLOOR = 1e-6  # of the root mean square, where that distance is not known or zero
CHAOTIC = (  # not comparable in float32
    *("track", "track_iter_1", "track_iter_2", "track_iter_3", "vis", "conf", "track_x_1"),
    *("track_delta_1", "track_vis_logit", "track_conf_logit", "track_feats_final"),
    "track_flow_emb_1",
)
LIKE = {"points_half_grid": "points_integer_grid"}  # whose distance is not given

N = TypeVar("N", bound=nn.Module)
Fill = Callable[[dict[str, tuple[int, ...]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Golden:
    """The numbers of one network: `tensors` by name, and what its JSON says about them."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, stem: str) -> "Golden":
        """`stem`.safetensors and `stem`.json of a folder."""
        notes = read_json(folder / f"{stem}.json")
        return cls(load_file(folder / f"{stem}.safetensors"), notes)

    def tolerance(self, name: str, dtype: torch.dtype) -> tuple[float, float]:
        """(absolute, relative) distance within which a value of `dtype` counts as equal."""
        leaf = name.partition(".")[2]
        if dtype == torch.float64:
            loose = [
                v for k, v in FLOAT64_TRACKS.items() if leaf in (k, *(f"{k}{i}" for i in "123"))
            ]
            return (loose or [FLOAT64])[0], FLOAT64
        assert leaf not in CHAOTIC, f"{name} cannot be compared in float32"
        figures = self.notes["float32_vs_float64"]["values"]
        figure = figures.get(name, figures.get(f"A.{LIKE.get(leaf, leaf)}", {"max_abs": 0.0}))
        floor = FLOAT32_FLOOR * float(self.tensors[name].double().abs().max())
        return max(FLOAT32_FACTOR * figure["max_abs"], floor), 0.0

    def check(self, got: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Fails with the names, of all in `got`, that are too far from the golden tensors."""
        far = []
        for name, value in got.items():
            if dtype != torch.float64 and name.partition(".")[2] in CHAOTIC:
                continue
            want = self.tensors[name].double()
            assert value.dtype == dtype, (name, value.dtype)
            assert value.shape == want.shape, (name, value.shape, want.shape)
            atol, rtol = self.tolerance(name, dtype)
            excess = (value.detach().double() - want).abs() - (atol + rtol * want.abs())
            if not (excess <= 0).all():
                far.append(f"{name}: beyond {atol:.1e} by {float(excess.max()):.1e}")
        assert not far, "\n".join(far)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of golden data says."""
    notes: dict[str, Any] = json.loads(path.read_text())
    return notes


class Call(NamedTuple):
    """One call of a module."""

    inputs: tuple[Any, ...]
    output: Any


@contextmanager
def recorded(network: nn.Module) -> Iterator[dict[str, list[Call]]]:
    """The calls of every module by its name, while the context lasts."""
    calls: dict[str, list[Call]] = defaultdict(list)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _, inputs, output: calls[name].append(Call(inputs, output))

    handles = [m.register_forward_hook(hook(name)) for name, m in network.named_modules()]
    yield calls
    for handle in handles:
        handle.remove()


@contextmanager
def recorded_attention() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(q, k) of every attention, in order: normed, rotated, [b, heads, n, head size]."""
    seen: list[tuple[Tensor, Tensor]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.append((q, k))
        return attention(q, k, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        yield seen


def shared_fill(shared: Path) -> Fill:
    """The rule by which the shared golden numbers' weights follow from names and shapes."""
    spec = importlib.util.spec_from_file_location("golden_fill", shared / "golden" / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fill: Fill = module.fill_state_dict
    return fill


def own_fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The rule of the project's own golden numbers: noise by name, of a size that keeps signals.

    Buffers (`bias_mask`, `periods`) are left out: constructors make them.
    """
    filled = {}
    for name, shape in shapes.items():
        if name.endswith((".bias_mask", ".periods")):
            continue
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
        noise = np.random.Generator(np.random.PCG64(seed)).uniform(-1, 1, shape)
        if len(shape) == 1:
            around = 1.0 if name.endswith(".weight") else 0.3 * name.endswith(".gamma")
            values = around + 0.1 * noise
        else:
            values = noise * (3 / np.prod(shape[1:])) ** 0.5
        filled[name] = torch.from_numpy(values.astype(np.float32))
    return filled


def filled(make: Callable[[], N], fill: Fill, dtype: torch.dtype = torch.float32) -> N:
    """A network built without memory, with filled weights put in its place, ready to infer."""
    with torch.device("meta"):
        network = make()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict(fill(shapes), assign=True)
    return network.to(dtype).eval()


OWN = Path(__file__).parent / "golden" / "networks.safetensors"  # made by golden/make.py


def own_outputs(config: OmegaConfig | VGGTConfig) -> dict[str, Tensor]:
    """float64 outputs of a small network with `own_fill` on made-up images, tracks included."""
    network = build(config)
    assert not isinstance(network, Mini)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict(own_fill(shapes), strict=False)
    network.double().eval()
    H, W = 70, 98  # whole patches of VGGT, not of Omega
    images = (torch.arange(2 * 3 * H * W).double() * 0.6180339887498949 % 1).view(1, 2, 3, H, W)
    with torch.no_grad():
        cached = network.aggregate(images)
        outputs = network.read(cached, (H, W))
        named = {k: v for k, v in outputs._asdict().items() if v is not None}
        for dense in {"depth", "confidence", "points", "points_confidence"} & named.keys():
            named[dense] = named[dense][:, :, ::5, ::5]
        if isinstance(network, VGGT):
            query = torch.tensor([[[10.0, 20.0], [77.5, 41.25]]]).double()
            # Later iterations hang on the last bits: see FLOAT64_TRACKS.
            named["track"] = network.track(cached, (H, W), query).xy[0]
    return {name: value.contiguous() for name, value in named.items()}
