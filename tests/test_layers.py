"""Laws of what the networks share."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from golden_data import SMALL_OMEGA, SMALL_VGGT, filled, own_fill, recorded
from torch import Tensor, nn

from vggt_cli.models import attention, layers
from vggt_cli.models.layers import (
    RectifiedConv,
    ResidualConv,
    Rotation,
    add_positions,
    by_frames,
    normalized,
    resize,
    with_special_tokens,
)
from vggt_cli.models.mini import MiniConfig
from vggt_cli.models.networks import CONFIGS, Config, build

SMALL: dict[str, Config] = {"omega": SMALL_OMEGA, "vggt": SMALL_VGGT, "mini": MiniConfig()}
each_network = pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(T: int, leading: int = 0) -> Rotation:
    """Tokens at places 0, 1, ... of one axis, four pairs of channels."""
    angles = torch.arange(T, dtype=torch.float64)[:, None, None] * torch.tensor([1, 0.5, 0.2, 0.1])
    return Rotation.by(angles, leading, like=random(1))


def test_a_rotation_keeps_lengths() -> None:
    x = random(2, 3, 5, 8)
    torch.testing.assert_close(rotation(5)(x).norm(dim=-1), x.norm(dim=-1))


def test_products_of_rotated_tokens_depend_on_their_distance_alone() -> None:
    q, k = (random(8, seed=i).expand(6, 8) for i in range(2))
    products = rotation(6)(q) @ rotation(6)(k).mT
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])
    assert not torch.allclose(products[0, 0], products[0, 1])


def test_a_rotation_leaves_leading_tokens_as_they_are() -> None:
    x = random(1, 2, 7, 8)
    turned = rotation(5, leading=2)(x)
    assert torch.equal(turned[..., :2, :], x[..., :2, :])
    torch.testing.assert_close(turned[..., 2:, :], rotation(5)(x[..., 2:, :]))


def test_a_rotation_treats_frames_in_a_row_alike() -> None:
    x = random(2, 3, 5, 8)  # three frames of five tokens
    row = rotation(5)(x.flatten(1, 2))
    torch.testing.assert_close(row.unflatten(1, (3, 5)), rotation(5)(x))


def test_a_rotation_gives_back_the_dtype_it_got() -> None:
    x = random(1, 5, 8).bfloat16()
    turned = rotation(5)(x)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotation(5)(x.double()).bfloat16())


def test_residual_convolutions_differ_in_what_the_identity_carries() -> None:
    plain, rectified = (kind(4).double() for kind in (ResidualConv, RectifiedConv))
    rectified.load_state_dict(plain.state_dict())
    x = random(1, 4, 5, 6)
    torch.testing.assert_close(plain(x) - rectified(x), x.clamp(max=0))


def test_resizing_keeps_corners_and_linear_ramps() -> None:
    ramp = torch.linspace(0, 1, 5, dtype=torch.float64).expand(1, 1, 3, 5)
    larger = resize(ramp, (7, 9))
    torch.testing.assert_close(
        larger, torch.linspace(0, 1, 9, dtype=torch.float64).expand(1, 1, 7, 9)
    )
    assert resize(ramp, (3, 5)) is ramp


def test_positions_mirror_and_follow_the_aspect_of_the_image() -> None:
    placed = add_positions(torch.zeros(1, 8, 4, 6, dtype=torch.float64), aspect=1.5)[0]
    sines, cosines = placed[[0, 1, 4, 5]], placed[[2, 3, 6, 7]]
    torch.testing.assert_close(sines[:2].flip(-1), -sines[:2])
    torch.testing.assert_close(sines[2:].flip(-2), -sines[2:])
    torch.testing.assert_close(cosines.flip(-1, -2), cosines)
    # Half extents of a 3:2 image whose half diagonal is 1, at the centres of the outer pixels.
    assert 10 * placed[0, 0, -1] == pytest.approx(torch.tensor(1.5 / 3.25**0.5 * 5 / 6).sin())
    assert 10 * placed[4, -1, 0] == pytest.approx(torch.tensor(1 / 3.25**0.5 * 3 / 4).sin())


def test_the_first_frame_of_each_sequence_has_tokens_of_its_own() -> None:
    special, patches = random(1, 2, 3, 4), random(2, 3, 5, 4, seed=1)
    tokens = with_special_tokens([special], patches)
    assert tokens.shape == (2, 3, 8, 4)
    assert torch.equal(tokens[:, :, 3:], patches)
    for frame, entry in enumerate([0, 1, 1]):
        assert torch.equal(tokens[:, frame, :3], special[:, entry].expand(2, -1, -1))


def test_dense_heads_see_few_frames_at_a_time() -> None:
    seen = []

    def head(chunk: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        seen.append(len(chunk[0]))
        return chunk[0] * 2, chunk[1].sum(-1)

    first, second = random(2, 5, 3, 4), random(2, 5, 3, 4, seed=1)
    doubled, summed = by_frames(head, [first, second], frames_per_chunk=4)
    assert seen == [4, 4, 2]
    assert torch.equal(doubled, first * 2)
    assert torch.equal(summed, second.sum(-1))


def test_normalized_images_have_imagenets_mean_at_zero_and_deviation_at_one() -> None:
    mean, std = (torch.tensor(x)[:, None, None].expand(3, 2, 2) for x in (layers.MEAN, layers.STD))
    torch.testing.assert_close(normalized(mean), torch.zeros(3, 2, 2))
    torch.testing.assert_close(normalized(mean + std), torch.ones(3, 2, 2))
    with pytest.raises(AssertionError):
        normalized(torch.zeros(4, 2, 2))


@each_network
def test_weights_put_into_a_network_without_memory_are_all_it_needs(config: Config) -> None:
    network = filled(lambda: build(config), own_fill_with_buffers)
    assert not any(x.is_meta for x in (*network.parameters(), *network.buffers()))
    with torch.no_grad():
        assert network(torch.rand(1, 2, 3, 112, 112)).depth.isfinite().all()


def own_fill_with_buffers(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Values for buffers too, whose constructors' values a network without memory does not have."""
    weights = own_fill(shapes)
    for name in shapes.keys() - weights.keys():
        weights[name] = torch.ones(shapes[name]) + torch.arange(shapes[name][0]) / 10
    return weights


@pytest.mark.parametrize("name", CONFIGS)
def test_every_network_by_name_is_built_without_memory(name: str) -> None:
    with torch.device("meta"):
        network = build(CONFIGS[name])
    assert all(x.is_meta for x in (*network.parameters(), *network.buffers()))
    assert network.config == CONFIGS[name]


@each_network
def test_only_layers_of_the_aggregator_take_the_compute_dtype(config: Config) -> None:
    network = build(config)
    layers.to_compute(network.aggregator, torch.bfloat16)
    short = {
        f"{name}.{leaf}"
        for name, layer in network.aggregator.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
        for leaf, _ in (*layer.named_parameters(), *layer.named_buffers())
    }
    for name, value in network.state_dict().items():
        inside = name.removeprefix("aggregator.") in short and name.startswith("aggregator.")
        assert value.dtype == (torch.bfloat16 if inside else torch.float32), name


@each_network
def test_a_callers_autocast_rules_the_aggregator_and_not_the_heads(config: Config) -> None:
    network = build(config)
    images = torch.rand(1, 1, 3, 56, 56)
    with torch.autocast("cpu", torch.bfloat16), recorded(network) as calls:
        outputs = network(images)
    qkv = calls["aggregator.frame_blocks.0.attn.qkv"][0].output
    assert qkv.dtype == torch.bfloat16
    assert calls["aggregator.frame_blocks.0.attn.q_norm"][0].output.dtype == torch.float32
    assert calls["camera_head.trunk.0.attn.qkv"][0].output.dtype == torch.float32
    assert all(x is None or x.dtype == torch.float32 for x in outputs)
    (outputs.pose_passes.mean() + outputs.depth.mean()).backward()
    gradient = network.aggregator.get_parameter("frame_blocks.0.attn.qkv.weight").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@each_network
def test_networks_run_on_every_device(config: Config, device: torch.device) -> None:
    network, side = build(config).to(device).eval(), 4 * config.patch_size
    with torch.no_grad():
        outputs = network(torch.rand(1, 1, 3, side, side).to(device))
    assert outputs.depth.shape == (1, 1, side, side)
    assert outputs.depth.device.type == device.type


def test_attention_equals_the_textbook() -> None:
    attends = layers.Attention(8, 2, qk_norm=True).double()
    x = random(1, 5, 8)
    q, k, v = attends.qkv(x).chunk(3, -1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        norms = (F.layer_norm(y[..., part], (4,), eps=1e-5) for y in (q, k))
        a, b = norms
        heads.append((a @ b.mT / 2).softmax(-1) @ v[..., part])
    torch.testing.assert_close(attends(x), attends.proj(torch.cat(heads, -1)))


def test_short_attention_to_many_keys_is_as_close_as_the_plain_kernel() -> None:
    q, k, v = (random(2, 3, attention.MANY + 8, 16, seed=i).bfloat16() for i in range(3))
    q, k = q[:, :, :300] * 4, k + 2  # steep, and far from zero
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with torch.no_grad():
        rows = attention.attended(q, k, v)
    plain = F.scaled_dot_product_attention(q, k, v)
    assert not torch.equal(rows, plain), "the rows are another way to compute it"
    error, usual = ((x.double() - exact).square().mean().sqrt() for x in (rows, plain))
    assert error < 3 * usual


@pytest.mark.parametrize("turned", [False, True])
def test_a_block_by_tiles_is_the_block(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = layers.Block(8, layers.Attention(8, 1, qk_norm=True), layer_scale=0.5).double()
    x, rotate = random(2, 20, 8), rotation(5) if turned else None
    with torch.no_grad():
        whole = block(x, rotate)
        monkeypatch.setattr(layers, "TILE", 7)
        with recorded(block) as calls:
            tiled = block(x, rotate)
    assert [c.output.shape[1] for c in calls["mlp"]] == ([5] * 4 if turned else [7, 7, 6])
    torch.testing.assert_close(tiled, whole)


@pytest.mark.parametrize("config", [SMALL_OMEGA, SMALL_VGGT], ids=["omega", "vggt"])
def test_few_frames_at_a_time_give_the_same(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = build(config).double().eval()
    images = torch.rand(1, 5, 3, 112, 112, dtype=torch.float64)
    with torch.no_grad():
        whole = network(images)
        for name, few in {"FRAMES": 2, "TILE": 40, "ON_DEVICE": 1}.items():
            monkeypatch.setattr(layers, name, few)
        with recorded(network) as calls:
            chunked = network(images)
    assert [len(c.output) for c in calls["aggregator.frame_blocks.0"]] == [2, 2, 1]
    torch.testing.assert_close(chunked.pose_passes, whole.pose_passes)
    torch.testing.assert_close(chunked.depth, whole.depth)
    torch.testing.assert_close(chunked.tokens, whole.tokens)


@pytest.mark.parametrize("config", [SMALL_OMEGA, SMALL_VGGT], ids=["omega", "vggt"])
def test_cached_layers_but_the_last_are_as_short_as_the_matrices(config: Config) -> None:
    network = build(config).eval()
    layers.to_compute(network.aggregator, torch.bfloat16)
    with recorded(network) as calls, torch.no_grad():
        network(torch.rand(1, 2, 3, 112, 112))
    (call,) = calls["aggregator"]
    exact = [i for i, x in call.output.items() if x.dtype == torch.float32]
    assert exact == [config.cached_layers[-1]]
