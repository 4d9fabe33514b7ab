"""Losses: golden values, and what they must do by their meaning."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vggt_cli.geometry import encode_pose, unproject
from vggt_cli.learning import losses, synthetic
from vggt_cli.learning.labels import Labels
from vggt_cli.learning.losses import Truth
from vggt_cli.learning.losses_matching import matching_loss
from vggt_cli.learning.objectives import OMEGA_WEIGHTS, Batch, omega_terms, total
from vggt_cli.models.layers import Outputs


def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    folder = shared / "golden/vggt_omega/losses"
    report = json.loads((folder / "losses.json").read_text())
    values = {**report["results"]["warmup"]["values"], **report["pieces"]}
    return load_file(folder / "losses.safetensors"), values


def normalized(tensors: dict[str, Tensor]) -> Truth:
    valid = tensors["gt.point_masks"].bool()
    return Truth(
        tensors["norm.extrinsics"], tensors["gt.intrinsics"], tensors["norm.depths"], valid
    )


def test_golden_normalisation(shared: Path) -> None:
    tensors, _ = golden(shared)
    raw = Truth(
        tensors["gt.extrinsics"],
        tensors["gt.intrinsics"],
        tensors["gt.depths"],
        tensors["gt.point_masks"].bool(),
    )
    found, scale = losses.normalize(raw)
    torch.testing.assert_close(scale, tensors["norm.scale"], atol=1e-12, rtol=0)
    torch.testing.assert_close(found.depth, tensors["norm.depths"], atol=1e-12, rtol=0)
    torch.testing.assert_close(found.extrinsics, tensors["norm.extrinsics"], atol=1e-9, rtol=0)


def test_golden_camera_terms(shared: Path) -> None:
    tensors, values = golden(shared)
    truth = normalized(tensors)
    parts = losses.camera_parts(tensors["pred.pose_enc"], truth)
    assert float(parts["translation"]) == pytest.approx(values["loss_T"], abs=1e-9)
    assert float(parts["rotation"]) == pytest.approx(values["loss_R"], abs=1e-9)
    assert float(parts["field of view"]) == pytest.approx(values["loss_FL"], abs=1e-9)
    assert float(parts["pairs"]) == pytest.approx(values["loss_PW"], abs=1e-9)
    total = float(losses.camera_loss(tensors["pred.pose_enc"], truth))
    assert total == pytest.approx(values["loss_camera"], abs=1e-9)


def test_golden_depth_terms(shared: Path) -> None:
    tensors, values = golden(shared)
    depth, confidence = tensors["pred.depth"][..., 0], tensors["pred.depth_conf"]
    parts = losses.depth_parts(depth, confidence, normalized(tensors))
    assert float(parts["regression"]) == pytest.approx(values["loss_reg_depth"], abs=1e-9)
    assert float(parts["confidence"]) == pytest.approx(values["loss_conf_depth"], abs=1e-9)


@pytest.mark.parametrize(
    ("step", "x", "y"),
    [(1, 0, 0), (2, 0, 0), (2, 1, 1), (4, 0, 0), (4, 3, 2), (8, 0, 0), (8, 7, 4)],
)
def test_golden_gradient_terms(shared: Path, step: int, x: int, y: int) -> None:
    tensors, values = golden(shared)
    depth = tensors["pred.depth"][..., 0]
    found = losses.gradient_at(depth, normalized(tensors), step, (x, y), 16)
    expected = values[f"gradient_loss_step{step}_x{x}_y{y}"]
    assert float(found) == pytest.approx(expected, abs=1e-9)


def test_offsets_are_drawn_within_the_step() -> None:
    drawn = torch.tensor(
        [losses.random_offsets(torch.Generator().manual_seed(seed)) for seed in range(200)]
    )  # [200, 4 steps, 2]
    assert torch.equal(drawn.amin((0, 2)), torch.zeros(4, dtype=torch.long))
    assert drawn.amax((0, 2)).tolist() == [0, 1, 3, 7]


def test_golden_normal_term_and_depth_edges(shared: Path) -> None:
    tensors, values = golden(shared)
    truth = normalized(tensors)
    edges = losses.depth_edges(truth).flatten(0, 1)
    assert torch.equal(edges, tensors["piece.depth_edge"].bool())
    found = float(losses.normal_loss(tensors["pred.depth"][..., 0], truth))
    assert found * (1 + 1e-6) == pytest.approx(values["normal_loss"], abs=1e-9)


def batch(tensors: dict[str, Tensor], exact: tuple[bool, bool]) -> Batch:
    """The golden batch as the objective of VGGT-Omega takes it, without its images."""
    labels = Labels(tensors["gt.tracks"], tensors["gt.track_vis_mask"] > 0)
    offsets = [(0, 0), (1, 1), (0, 3), (1, 7)]
    nothing = torch.empty(2, 3, 3, 0, 0)
    return Batch(nothing, normalized(tensors), labels, torch.tensor(exact), offsets)


def leaves(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    names = ("pose_enc", "depth", "depth_conf")
    encoding, depth, confidence = (tensors[f"pred.{x}"].clone().requires_grad_() for x in names)
    return encoding, depth, confidence


@pytest.mark.parametrize("phase", ["warmup", "after_warmup"])
def test_golden_gradients_of_the_whole_objective(shared: Path, phase: str) -> None:
    """All terms together; only the first sequence is synthetic and has exact depth edges."""
    tensors, _ = golden(shared)
    encoding, depth, confidence = leaves(tensors)
    folder = shared / "golden/vggt_omega/losses"
    results = json.loads((folder / "losses.json").read_text())["results"][phase]
    values = results["values"]
    terms, _ = omega_terms(
        Outputs(encoding[None], depth[..., 0], confidence),
        batch(tensors, (True, False)),
        results["schedule_progress"],
        fewest=256,
    )
    names = {"camera": "camera", "depth": "depth", "point": "point", "track": "consistency"}
    for name, published in names.items():
        expected = values[f"loss_{published}"]
        assert float(terms[name].detach()) == pytest.approx(expected, abs=1e-9), name
    whole = total(terms, OMEGA_WEIGHTS)
    assert float(whole.detach()) == pytest.approx(values["loss_objective"], abs=1e-9)
    whole.backward()
    for name, leaf in (("depth", depth), ("depth_conf", confidence), ("pose_enc", encoding)):
        torch.testing.assert_close(leaf.grad, tensors[f"{phase}.grad_{name}"], atol=1e-10, rtol=0)


def test_golden_losses_without_exact_edges_or_without_a_sequence(shared: Path) -> None:
    tensors, _ = golden(shared)
    encoding, depth, confidence = (x.detach() for x in leaves(tensors))
    truth = normalized(tensors)
    points = losses.predicted_points(depth[..., 0], encoding, truth, 0.3)
    report = json.loads((shared / "golden/vggt_omega/losses/losses.json").read_text())["results"]
    offsets = [(0, 0), (1, 1), (0, 3), (1, 7)]
    for case, exact, used in (
        ("no_synthetic_scene", (False, False), (True, True)),
        ("second_scene_without_depth_training", (True, False), (True, False)),
    ):
        used_truth = losses.of_sequences(truth, torch.tensor(used))
        found = losses.depth_loss(
            depth[..., 0], confidence, used_truth, torch.tensor(exact), offsets, fewest=256
        )
        values = report[case]["values"]
        assert float(found) == pytest.approx(values["loss_depth"], abs=1e-9), case
        off = float(losses.point_loss(points, used_truth))
        assert off == pytest.approx(values["loss_point"], abs=1e-9), case


def test_depth_far_beyond_the_limit_still_pulls_back() -> None:
    truth = Truth(torch.eye(3, 4), torch.eye(3), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2) > 0)
    depth = torch.tensor([[[[500.0, -500.0]]]], requires_grad=True)
    regression = losses.depth_parts(depth, torch.ones_like(depth), truth)["regression"]
    regression.backward()
    assert depth.grad is not None
    assert depth.grad[0, 0, 0, 0] > 0  # too far: the gradient is kept
    assert depth.grad[0, 0, 0, 1] == 0


def rendered(seed: int = 0) -> Truth:
    found = synthetic.sample(seed, synthetic.Path(3, (64, 96), 0.4))
    c = found.cameras
    raw = Truth(c.extrinsics[None], c.intrinsics[None], found.depth[None], found.valid[None])
    return losses.normalize(raw)[0]


def test_the_truth_itself_has_no_error() -> None:
    truth = rendered()
    encoding = encode_pose(truth.extrinsics, truth.intrinsics, (64, 96))
    assert float(losses.camera_loss(encoding, truth)) < 1e-4
    assert float(losses.depth_loss(truth.depth, torch.ones_like(truth.depth), truth)) < 1e-3
    points = unproject(truth.depth, truth.intrinsics, truth.extrinsics)
    assert float(losses.point_loss(points, truth)) == 0
    flipped = torch.cat([encoding[..., :3], -encoding[..., 3:7], encoding[..., 7:]], -1)
    assert float(losses.camera_loss(flipped, truth)) < 1e-4  # q and -q are one rotation


def test_features_that_are_the_place_in_the_world_match_best() -> None:
    truth = rendered()
    points, _ = losses.patch_points(truth, 16)
    features = torch.cat([points, torch.ones_like(points[..., :1])], -1).flatten(2, 3)
    of_place = torch.cat([features * 5, (features[..., :1] * 9).sin()], -1)
    loss, found = matching_loss(of_place - of_place.mean((1, 2), keepdim=True), truth, 16)
    blind, chance = matching_loss(torch.randn(of_place.shape), truth, 16)
    assert found > 4 * chance
    assert loss < blind


def test_nothing_to_match_costs_nothing() -> None:
    truth = rendered()
    unseen = truth._replace(valid=torch.zeros_like(truth.valid))
    assert matching_loss(torch.randn(1, 3, 24, 8), unseen, 16).tolist() == [0, 0]
