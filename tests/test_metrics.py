"""Metrics against values worked out by hand."""

import math

import pytest
import torch

from vggt_cli.learning import metrics


def turned(degrees: float, x: float = 0.0, z: float = 0.0) -> torch.Tensor:
    """Extrinsics of a camera turned about the vertical axis, then moved."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, 0, s, x], [0, 1, 0, 0], [-s, 0, c, z]])


def test_relative_errors_are_those_of_the_pairs() -> None:
    true = torch.stack([turned(0), turned(0, x=1), turned(0, x=2)])
    predicted = torch.stack([turned(0), turned(10, x=1), turned(10, x=1, z=1)])
    rotation, direction = metrics.relative_pose_errors(predicted, true)
    assert rotation.tolist() == pytest.approx([10, 10, 0], abs=1e-4)
    # Third pair: from (1, 0, 0) to (1, 0, 1) in axes without relative turn: along z, not x.
    assert direction.tolist() == pytest.approx([0, 45, 90], abs=1e-4)


def test_opposite_directions_count_as_equal_and_still_pairs_have_none() -> None:
    true = torch.stack([turned(0), turned(0, x=1), turned(30, x=1)])
    predicted = torch.stack([turned(0), turned(0, x=-1), turned(30, x=-1)])
    _, direction = metrics.relative_pose_errors(predicted, true)
    assert direction[0] == pytest.approx(0, abs=1e-4)
    same_place = torch.stack([turned(0), turned(20)])
    assert metrics.relative_pose_errors(predicted[:2], same_place)[1].tolist() == [0]


def test_a_pair_without_a_solution_is_as_wrong_as_can_be() -> None:
    true = metrics.relative_poses(torch.stack([turned(0), turned(10, x=1), turned(0, x=2)]))
    found = true.clone()
    found[1] = torch.nan
    rotation, direction = metrics.pair_errors(found, true)
    assert rotation.tolist() == pytest.approx([0, 180, 0], abs=1e-4)
    assert direction.tolist() == pytest.approx([0, 90, 0], abs=1e-4)


def test_relative_errors_do_not_change_with_the_world() -> None:
    from vggt_cli.geometry import compose

    true = torch.stack([turned(0), turned(15, x=1), turned(40, z=2)])
    move = torch.stack([turned(77, x=3, z=-1)] * 3)
    rotation, direction = metrics.relative_pose_errors(compose(true, move), true)
    assert rotation.max() < 1e-2
    assert direction.max() < 1e-2


def test_the_area_under_the_curve_is_the_mean_of_the_shares() -> None:
    rotation, direction = torch.tensor([0.5, 2.5, 50.0, 0]), torch.tensor([0.1, 1, 2, 1.5])
    # Worst errors 0.5, 2.5, 50, 1.5: below 1: 1/4, below 2: 2/4, below 3: 3/4.
    assert metrics.auc(rotation, direction, 3) == pytest.approx(100 * (0.25 + 0.5 + 0.75) / 3)


def test_depth_is_compared_after_aligning_the_medians() -> None:
    true = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    valid = torch.tensor([[True, True, True, False]])
    error, share = metrics.depth_errors(true * 7, true, valid)
    assert error == pytest.approx(0)
    assert share == 1
    error, share = metrics.depth_errors(torch.tensor([[1.0, 2.0, 6.0, 1.0]]), true, valid)
    assert error == pytest.approx(0.5 / 3)
    assert share == pytest.approx(2 / 3)


def test_the_field_of_view_error_is_in_degrees() -> None:
    k = torch.eye(3)[None].repeat(2, 1, 1)
    true = k.clone()
    k[:, 0, 0], true[:, 0, 0] = 50 / math.tan(math.radians(30)), 50 / math.tan(math.radians(20))
    assert metrics.field_of_view_error(k, true, 100) == pytest.approx(20, abs=1e-4)
