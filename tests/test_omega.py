"""VGGT-Omega against its golden numbers, and its laws."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_data import (
    FLOAT64,
    OWN,
    SMALL_OMEGA,
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

from vggt_cli import geometry
from vggt_cli.models.layers import Outputs, to_compute
from vggt_cli.models.networks import CONFIGS, build
from vggt_cli.models.omega import VGGTOmega

D = SMALL_OMEGA.embed_dim
TINY = replace(SMALL_OMEGA, embed_dim=64, encoder_depth=1, depth=2, cached_layers=(0, 0, 1, 1))
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    return Golden.read(shared / "golden" / "vggt_omega", "small")


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "float64"])
def network(shared: Path, request: pytest.FixtureRequest) -> VGGTOmega:
    return filled(lambda: VGGTOmega(SMALL_OMEGA), shared_fill(shared), request.param)


def dtype_of(network: VGGTOmega) -> torch.dtype:
    return network.aggregator.camera_token.dtype


def named_outputs(case: str, outputs: Outputs) -> dict[str, Tensor]:
    assert outputs.tokens is not None
    assert outputs.text is not None
    values = {
        "pose_enc": outputs.pose_passes[-1],
        "depth": outputs.depth[..., None],
        "depth_conf": outputs.confidence,
        "camera_and_register_tokens": outputs.tokens,
        "text_alignment_embedding": outputs.text,
    }
    return {f"{case}.{name}": value for name, value in values.items()}


@pytest.mark.parametrize("case", list("ABCDE"))
def test_outputs_are_the_golden_ones(network: VGGTOmega, golden: Golden, case: str) -> None:
    dtype = dtype_of(network)
    with torch.no_grad():
        outputs = named_outputs(case, network(golden.tensors[f"{case}.images"].to(dtype)))
    golden.check({k: v for k, v in outputs.items() if k in golden.tensors}, dtype)


@pytest.mark.parametrize("case", list("AB"))
def test_decoded_cameras_and_points_are_the_golden_ones(
    network: VGGTOmega, golden: Golden, case: str
) -> None:
    images = golden.tensors[f"{case}.images"].to(dtype_of(network))
    H, W = images.shape[-2:]
    with torch.no_grad():
        outputs = network(images)
        extrinsics, intrinsics = geometry.decode_pose(outputs.pose_passes[-1], (H, W))
    got = {f"{case}.extrinsics": extrinsics, f"{case}.intrinsics": intrinsics}
    if case == "A":
        centres = geometry.unproject(outputs.depth, intrinsics, extrinsics)
        moved = intrinsics.clone()
        moved[..., :2, 2] += 0.5  # pixels counted from 0 instead of from their centres
        integers = geometry.unproject(outputs.depth, moved, extrinsics)
        got["A.points_half_grid"] = centres[0, :, ::4, ::4]
        got["A.points_integer_grid"] = integers[0, :, ::4, ::4]
    golden.check(got, dtype_of(network))


def aggregator_intermediates(
    calls: Mapping[str, list[Call]], attention: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    def output(name: str) -> Tensor:
        value: Tensor = calls[f"aggregator.{name}"][0].output
        return value

    norm = output("patch_embed.norm")
    rotation = calls["aggregator.rope_embed"][0].output
    cached = calls["aggregator"][0].output
    got = {
        "patch_conv": output("patch_embed.patch_embed.proj").permute(0, 2, 3, 1),
        "patch_tokens": output("patch_embed"),
        "vit_cls_norm": norm[:, 0],
        "vit_storage_norm": norm[:, 1:5],
        "tokens_in": calls["aggregator.frame_blocks.0"][0].inputs[0][None],
        "frame0_qkv": output("frame_blocks.0.attn.qkv"),
        "frame0_q_norm": output("frame_blocks.0.attn.q_norm"),
        "frame0_k_norm": output("frame_blocks.0.attn.k_norm"),
        # Attention number 3: the patch encoder's three come first.
        "frame0_q_rope": attention[3][0],
        "frame0_k_rope": attention[3][1],
        "frame0_attn_out": output("frame_blocks.0.attn"),
        "rope_sin": rotation.sin[5:, 0].repeat(1, 2),
        "rope_cos": rotation.cos[5:, 0].repeat(1, 2),
    }
    got |= {f"vit_block_{i}": output(f"patch_embed.blocks.{i}") for i in range(3)}
    got |= {f"frame_{i}": output(f"frame_blocks.{i}")[None] for i in range(4)}
    assert all(torch.equal(cached[i][..., :D], got[f"frame_{i}"]) for i in range(4))
    return got | {f"inter_{i}": cached[i][..., D:] for i in range(4)}


def head_intermediates(calls: Mapping[str, list[Call]]) -> dict[str, Tensor]:
    def output(name: str) -> Tensor:
        value: Tensor = calls[name][0].output
        return value

    got = {
        "camera_tokens_norm": output("camera_head.token_norm"),
        "camera_trunk_norm": output("camera_head.trunk_norm"),
        "camera_raw": output("camera_head.camera_branch"),
        "depth_logits": output("dense_head.proj"),
        "conf_logits": output("dense_head.proj_conf"),
        "text_alignment_token": output("text_alignment_head.language_token_norm"),
    }
    for i in range(4):
        got[f"camera_trunk_{i}"] = output(f"camera_head.trunk.{i}")
        got[f"text_readout_{i}"] = output(f"text_alignment_head.readout_blocks.{i}")
        got[f"dense_project_{i}"] = output(f"dense_head.projects.{i}")
        got[f"dense_resize_{i}"] = output(f"dense_head.resize_layers.{i}")
        got[f"dense_fused_{i + 1}"] = output(f"dense_head.scratch.refinenet{i + 1}")
    for thinned in ("dense_resize_0", "dense_fused_1"):
        got[thinned] = got[thinned][..., ::2, ::2]
    return got


def test_every_intermediate_is_the_golden_one(network: VGGTOmega, golden: Golden) -> None:
    images = golden.tensors["A.images"].to(dtype_of(network))
    with torch.no_grad(), recorded(network) as calls, recorded_attention() as attention:
        outputs = named_outputs("A", network(images))
    inside = aggregator_intermediates(calls, attention) | head_intermediates(calls)
    got = outputs | {f"A.{name}": value for name, value in inside.items()}
    elsewhere = {"A.images", "A.extrinsics", "A.intrinsics"}
    elsewhere |= {"A.points_integer_grid", "A.points_half_grid"}
    assert got.keys() == {k for k in golden.tensors if k.startswith("A.")} - elsewhere
    golden.check(got, dtype_of(network))


@pytest.mark.parametrize("name", ["omega-1b", "omega-1b-text"])
def test_keys_and_shapes_are_those_of_the_published_checkpoints(shared: Path, name: str) -> None:
    keys = read_json(shared / "golden" / "vggt_omega" / "keys.json")
    want = keys["keys"] | (keys["text_alignment_keys"] if name.endswith("text") else {})
    with torch.device("meta"):
        network = build(CONFIGS[name])
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == want
    count = sum(p.numel() for p in network.parameters())
    assert count == {"omega-1b": 1_143_814_185, "omega-1b-text": 1_349_473_321}[name]


def test_bfloat16_moves_outputs_as_much_as_on_an_accelerator(shared: Path, golden: Golden) -> None:
    network = filled(lambda: VGGTOmega(SMALL_OMEGA), shared_fill(shared))
    to_compute(network.aggregator, torch.bfloat16)
    with torch.no_grad(), recorded(network) as calls:
        got = named_outputs("A", network(golden.tensors["A.images"]))
    for name, figure in golden.notes["bfloat16_autocast"]["values"].items():
        if f"A.{name}" in got:
            want = golden.tensors[f"A.{name}"]
            off = (got[f"A.{name}"] - want).square().mean().sqrt() / want.square().mean().sqrt()
            assert figure["rms_rel"] / 2 < off < figure["rms_rel"] * 2, (name, off)
    assert calls["aggregator.frame_blocks.0.attn.qkv"][0].output.dtype == torch.bfloat16
    assert calls["aggregator.frame_blocks.0.attn.q_norm"][0].output.dtype == torch.float32
    assert calls["aggregator.inter_frame_blocks.3"][0].output.dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in got.values())


def test_outputs_are_those_that_the_project_recorded() -> None:
    recorded_outputs = load_file(OWN)
    for name, value in own_outputs(SMALL_OMEGA).items():
        want = recorded_outputs[f"omega.{name}"]
        torch.testing.assert_close(value, want, atol=FLOAT64, rtol=FLOAT64)


def random_images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def fresh() -> VGGTOmega:
    """A tiny network with random weights that are large enough for every part to matter."""
    torch.manual_seed(0)
    network = VGGTOmega(TINY).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network


def test_permuting_later_frames_permutes_outputs(fresh: VGGTOmega) -> None:
    images, order = random_images(1, 4, 3, 32, 48), [0, 3, 1, 2]
    with torch.no_grad():
        straight, permuted = fresh(images), fresh(images[:, order])
    torch.testing.assert_close(permuted.depth, straight.depth[:, order])
    torch.testing.assert_close(permuted.pose_passes, straight.pose_passes[:, :, order])
    torch.testing.assert_close(permuted.text, straight.text)
    other = fresh(images[:, [1, 0, 2, 3]]).depth[:, [1, 0, 2, 3]]
    assert not torch.allclose(other, straight.depth), "the first frame is not like the others"


@pytest.mark.parametrize("frames_per_chunk", [1, 3])
def test_chunked_heads_equal_whole_ones(fresh: VGGTOmega, frames_per_chunk: int) -> None:
    images = random_images(2, 4, 3, 32, 32)
    with torch.no_grad():
        cached = fresh.aggregate(images)
        whole, chunked = (fresh.read(cached, (32, 32), n) for n in (8, frames_per_chunk))
    torch.testing.assert_close(chunked.depth, whole.depth)
    torch.testing.assert_close(chunked.confidence, whole.confidence)


def test_a_batch_equals_its_members_alone(fresh: VGGTOmega) -> None:
    images = random_images(2, 3, 3, 48, 32)
    with torch.no_grad():
        batch, alone = fresh(images), [fresh(x[None]) for x in images]
    torch.testing.assert_close(batch.depth, torch.cat([x.depth for x in alone]))
    torch.testing.assert_close(batch.tokens, torch.cat([x.tokens for x in alone]))
    torch.testing.assert_close(batch.pose_passes, torch.cat([x.pose_passes for x in alone], 1))


def test_keys_have_no_bias(fresh: VGGTOmega) -> None:
    qkv = fresh.aggregator.frame_blocks[0].get_submodule("attn.qkv")
    with torch.no_grad():
        q, k, v = qkv(torch.zeros(1, TINY.embed_dim, dtype=torch.float64)).chunk(3, -1)
    assert k.eq(0).all()
    assert q.ne(0).all()
    assert v.ne(0).all()


def test_without_its_text_head_a_network_has_no_such_keys_and_result() -> None:
    network = VGGTOmega(replace(TINY, text_head=False))
    assert not any(key.startswith("text") for key in network.state_dict())
    assert network(random_images(1, 1, 3, 32, 32).float()).text is None


def test_a_fresh_network_starts_unsure_and_can_learn() -> None:
    outputs = VGGTOmega(TINY)(random_images(1, 2, 3, 32, 32).float())
    torch.testing.assert_close(outputs.confidence, torch.full_like(outputs.confidence, 1.05))
    assert outputs.depth.isfinite().all()
    assert outputs.depth.requires_grad
