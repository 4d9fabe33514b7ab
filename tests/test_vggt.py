"""VGGT against its golden numbers, and its laws; the track head has a file of its own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_data import (
    FLOAT64,
    OWN,
    SMALL_VGGT,
    Call,
    Golden,
    filled,
    own_outputs,
    read_json,
    recorded,
    recorded_attention,
    shared_fill,
)
from safetensors.torch import load_file
from torch import Tensor

from vggt_cli.models.layers import Outputs, add_positions, to_compute
from vggt_cli.models.networks import CONFIGS, build
from vggt_cli.models.vggt import VGGT, VGGTConfig

D = SMALL_VGGT.embed_dim
TINY = replace(SMALL_VGGT, embed_dim=64, encoder_depth=1, depth=2, cached_layers=(0, 0, 1, 1))
# What small.safetensors holds of a case, where it is not all: (sequences, frames).
PARTS = {
    **dict.fromkeys(["B.world_points", "B.world_points_conf"], (slice(1, 2), slice(None))),
    **{f"D.{x}": (slice(None), slice(7, 9)) for x in ("depth", "depth_conf")},
    **{f"D.{x}": (slice(None), slice(7, 9)) for x in ("world_points", "world_points_conf")},
    **{
        f"E.{x}": (slice(None), slice(1, 2))
        for x in ("depth_conf", "world_points", "world_points_conf")
    },
}


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    return Golden.read(shared / "golden" / "vggt", "small")


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def network(shared: Path, request: pytest.FixtureRequest) -> VGGT:
    config = replace(SMALL_VGGT, track_head=False)
    return filled(lambda: VGGT(config), shared_fill(shared), request.param)


def dtype_of(network: VGGT) -> torch.dtype:
    return network.aggregator.camera_token.dtype


def named_outputs(case: str, outputs: Outputs) -> dict[str, Tensor]:
    assert outputs.points is not None
    assert outputs.points_confidence is not None
    values = {
        "pose_enc": outputs.pose_passes[-1],
        "depth": outputs.depth[..., None],
        "depth_conf": outputs.confidence,
        "world_points": outputs.points,
        "world_points_conf": outputs.points_confidence,
    }
    got = {f"{case}.{name}": value for name, value in values.items()}
    return {k: v[PARTS[k]] if k in PARTS else v for k, v in got.items()}


@pytest.mark.parametrize("case", list("ABCDE"))
def test_outputs_are_the_golden_ones(network: VGGT, golden: Golden, case: str) -> None:
    with torch.no_grad():
        outputs = network(golden.tensors[f"{case}.images"].to(dtype_of(network)))
    golden.check(named_outputs(case, outputs), dtype_of(network))
    assert outputs.tokens is not None
    assert outputs.tokens.shape == (*outputs.depth.shape[:2], 1 + SMALL_VGGT.registers, 2 * D)


def aggregator_intermediates(
    calls: Mapping[str, list[Call]], attention: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    def output(name: str) -> Tensor:
        value: Tensor = calls[f"aggregator.{name}"][0].output
        return value

    norm = output("patch_embed.norm")
    cached = calls["aggregator"][0].output
    # Attention number 3: the patch encoder's three come first.
    frame_q, frame_k, global_q, global_k = (*attention[3], *attention[4])
    got = {
        "patch_conv": output("patch_embed.patch_embed.proj").permute(0, 2, 3, 1)[::2],
        "vit_in": calls["aggregator.patch_embed.blocks.0"][0].inputs[0][::2],
        "vit_cls_norm": norm[:, 0],
        "vit_reg_norm": norm[:, 1:5],
        "patch_tokens": output("patch_embed"),
        "tokens_in": calls["aggregator.frame_blocks.0"][0].inputs[0][None],
        "frame0_qkv": output("frame_blocks.0.attn.qkv")[:1],
        "frame0_q_norm": output("frame_blocks.0.attn.q_norm")[:1],
        "frame0_k_norm": output("frame_blocks.0.attn.k_norm")[:1],
        "frame0_q_rope": frame_q[:1],
        "frame0_k_rope": frame_k[:1],
        "frame0_attn_out": output("frame_blocks.0.attn")[:1],
        "global0_q_rope": global_q[:, :1],
        "global0_k_rope": global_k[:, :1],
        "global0_attn_out": output("global_blocks.0.attn"),
    }
    got |= {f"vit_block_{i}": output(f"patch_embed.blocks.{i}")[::2] for i in range(3)}
    got |= {f"frame_{i}": output(f"frame_blocks.{i}")[None] for i in range(4)}
    assert all(torch.equal(cached[i][..., :D], got[f"frame_{i}"]) for i in range(4))
    return got | {f"global_{i}": cached[i][..., D:] for i in range(4)}


def camera_intermediates(calls: Mapping[str, list[Call]]) -> dict[str, Tensor]:
    def output(name: str, call: int = 0) -> Tensor:
        value: Tensor = calls[f"camera_head.{name}"][call].output
        return value

    got = {"cam_token_norm": output("token_norm"), "cam_adaln_0": output("adaln_norm")}
    got |= {f"cam_trunk_block_{i}": output(f"trunk.{i}") for i in range(4)}
    for k in range(4):
        got[f"cam_fed_{k}"] = calls["camera_head.embed_pose"][k].inputs[0]
        got[f"cam_embed_{k}"] = output("embed_pose", k)
        modulation = output("poseLN_modulation", k)
        got[f"cam_modulation_{k}"] = modulation if k == 0 else modulation[:, 1:2]
        got[f"cam_trunk_in_{k}"] = calls["camera_head.trunk.0"][k].inputs[0]
        got[f"cam_delta_{k}"] = output("pose_branch", k)
    return got


def dense_intermediates(calls: Mapping[str, list[Call]]) -> dict[str, Tensor]:
    def output(name: str, call: int = 0) -> Tensor:
        value: Tensor = calls[f"depth_head.{name}"][call].output
        return value[:1]

    got = {
        "depth_conv1": output("scratch.output_conv1")[:, ::4],
        "depth_conv2_in": calls["depth_head.scratch.output_conv2"][0].inputs[0][:1, ::4],
        "depth_logits": calls["depth_head"][0].output[1:2],
        "point_logits": calls["point_head"][0].output[:1],
    }
    for i in range(4):
        got[f"depth_norm_{i}"] = output("norm", i)
        got[f"depth_project_{i}"] = output(f"projects.{i}")
        got[f"depth_resize_in_{i}"] = calls[f"depth_head.resize_layers.{i}"][0].inputs[0][:1]
        got[f"depth_resize_{i}"] = output(f"resize_layers.{i}")
        got[f"depth_rn_{i}"] = output(f"scratch.layer{i + 1}_rn")
        got[f"depth_fuse_{i + 1}"] = output(f"scratch.refinenet{i + 1}")
    thinned = {"depth_resize_0": 2, "depth_rn_0": 2, "depth_fuse_2": 2, "depth_fuse_1": 4}
    return got | {name: got[name][:, ::step] for name, step in thinned.items()}


def test_every_intermediate_is_the_golden_one(network: VGGT, golden: Golden) -> None:
    images = golden.tensors["A.images"].to(dtype_of(network))
    with torch.no_grad(), recorded(network) as calls, recorded_attention() as attention:
        outputs = network(images)
    inside = aggregator_intermediates(calls, attention)
    inside |= camera_intermediates(calls) | dense_intermediates(calls)
    inside |= {f"pose_enc_{k}": outputs.pose_passes[k] for k in range(4)}
    got = named_outputs("A", outputs) | {f"A.{name}": value for name, value in inside.items()}
    elsewhere = {"images", "query_points", "positions", "rope_cos", "rope_sin", "pos_embed"}
    elsewhere |= {"dpt_pos_5x7", "vis", "conf"}
    missing = {k for k in golden.tensors if k.startswith("A.")} - got.keys()
    assert {k for k in missing if "track" not in k} == {f"A.{x}" for x in elsewhere}
    golden.check(got, dtype_of(network))


def test_embeddings_of_places_are_the_golden_ones(network: VGGT, golden: Golden) -> None:
    encoder, dtype = network.aggregator.patch_embed, dtype_of(network)
    rows = network.aggregator.rotation((8, 8))
    # Special tokens stand at 0; the first column's patches, 8 apart, at rows 1 to 8.
    at = [0, *range(5, 69, 8)]
    empty = torch.zeros(1, 32, 5, 7, dtype=dtype)
    got = {
        "A.pos_embed": encoder.positions((5, 7)),
        "B.pos_embed": encoder.positions((3, 4)),
        "E.pos_embed": encoder.positions((6, 8)),
        "A.dpt_pos_5x7": add_positions(empty, aspect=98 / 70)[0],
        "A.rope_cos": rows.cos[at, 0].repeat(1, 2),
        "A.rope_sin": rows.sin[at, 0].repeat(1, 2),
    }
    golden.check(got, dtype)
    angles = golden.tensors["A.positions"].double()  # the fastest pair turns by the place itself
    turned = network.aggregator.rotation((5, 7)).sin[..., 0].double()
    torch.testing.assert_close(turned, angles.sin(), atol=1e-6, rtol=0)


def test_the_trained_grid_takes_the_position_embedding_as_stored(network: VGGT) -> None:
    encoder = network.aggregator.patch_embed
    assert encoder.positions((5, 5)) is encoder.pos_embed


@pytest.mark.parametrize("track_head", [True, False])
def test_keys_and_shapes_are_those_of_the_published_checkpoints(
    shared: Path, track_head: bool
) -> None:
    keys = read_json(shared / "golden" / "vggt" / "keys.json")["keys"]
    config = CONFIGS["vggt-1b"]
    assert isinstance(config, VGGTConfig)
    with torch.device("meta"):
        network = build(replace(config, track_head=track_head))
    want = {k: v for k, v in keys.items() if track_head or not k.startswith("track_head.")}
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == want
    count = sum(p.numel() for p in network.parameters())
    assert count == (1_256_537_516 if track_head else 1_190_596_120)


def test_bfloat16_moves_outputs_as_much_as_on_an_accelerator(shared: Path, golden: Golden) -> None:
    network = filled(lambda: VGGT(replace(SMALL_VGGT, track_head=False)), shared_fill(shared))
    to_compute(network.aggregator, torch.bfloat16)
    with torch.no_grad():
        got = named_outputs("A", network(golden.tensors["A.images"]))
    for name, figure in golden.notes["bfloat16_autocast"]["values"].items():
        if f"A.{name}" in got:
            want = golden.tensors[f"A.{name}"]
            off = (got[f"A.{name}"] - want).square().mean().sqrt() / want.square().mean().sqrt()
            assert figure["rms_rel"] / 2 < off < figure["rms_rel"] * 2, (name, off)
    assert all(v.dtype == torch.float32 for v in got.values())


def test_outputs_are_those_that_the_project_recorded() -> None:
    recorded_outputs = load_file(OWN)
    for name, value in own_outputs(SMALL_VGGT).items():
        want = recorded_outputs[f"vggt.{name}"]
        torch.testing.assert_close(value, want, atol=FLOAT64, rtol=FLOAT64)


def random_images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def fresh() -> VGGT:
    """A tiny network with random weights that are large enough for every part to matter."""
    torch.manual_seed(0)
    network = VGGT(replace(TINY, track_head=False)).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network


def test_permuting_later_frames_permutes_outputs(fresh: VGGT) -> None:
    images, order = random_images(1, 4, 3, 28, 42), [0, 3, 1, 2]
    with torch.no_grad():
        straight, permuted = fresh(images), fresh(images[:, order])
        other = fresh(images[:, [1, 0, 2, 3]]).depth[:, [1, 0, 2, 3]]
    torch.testing.assert_close(permuted.depth, straight.depth[:, order])
    torch.testing.assert_close(permuted.points, straight.points[:, order])
    torch.testing.assert_close(permuted.pose_passes, straight.pose_passes[:, :, order])
    assert not torch.allclose(other, straight.depth), "the first frame is not like the others"


@pytest.mark.parametrize("frames_per_chunk", [1, 3])
def test_chunked_heads_equal_whole_ones(fresh: VGGT, frames_per_chunk: int) -> None:
    with torch.no_grad():
        cached = fresh.aggregate(random_images(2, 4, 3, 28, 28))
        whole, chunked = (fresh.read(cached, (28, 28), n) for n in (8, frames_per_chunk))
    torch.testing.assert_close(chunked.depth, whole.depth)
    torch.testing.assert_close(chunked.points, whole.points)
    torch.testing.assert_close(chunked.points_confidence, whole.points_confidence)


def test_a_batch_equals_its_members_alone(fresh: VGGT) -> None:
    images = random_images(2, 3, 3, 42, 28)
    with torch.no_grad():
        batch, alone = fresh(images), [fresh(x[None]) for x in images]
    torch.testing.assert_close(batch.depth, torch.cat([x.depth for x in alone]))
    torch.testing.assert_close(batch.pose_passes, torch.cat([x.pose_passes for x in alone], 1))


def test_a_pass_of_the_camera_head_sends_no_gradient_to_the_pass_before(fresh: VGGT) -> None:
    first, second, *_ = fresh.camera_head(random_images(1, 2, 2 * TINY.embed_dim))
    start = fresh.camera_head.empty_pose_tokens  # which only the first pass reads
    (gradient,) = torch.autograd.grad(first.sum(), start, retain_graph=True)
    assert gradient.ne(0).any()
    (gradient,) = torch.autograd.grad(second.sum(), start)
    assert gradient.eq(0).all()


def test_sizes_that_are_not_made_of_patches_are_refused(fresh: VGGT) -> None:
    with pytest.raises(AssertionError, match="patches of 14"):
        fresh(random_images(1, 1, 3, 30, 28))


def test_heads_that_are_off_have_no_keys_and_results() -> None:
    network = VGGT(replace(TINY, point_head=False, track_head=False))
    assert not any(key.startswith(("point", "track")) for key in network.state_dict())
    outputs = network(random_images(1, 1, 3, 28, 28).float())
    assert outputs.points is None
    assert outputs.points_confidence is None
    assert outputs.depth.isfinite().all()
    with pytest.raises(AssertionError, match="without its track head"):
        network.track({}, (28, 28), torch.zeros(1, 1, 2))
