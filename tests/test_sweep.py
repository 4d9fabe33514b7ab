"""Plane sweeps: the right plane wins, and what is not seen says nothing."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from vggt_cli.models import matching, sweep
from vggt_cli.models.sweep import Cameras

GRID = (12, 16)
FOCAL = 1.5
SHARP = 40.0
MIDDLE = slice(3, -3)  # cells of a row or column that both frames see


def steps(cells: float) -> float:
    """A shift of so many cells, seen at a depth of one, in units of depth."""
    return cells / (max(GRID) / 2) / FOCAL


def side_by_side(*shifts: float) -> Cameras:
    """Cameras that look ahead, so many cells' shift (at a depth of one) beside the first."""
    translation = torch.tensor([[-steps(x), 0.0, 0.0] for x in shifts])[None]
    return Cameras(torch.eye(3).expand(1, len(shifts), 3, 3), translation, torch.tensor([FOCAL]))


def wall(cameras: Cameras, depth: float) -> torch.Tensor:
    """[1, S, C, h, w]: what cameras side by side see of a wall of features unlike each other."""
    shifts = cameras.translation[0, :, 0] * FOCAL * (max(GRID) / 2) / depth
    paint = torch.randn(64, GRID[0], 48, generator=torch.Generator().manual_seed(0))
    first = 16 - shifts.round().long()
    return torch.stack([paint[:, :, a : a + GRID[1]] for a in first.tolist()])[None]


def swept(features: torch.Tensor, cameras: Cameras, guess: float) -> torch.Tensor:
    frames = features.shape[1]
    target = matching.others(features, 2)
    depth = torch.full((1, frames, *GRID), guess)
    return sweep.evidence(features, target, cameras, depth, SHARP)


@pytest.mark.parametrize("guess", [0.7, 1.0, 1.9])
def test_with_true_cameras_the_plane_of_the_wall_wins(guess: float) -> None:
    cameras = side_by_side(0, 3, -3)
    evidence = swept(wall(cameras, 1.0), cameras, guess)
    best = evidence[0, 0, :, :, MIDDLE].argmax(0)
    found = guess * sweep.planes(evidence)[best].exp()
    spacing = 2 * sweep.REACH / (sweep.PLANES - 1)
    assert found.log().abs().median() < 2 * spacing
    assert (found.log().abs() < 4 * spacing).float().mean() > 0.95


def test_the_expected_depth_is_nearer_than_the_guess_and_its_doubt_says_where_to_believe() -> None:
    cameras, guess = side_by_side(0, 3, -3), 1.4
    features = wall(cameras, 1.0)
    chance, change, doubt = sweep.believed(swept(features, cameras, guess))
    assert_close(chance.sum(2), torch.ones_like(change))
    assert change.shape == doubt.shape == (1, 3, *GRID)
    error = (change + torch.tensor(guess).log())[0, 0, :, MIDDLE]
    assert error.abs().median() < 0.1
    blank = sweep.believed(swept(torch.ones_like(features), cameras, guess))
    assert blank.doubt.mean() > 2 * doubt[..., MIDDLE].mean()


@pytest.mark.parametrize("turn", [torch.diag(torch.tensor([-1.0, 1, -1])), torch.eye(3)])
def test_planes_behind_a_camera_or_beside_its_image_are_not_seen(turn: torch.Tensor) -> None:
    cameras = side_by_side(0, 0)
    far = torch.tensor([[0.0, 0, 0], [50, 0, 0]])[None]  # beside it, where it is not turned round
    behind = torch.stack([torch.eye(3), turn])[None]
    translation = far if turn.trace() > 0 else cameras.translation
    evidence = swept(wall(cameras, 1.0), Cameras(behind, translation, cameras.focal), 1.0)
    assert_close(evidence, torch.full_like(evidence, sweep.FLOOR).log())


def test_without_evidence_the_guess_stays_and_its_doubt_is_that_of_the_guess() -> None:
    _, change, doubt = sweep.believed(torch.zeros(1, 2, sweep.PLANES, *GRID))
    assert_close(change, torch.zeros_like(change), atol=1e-5, rtol=0)
    assert_close(doubt, torch.full_like(doubt, sweep.DOUBT), atol=0.02, rtol=0)


def test_sequences_of_a_batch_and_the_frames_beside_do_not_touch_each_other() -> None:
    random = torch.Generator().manual_seed(1)
    features = torch.randn(2, 3, 16, *GRID, generator=random)
    depth = torch.rand(2, 3, *GRID, generator=random) + 0.5
    turn = torch.randn(2, 3, 3, 3, generator=random) * 0.2
    rotation = torch.matrix_exp(turn - turn.mT)
    cameras = Cameras(
        rotation, torch.randn(2, 3, 3, generator=random) * 0.1, torch.tensor([1.2, 1.8])
    )
    target = torch.tensor([[1, 2], [0, 2], [0, 1]]).expand(2, 3, 2)
    both = sweep.evidence(features, target, cameras, depth, SHARP)
    alone = sweep.evidence(
        features[1:], target[1:], Cameras(*(x[1:] for x in cameras)), depth[1:], SHARP
    )
    assert_close(alone[0], both[1], atol=1e-4, rtol=1e-4)
    other = depth.clone()
    other[:, 1:] *= 2  # the guess of other frames says nothing about the first
    again = sweep.evidence(features, target, cameras, other, SHARP)
    assert_close(again[:, 0], both[:, 0])


def test_the_evidence_of_a_point_is_its_likeness_where_it_is_seen() -> None:
    cameras = side_by_side(0, 4)
    features = wall(cameras, 1.0)
    evidence = swept(features, cameras, float(torch.exp(-sweep.planes(features)[20])))
    unit = F.normalize(features[0].flatten(2), dim=1).mT
    alike = (SHARP * unit[0] @ unit[1].mT).exp()
    chance = (alike / alike.sum(0)) * (alike / alike.sum(1, keepdim=True))
    row, column = 5, 9  # at a depth of one it is seen four cells further left
    wanted = chance[row * GRID[1] + column, row * GRID[1] + column - 4] + sweep.FLOOR
    assert_close(evidence[0, 0, 20, row, column], wanted.log(), atol=1e-3, rtol=1e-3)
