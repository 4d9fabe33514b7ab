"""Our small network: its size, its laws, and the local features that it starts from."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from vggt_cli.geometry import decode_pose
from vggt_cli.models import matching
from vggt_cli.models.mini import SHARPNESS, Mini, MiniConfig
from vggt_cli.models.networks import CONFIGS, build

WEIGHTS = Path(__file__).parents[1] / "weights"
SMALL = replace(MiniConfig(), depth=2, cached_layers=(0, 0, 1, 1))


@pytest.fixture(scope="module")
def network() -> Mini:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mini(SMALL).eval()


def photos(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0))


def test_it_is_small_enough_to_come_with_the_tool() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in build(CONFIGS["mini"]).parameters())
    assert 5e6 < count < 1e7  # below 20 MB in half precision


@pytest.mark.parametrize("size", [(128, 128), (96, 224), (224, 64)])  # squares to 7:2
@torch.inference_mode()
def test_every_frame_gets_a_camera_and_a_depth_for_each_pixel(
    network: Mini, size: tuple[int, int]
) -> None:
    outputs = network(photos(2, 3, 3, *size))
    assert outputs.pose_passes.shape == (2, 2, 3, 9)  # before and after the solver
    assert outputs.depth.shape == outputs.confidence.shape == (2, 3, *size)
    assert outputs.depth.min() > 0
    assert outputs.confidence.min() >= 1
    assert outputs.tokens is not None
    assert outputs.tokens.shape == (2, 3, 1 + SMALL.registers, 2 * SMALL.embed_dim)


@torch.inference_mode()
def test_the_order_of_the_frames_after_the_first_does_not_matter(network: Mini) -> None:
    images, order = photos(1, 4, 3, 96, 128), torch.tensor([0, 3, 1, 2])
    straight, shuffled = network(images), network(images[:, order])
    assert_close(shuffled.pose_passes, straight.pose_passes[:, :, order], atol=1e-4, rtol=1e-4)
    assert_close(shuffled.depth, straight.depth[:, order], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_sequences_of_a_batch_and_chunks_of_frames_do_not_touch_each_other(network: Mini) -> None:
    images = photos(2, 3, 3, 96, 128)
    together = network(images)
    alone = network(images[1:], frames_per_chunk=1)
    assert_close(alone.pose_passes[:, 0], together.pose_passes[:, 1], atol=1e-4, rtol=1e-4)
    assert_close(alone.depth[0], together.depth[1], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_fresh_network_sees_no_motion_and_sixty_degrees(network: Mini) -> None:
    encoding = network(photos(1, 2, 3, 128, 128)).pose_passes[-1, 0].double()
    extrinsics, _ = decode_pose(encoding, (128, 128))
    cosine = (torch.diagonal(extrinsics[:, :, :3], dim1=-2, dim2=-1).sum(-1) - 1) / 2
    assert torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).max() < 45
    assert torch.rad2deg(encoding[:, 7:]).sub(math.degrees(1)).abs().max() < 30


def test_every_part_learns() -> None:
    fresh, random = Mini(SMALL), torch.Generator().manual_seed(0)
    with torch.no_grad():  # what the solver found counts for nothing at first
        fresh.depth_head.found.weight.normal_(std=0.1, generator=random)
    seen = fresh.aggregate(photos(1, 2, 3, 96, 128))
    guess = fresh.guess(seen)
    matches, features = fresh.find(seen, guess)
    dense = fresh.dense(seen, fresh.settle(seen, guess, matches), features)[:2]
    verdict = matching.judge(matches, features, fresh.match_head)
    said = (guess.pose, guess.depth, guess.context[:, :, 64:], *dense, *verdict)
    torch.stack([x.sum() for x in said]).sum().backward()
    assert not {name for name, p in fresh.named_parameters() if p.grad is None}


@torch.inference_mode()
def test_a_fresh_refiner_changes_nothing_and_a_trained_one_heeds_the_sweep(network: Mini) -> None:
    seen = network.aggregate(photos(1, 2, 3, 96, 128))
    guess = network.guess(seen)
    matches, features = network.find(seen, guess)
    settled = network.settle(seen, guess, matches)
    maps = torch.ones(1, 2, 96, 128), torch.full((1, 2, 96, 128), 2.0)
    scale = torch.ones(1, 1, 1)
    for after, before in zip(network.reread(maps, settled, features, scale, 1), maps, strict=True):
        assert_close(after, before)
    last = network.depth_head.refiner.last
    bias = last.get_parameter("bias")
    bias[16:32] = 0.5  # trust in the sweep's own change, which is given twofold
    depth, _ = network.reread(maps, settled, features, scale, 1)
    bias.zero_()
    cells = F.avg_pool2d(depth.log(), 8)
    assert cells.abs().max() > 0.01
    assert_close(network.reread(maps, settled, features, scale, 8)[0], maps[0])


@torch.inference_mode()
def test_published_features_find_how_far_a_photo_was_shifted() -> None:
    network = Mini(SMALL).eval()
    wide = F.interpolate(photos(1, 3, 8, 20), (256, 640), mode="bicubic").clamp(0, 1)
    pair = torch.stack([wide[..., 128:512], wide[..., 192:576]], 1)  # it looks to the right
    encoder = load_file(WEIGHTS / "encoder.safetensors")
    network.aggregator.patch_embed.load_state_dict(
        {k: v.float() for k, v in encoder.items()}, strict=False
    )
    seen = network.aggregate(pair)
    matches = matching.find(seen.local, matching.others(seen.local, 2), SHARPNESS, 2)
    shift = (matches.place - matches.own[:, :, None])[0, 1, 0, :, 0]
    assert shift.median() == pytest.approx(32 / 96, abs=0.03)


def test_the_published_local_features_fill_the_encoder() -> None:
    state = load_file(WEIGHTS / "encoder.safetensors")
    shapes = {k: v.shape for k, v in Mini(SMALL).aggregator.patch_embed.state_dict().items()}
    assert {k: v.shape for k, v in state.items()} == {k: shapes[k] for k in state}
    convolutions = {k for k in shapes if len(shapes[k]) == 4 and "colors" not in k}
    assert convolutions <= set(state)
