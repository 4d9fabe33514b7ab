"""VGGT's losses: golden values and gradients, and what they must do by their meaning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vggt_cli.geometry import encode_pose, unproject
from vggt_cli.learning import losses_vggt, synthetic
from vggt_cli.learning.labels import Labels
from vggt_cli.learning.losses import Truth
from vggt_cli.learning.objectives import VGGT_WEIGHTS

NAMES = {"regression": "reg", "confidence": "conf", "gradient": "grad"}


@pytest.fixture
def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in float64, and the report; skipped without the shared folder."""
    folder = shared / "golden/vggt/losses"
    tensors = load_file(folder / "losses.safetensors")
    as_double = {k: v if v.dtype == torch.bool else v.double() for k, v in tensors.items()}
    return as_double, json.loads((folder / "losses.json").read_text())


def raw(tensors: dict[str, Tensor]) -> Truth:
    """The truth with the half pixel by which VGGT's own rays differ from those of centres."""
    half = torch.zeros(3, 3).double()
    half[:2, 2] = 0.5
    return Truth(
        tensors["gt.extrinsics"],
        tensors["gt.intrinsics"] + half,
        tensors["gt.depths"],
        tensors["gt.point_masks"],
    )


def true_points(tensors: dict[str, Tensor]) -> Tensor:
    """As the golden data makes them: from the stored rotations, which are nearly rotations."""
    truth = raw(tensors)
    _, scale = losses_vggt.normalize(truth)
    first = truth.extrinsics[:, :1, None]
    points = unproject(truth.depth, truth.intrinsics, truth.extrinsics)
    seen = points @ first[..., :3].mT + first[..., None, :, 3]
    return seen / scale[:, None, None, None, None]


def predicted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("depth", "depth_conf", "world_points", "world_points_conf")
    passes = {f"pose_enc_list.{k}": tensors[f"pred.pose_enc_list.{k}"] for k in range(4)}
    found = {**passes, **{name: tensors[f"pred.{name}"] for name in names}}
    return {name: value.clone().requires_grad_() for name, value in found.items()}


def all_parts(
    tensors: dict[str, Tensor], leaves: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    truth, _ = losses_vggt.normalize(raw(tensors))
    lenses = tensors["gt.intrinsics"]  # fields of view know nothing of the half pixel
    passes = torch.stack([leaves[f"pose_enc_list.{k}"] for k in range(4)])
    return (
        losses_vggt.camera_parts(passes, truth._replace(intrinsics=lenses)),
        losses_vggt.depth_parts(leaves["depth"][..., 0], leaves["depth_conf"], truth),
        losses_vggt.point_parts(
            leaves["world_points"],
            leaves["world_points_conf"],
            true_points(tensors),
            truth.valid,
        ),
    )


def test_golden_normalisation(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, report = golden
    truth, scale = losses_vggt.normalize(raw(tensors))
    close = torch.testing.assert_close
    close(scale, torch.tensor(report["scale_divisors"]).double(), rtol=1e-6, atol=0)
    close(truth.depth[:, :1], tensors["norm.depths"], rtol=1e-9, atol=0)
    close(truth.extrinsics, tensors["norm.extrinsics"], rtol=0, atol=1e-9)
    close(true_points(tensors)[:, :1], tensors["norm.world_points"], rtol=0, atol=1e-9)
    # From the normalised truth they differ by as much as float32 rotations are none.
    points = unproject(truth.depth, truth.intrinsics, truth.extrinsics)
    close(points[:, :1], tensors["norm.world_points"], rtol=0, atol=1e-6)


def test_golden_values_and_gradients(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, report = golden
    values = report["variants"]["released_configuration_plus_point_head"]["values"]
    leaves = predicted(tensors)
    camera, depth, point = all_parts(tensors, leaves)
    found = {
        "loss_T": camera["translation"],
        "loss_R": camera["rotation"],
        "loss_FL": camera["field of view"],
        "loss_camera": losses_vggt.camera_sum(camera),
        **{f"loss_{NAMES[name]}_depth": value for name, value in depth.items()},
        **{f"loss_{NAMES[name]}_point": value for name, value in point.items()},
    }
    weights = VGGT_WEIGHTS
    found["objective"] = (
        weights.camera * found["loss_camera"]
        + weights.depth * torch.stack(list(depth.values())).sum()
        + weights.point * torch.stack(list(point.values())).sum()
    )
    assert set(found) == set(values)
    for name, value in found.items():
        assert float(value.detach()) == pytest.approx(values[name], abs=1e-9), name
    found["objective"].backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        got = leaf.grad[:, 1:2] if name == "world_points" else leaf.grad
        torch.testing.assert_close(got, tensors[f"grad.{name}"], atol=1e-10, rtol=1e-7, msg=name)


def test_golden_errors_without_the_quantile(
    golden: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    tensors, report = golden
    values = report["variants"]["no_quantile_filter"]["values"]
    truth, _ = losses_vggt.normalize(raw(tensors))
    of_depth = (tensors["pred.depth"][..., 0] - truth.depth)[..., None]
    of_points = tensors["pred.world_points"] - true_points(tensors)
    for difference, sure, name in (
        (of_depth, "depth_conf", "depth"),
        (of_points, "world_points_conf", "point"),
    ):
        error, doubt = losses_vggt.errors(difference, tensors[f"pred.{sure}"], truth.valid)
        assert float(error.mean()) == pytest.approx(values[f"loss_reg_{name}"], abs=1e-9)
        assert float(doubt.mean()) == pytest.approx(values[f"loss_conf_{name}"], abs=1e-9)


def test_golden_gradient_terms_under_their_confidence(
    golden: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    tensors, report = golden
    values = report["variants"]["confidence_in_gradient_terms"]["values"]
    truth, _ = losses_vggt.normalize(raw(tensors))
    difference = (tensors["pred.depth"][..., 0] - truth.depth)[..., None]
    jumps = losses_vggt.gradient_loss(difference, truth.valid, tensors["pred.depth_conf"])
    assert float(jumps) == pytest.approx(values["loss_grad_depth"], abs=1e-9)
    points, true = tensors["pred.world_points"], true_points(tensors)
    sure = tensors["pred.world_points_conf"]
    normals = losses_vggt.normal_loss(points, true, truth.valid, sure)
    assert float(normals) == pytest.approx(values["loss_grad_point"], abs=1e-9)
    # Each of a point's three coordinates counts like a depth under the same confidence.
    thrice = losses_vggt.gradient_loss(difference.expand(-1, -1, -1, -1, 3), truth.valid, sure)
    once = losses_vggt.gradient_loss(difference, truth.valid, sure)
    assert float(thrice) == pytest.approx(float(once), abs=1e-12)


def test_golden_tracks(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, report = golden
    values = report["track"]["values"]
    passes = [tensors[f"track.pred.{k}"].clone().requires_grad_() for k in range(4)]
    logits = [tensors[f"track.{x}_logit"].clone().requires_grad_() for x in ("vis", "conf")]
    visibility, confidence = (x.sigmoid() for x in logits)
    labels = Labels(tensors["track.gt"], tensors["track.gt_visible"])
    parts = losses_vggt.track_parts(torch.stack(passes), visibility, confidence, labels)
    for name, of in (("place", "track"), ("visibility", "vis"), ("sureness", "conf")):
        assert float(parts[name].detach()) == pytest.approx(values[f"{of}_loss"], abs=1e-9)
    torch.stack(list(parts.values())).sum().backward()
    names = [*"0123", "vis_logit", "conf_logit"]
    for name, leaf in zip(names, [*passes, *logits], strict=True):
        torch.testing.assert_close(leaf.grad, tensors[f"track.grad.{name}"], atol=1e-10, rtol=0)


def rendered() -> Truth:
    found = synthetic.sample(0, synthetic.Path(3, (64, 96), 0.4))
    c = found.cameras
    truth = Truth(c.extrinsics[None], c.intrinsics[None], found.depth[None], found.valid[None])
    return losses_vggt.normalize(truth)[0]


def test_the_truth_itself_has_no_error() -> None:
    truth = rendered()
    encoding = encode_pose(truth.extrinsics, truth.intrinsics, (64, 96))
    camera = losses_vggt.camera_parts(encoding.expand(4, -1, -1, -1), truth)
    sure = torch.ones_like(truth.depth)
    depth = losses_vggt.depth_parts(truth.depth, sure, truth)
    true = unproject(truth.depth, truth.intrinsics, truth.extrinsics)
    point = losses_vggt.point_parts(true, sure, true, truth.valid)
    for parts in (camera, depth, point):
        assert all(float(value) < 1e-6 for value in parts.values()), parts


def test_sequences_without_a_valid_first_frame_or_pixel_cost_nothing() -> None:
    truth = rendered()
    passes = torch.randn(4, 1, 3, 9)
    valid = truth.valid.clone()
    valid[:, 0] = False
    first = losses_vggt.camera_parts(passes, truth._replace(valid=valid))
    empty = truth._replace(valid=torch.zeros_like(valid))
    depth = losses_vggt.depth_parts(truth.depth + 1, torch.ones_like(truth.depth), empty)
    none = Labels(torch.rand(1, 3, 8, 2), torch.zeros(1, 3, 8, dtype=torch.bool))
    half = torch.full((1, 3, 8), 0.5)
    track = losses_vggt.track_parts(torch.rand(4, 1, 3, 8, 2), half, half, none)
    for parts in (first, depth, track):
        assert all(float(value) == 0 for value in parts.values()), parts


def test_the_largest_errors_are_left_out_where_there_are_enough() -> None:
    values = torch.arange(2000.0).flip(0) / 2000
    kept = losses_vggt.usual(values)
    assert len(kept) == round(0.98 * 1999)
    assert kept.max() < values.sort().values[round(0.98 * 1999)]
    assert len(losses_vggt.usual(values[:1000])) == 1000
    assert len(losses_vggt.usual(values[:1010])) == 1010  # too few would be left
