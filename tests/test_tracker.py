"""VGGT's track head against its golden numbers, and its laws."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_data import (
    FLOAT64,
    OWN,
    SMALL_VGGT,
    Call,
    Golden,
    filled,
    own_outputs,
    recorded,
    shared_fill,
)
from safetensors.torch import load_file
from torch import Tensor

from vggt_cli.models.layers import Size
from vggt_cli.models.tracker import Followed, TrackConfig, Tracker, embed_flow, sample, sines_at
from vggt_cli.models.vggt import VGGT

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["float32", "float64"]
)


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    return Golden.read(shared / "golden" / "vggt", "small")


@pytest.fixture(scope="module")
def weights(shared: Path) -> VGGT:
    return filled(lambda: VGGT(SMALL_VGGT), shared_fill(shared))


def as_dtype(weights: VGGT, dtype: torch.dtype, *, positions: bool = False) -> VGGT:
    network = VGGT(replace(SMALL_VGGT, track_position_embedding=positions))
    network.load_state_dict(weights.state_dict())
    return network.to(dtype).eval()


def follow(network: VGGT, golden: Golden, case: str) -> Followed:
    dtype = network.aggregator.camera_token.dtype
    images = golden.tensors[f"{case}.images"].to(dtype)
    cached = network.aggregate(images)
    size = (images.shape[-2], images.shape[-1])
    return network.track(cached, size, golden.tensors[f"{case}.query_points"].to(dtype))


def named_tracks(case: str, followed: Followed) -> dict[str, Tensor]:
    got = {f"{case}.track": followed.xy[-1], f"{case}.vis": followed.visibility}
    got |= {f"{case}.track_iter_{k}": xy for k, xy in enumerate(followed.xy)}
    return got | {f"{case}.conf": followed.confidence}


@DTYPES
@pytest.mark.parametrize("case", list("ABCEF"))
def test_tracks_are_the_golden_ones(
    weights: VGGT, golden: Golden, case: str, dtype: torch.dtype
) -> None:
    network = as_dtype(weights, dtype, positions=case == "F")
    with torch.no_grad(), recorded(network) as calls:
        got = named_tracks(case, follow(network, golden, "A" if case == "F" else case))
    if case == "F":
        got["F.track_features"] = features_of(calls)[:, :1]
    compared = {k: v for k, v in got.items() if k in golden.tensors}
    golden.check(compared, dtype)
    assert len(compared) >= 3


def features_of(calls: Mapping[str, list[Call]]) -> Tensor:
    """The feature maps [B, S, C, h, w] before their norm, every fourth channel."""
    maps: Tensor = calls["track_head.tracker.fmap_norm"][0].inputs[0]
    return maps.movedim(-1, 2)[:, :, ::4]


def intermediates(calls: Mapping[str, list[Call]]) -> dict[str, Tensor]:
    def at(name: str, call: int = 0) -> Call:
        return calls[f"track_head.tracker.{name}"][call]

    normed = at("fmap_norm").output
    got = {
        "track_features": features_of(calls),
        "track_fmap_norm": normed[:, :1, ..., ::4],
        "track_corr_0": at("corr_mlp").inputs[0].flatten(0, 1),
        "track_corr_mlp_0": at("corr_mlp").output.flatten(0, 1),
        "track_vis_logit": at("vis_predictor").output.flatten(0, 2),
        "track_conf_logit": at("conf_predictor").output.flatten(0, 2),
        "track_feats_final": at("vis_predictor").inputs[0].flatten(0, 2),
    }
    for k in range(2):
        got[f"track_x_{k}"] = at("updateformer", k).inputs[0]
        got[f"track_delta_{k}"] = at("updateformer", k).output
        # Stages of the first iteration: hooks also see those of the three after it.
        former = "updateformer"
        got[f"track_time_{k}"] = at(f"{former}.time_blocks.{k}").output[:9]
        got[f"track_v2p_{k}"] = at(f"{former}.space_virtual2point_blocks.{k}").output[:, :4]
        got[f"track_virtual_{k}"] = at(f"{former}.space_virtual_blocks.{k}").output[:, :4]
        got[f"track_p2v_{k}"] = at(f"{former}.space_point2virtual_blocks.{k}").output
    return got


@DTYPES
def test_every_intermediate_is_the_golden_one(
    weights: VGGT, golden: Golden, dtype: torch.dtype
) -> None:
    network = as_dtype(weights, dtype)
    with torch.no_grad(), recorded(network) as calls:
        followed = follow(network, golden, "A")
    got = {f"A.{name}": value for name, value in intermediates(calls).items()}
    query = golden.tensors["A.query_points"].to(dtype)[:, :, None] / 2
    maps = calls["track_head.tracker.fmap_norm"][0].output.movedim(-1, 2)
    flow = (followed.xy[0] / 2).transpose(1, 2) - query
    got["A.track_query_feat"] = sample(maps[:, 0], query, "border")[:, :, 0]
    got["A.track_pos_sampled"] = sines_at(query, (35, 49), 100)[:, :, 0]
    got["A.track_flow_emb_1"] = embed_flow(flow, 32)[..., :32].flatten(0, 1)
    got |= named_tracks("A", followed)
    there = {k for k in golden.tensors if k.startswith("A.") and "track" in k}
    assert got.keys() == there | {"A.vis", "A.conf"}
    golden.check(got, dtype)


def test_gradients_of_all_parameters_have_the_golden_lengths(weights: VGGT, golden: Golden) -> None:
    network = as_dtype(weights, torch.float64)
    images = golden.tensors["A.images"].double()
    cached = network.aggregate(images)
    outputs = network.read(cached, (70, 98))
    followed = network.track(cached, (70, 98), golden.tensors["A.query_points"].double())
    assert outputs.points is not None
    assert outputs.points_confidence is not None
    objective = sum(
        (
            *(x.square().mean() for x in outputs.pose_passes),
            outputs.depth.mean() + outputs.confidence.mean(),
            outputs.points.square().mean() + outputs.points_confidence.mean(),
            *((x / 100).square().mean() for x in followed.xy),
            followed.visibility.mean() + followed.confidence.mean(),
        ),
        torch.zeros((), dtype=torch.float64),
    )
    objective.backward()
    want = golden.notes["gradients"]
    assert objective.item() == pytest.approx(want["objective"], rel=1e-9)
    got = {
        k: None if p.grad is None else float(p.grad.norm()) for k, p in network.named_parameters()
    }
    # Differences of coordinates grow from iteration to iteration, and so do their gradients'.
    for name, length in want["l2_norms"].items():
        close = 1e-6 if name.startswith("track_head.") else 1e-8
        assert got[name] == (length and pytest.approx(length, rel=close)), name
    assert {k for k, v in got.items() if v is None} == {"aggregator.patch_embed.mask_token"}


def table_of_sines(size: Size, channels: int) -> Tensor:
    """[channels, h, w] the table that `sines_at` does without. Source: spec vggt 9, step 4d."""
    quarter = channels // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * omega for n in size)
    x, y = (torch.cat([a.sin(), a.cos()], -1) for a in (columns, rows))
    table = torch.cat([x.expand(size[0], -1, -1), y[:, None].expand(-1, size[1], -1)], -1)
    return table.movedim(-1, 0)


def test_sines_at_places_equal_samples_of_their_table() -> None:
    size, generator = (9, 12), torch.Generator().manual_seed(0)
    xy = 16 * torch.rand(2, 5, 3, 2, generator=generator, dtype=torch.float64) - 2
    table = table_of_sines(size, 40).expand(2, -1, -1, -1)
    torch.testing.assert_close(sines_at(xy, size, 40), sample(table, xy, "border"))


def test_correlations_equal_samples_of_maps_of_products() -> None:
    config = TrackConfig(width=8, hidden=16, heads=2, depth=1, levels=2, radius=1)
    tracker, generator = Tracker(config).double(), torch.Generator().manual_seed(0)
    maps = torch.randn(3, 8, 10, 12, generator=generator, dtype=torch.float64)  # B = 1, S = 3
    features = torch.randn(1, 4, 3, 8, generator=generator, dtype=torch.float64)
    xy = 14 * torch.rand(1, 4, 3, 2, generator=generator, dtype=torch.float64) - 2
    got = tracker.correlate(tracker.pyramid(maps), features, xy)  # [1, 4, 3, 2 * 9]
    frame, point, level, right, down = 1, 2, 1, 1, -1
    products = torch.einsum("c,chw->hw", features[0, point, frame], F.avg_pool2d(maps, 2)[frame])
    place = xy[0, point, frame] / 2 + torch.tensor([right, down])
    want = sample(products[None, None], place[None, None, None], "zeros").squeeze() / 8**0.5
    torch.testing.assert_close(got[0, point, frame, 9 * level + 3 * (right + 1) + down + 1], want)


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    torch.manual_seed(0)
    config = TrackConfig(width=8, hidden=16, heads=2, depth=2, levels=2, radius=1, iterations=2)
    return Tracker(config).double().eval()


def random_maps(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


QUERY = torch.tensor([[[4.0, 6.0], [13.5, 2.25], [0.0, 15.0]]], dtype=torch.float64)


def test_points_stay_where_they_were_asked_for_in_the_first_frame(tracker: Tracker) -> None:
    followed = tracker(random_maps(1, 3, 8, 10, 12), QUERY)
    assert followed.xy.shape == (2, 1, 3, 3, 2)
    for xy in followed.xy:
        assert torch.equal(xy[:, 0], QUERY)
        assert not torch.allclose(xy[:, 1], QUERY)


def test_an_iteration_sends_no_gradient_to_the_coordinates_before(tracker: Tracker) -> None:
    followed = tracker(random_maps(1, 3, 8, 10, 12), QUERY)
    bias = tracker.updateformer.flow_head.bias
    (gradient,) = torch.autograd.grad(followed.xy[1, ..., 0].sum(), bias)
    # Two network pixels for each of three points in the two later frames, and nothing besides.
    assert gradient[0] == 2 * 3 * 2
    assert gradient[1] == 0


def test_the_position_embedding_of_the_features_is_a_matter_of_the_checkpoint() -> None:
    fixed = replace(SMALL_VGGT, track_position_embedding=True)
    want = load_file(OWN)["vggt-fixed.track"]
    torch.testing.assert_close(own_outputs(fixed)["track"], want, atol=FLOAT64, rtol=FLOAT64)


def test_permuting_later_frames_permutes_tracks(tracker: Tracker) -> None:
    maps, order = random_maps(1, 4, 8, 10, 12), [0, 2, 3, 1]
    straight, permuted = tracker(maps, QUERY), tracker(maps[:, order], QUERY)
    torch.testing.assert_close(permuted.xy[0], straight.xy[0][:, order])
    torch.testing.assert_close(
        permuted.visibility, straight.visibility[:, order], atol=1e-6, rtol=0
    )


def test_permuting_points_permutes_tracks(tracker: Tracker) -> None:
    maps, order = random_maps(1, 3, 8, 10, 12), [2, 0, 1]
    straight, permuted = tracker(maps, QUERY), tracker(maps, QUERY[:, order])
    torch.testing.assert_close(permuted.xy[0], straight.xy[0][:, :, order])


def test_a_batch_equals_its_members_alone(tracker: Tracker) -> None:
    maps, query = random_maps(2, 3, 8, 10, 12), torch.cat([QUERY, QUERY.flip(1) / 2])
    batch = tracker(maps, query)
    alone = [tracker(m[None], q[None]) for m, q in zip(maps, query, strict=True)]
    torch.testing.assert_close(batch.xy[0], torch.cat([x.xy[0] for x in alone]))


def test_maps_too_small_for_the_pyramid_are_refused() -> None:
    with pytest.raises(AssertionError, match="under 64"):
        Tracker(TrackConfig()).pyramid(torch.zeros(1, 128, 63, 80))
