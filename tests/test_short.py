"""Laws of what is faster and less exact: linear layers in 8 bits, fewer keys and values."""

from dataclasses import replace

import pytest
import torch
from golden_data import SMALL_OMEGA, SMALL_VGGT, recorded
from torch import Tensor, nn

from vggt_cli.models import layers
from vggt_cli.models.layers import Thinned
from vggt_cli.models.mini import Mini
from vggt_cli.models.networks import Config, build
from vggt_cli.models.omega import MaskedLinear
from vggt_cli.models.short import Int8Linear, to_int8

# A camera, three registers and 4 x 6 patches a frame.
GRID, SPECIAL, T = (4, 6), 4, 28
each_network = pytest.mark.parametrize(
    "config",
    [replace(SMALL_OMEGA, layer_scale=0.3), replace(SMALL_VGGT, layer_scale=0.3)],
    ids=["omega", "vggt"],
)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@pytest.mark.parametrize("kind", [nn.Linear, MaskedLinear])
def test_eight_bits_are_within_a_percent_whatever_the_size_of_a_token(
    kind: type[nn.Linear],
) -> None:
    torch.manual_seed(0)
    linear = kind(64, 96)
    x = torch.randn(2, 7, 64) * torch.tensor([1, 1, 1000, 1, 1e-3, 1, 1])[:, None]
    with torch.no_grad():
        want, got = linear(x), Int8Linear(linear)(x)
    assert got.shape == want.shape
    assert all(relative(got[:, i], want[:, i]) < 0.015 for i in range(7))
    assert not torch.equal(got, want)


def test_a_token_of_zeros_becomes_the_bias() -> None:
    linear = nn.Linear(16, 8)
    with torch.no_grad():
        assert torch.equal(Int8Linear(linear)(torch.zeros(3, 16)), linear.bias.expand(3, -1))


def test_tokens_are_multiplied_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    short, x = Int8Linear(nn.Linear(16, 8)), torch.randn(2, 5, 16)
    whole = short(x)
    monkeypatch.setattr("vggt_cli.models.short.ROWS", 3)
    assert torch.equal(short(x), whole)


@each_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_of_eight_bits_is_close_to_itself(config: Config, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network, images = build(config).eval(), torch.rand(1, 2, 3, 112, 112)
    with torch.no_grad():
        want = network(images)
        layers.to_compute(network.aggregator, dtype)
        to_int8(network.aggregator)
        with recorded(network) as calls:
            got = network(images)
    assert calls["aggregator.frame_blocks.0.attn.qkv"][0].output.dtype == dtype
    assert not any(isinstance(m, Int8Linear) for m in network.camera_head.modules())
    assert relative(got.tokens, want.tokens) < 0.05
    assert relative(got.depth, want.depth) < 0.05
    assert relative(got.pose_passes[-1], want.pose_passes[-1]) < 0.05


def test_all_of_the_first_frame_and_all_cameras_and_registers_are_read() -> None:
    read = torch.zeros(5 * T, dtype=torch.bool)
    read[Thinned((0,), 2).keys(5, GRID, SPECIAL)] = True
    special, patches = read.view(5, T).split([SPECIAL, T - SPECIAL], 1)
    assert special.all()
    assert patches[0].all()
    assert (patches[1:].sum(1) == 6).all()
    assert patches[1:].any(0).all(), "four frames read each patch of the grid once"


def test_with_a_stride_of_one_all_are_read() -> None:
    assert torch.equal(Thinned((0,), 1).keys(3, GRID, SPECIAL), torch.arange(3 * T))


@each_network
def test_fewer_keys_are_another_network_only_in_their_layers(config: Config) -> None:
    torch.manual_seed(0)
    network, images = build(config).eval(), torch.rand(1, 3, 3, 112, 112)
    assert not isinstance(network, Mini)
    results = []
    for thinned in (None, Thinned((0, 2, 3), 1), Thinned((), 3), Thinned((2, 3), 3)):
        network.aggregator.thinned = thinned
        with torch.no_grad():
            results.append(network.aggregate(images))
    dense, one, none, few = results
    for i, want in dense.items():
        torch.testing.assert_close(one[i], want)
        assert torch.equal(none[i], want)
        assert torch.allclose(few[i], want) == (i < 2)
        assert relative(few[i], want) < 0.1


@each_network
def test_fewer_keys_go_by_tiles_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, images = build(config).eval(), torch.rand(1, 3, 3, 112, 112)
    network.aggregator.thinned = Thinned((0, 2, 3), 2)
    with torch.no_grad():
        whole = network(images).tokens
        monkeypatch.setattr(layers, "TILE", 100)
        torch.testing.assert_close(network(images).tokens, whole, rtol=1e-4, atol=1e-4)
