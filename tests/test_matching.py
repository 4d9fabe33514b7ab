"""Matches of cells: where features are the same, they are found; a head makes them finer."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vggt_cli.geometry import project
from vggt_cli.learning import losses, synthetic
from vggt_cli.learning.losses import Truth
from vggt_cli.learning.losses_matching import match_loss
from vggt_cli.models import matching
from vggt_cli.models.matching import Matches, MatchHead


def pairwise(features: Tensor) -> Matches:
    """Matches of every frame with all others."""
    return matching.find(features, matching.others(features, 2), 20.0, 2)


def test_matches_of_a_frame_that_moved_are_where_it_came_from() -> None:
    first = torch.randn(1, 64, 6, 8, generator=torch.Generator().manual_seed(0))
    moved = first.roll((2, 4), (2, 3))  # two cells down, four to the right: one patch, two patches
    matches = pairwise(torch.stack([first, moved], 1))
    back, on = matches.place[0, 1, 0], matches.own[0, 1]
    row, column = matches.cell[0, 1] // 8, matches.cell[0, 1] % 8
    stays = (row >= 2) & (column >= 4)
    shift = torch.tensor([4.0, 2.0]) / 4  # halves of eight cells
    assert_close(back[stays], on[stays] - shift, atol=2e-3, rtol=0)
    assert matches.certainty[0, 1, 0, stays].min() > 0.95
    assert torch.equal(matches.target[0], torch.tensor([[1], [0]]))


def test_of_each_patch_the_surest_cells_come_first() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(1, 2, 16, 6, 8, generator=random)
    target = matching.others(features, 2)
    one, three = (matching.find(features, target, 20.0, 2, count) for count in (1, 3))
    assert torch.equal(one.cell, three.cell[..., :12])
    assert_close(one.place, three.place[..., :12, :])
    assert_close(one.certainty, three.certainty[..., :12])
    patch = three.cell // 16 * 4 + three.cell % 8 // 2
    assert torch.equal(patch[..., :12], patch[..., 12:24])
    assert len(set(three.cell[0, 0].tolist())) == 36


def test_what_is_nowhere_else_has_no_certain_match() -> None:
    random = torch.Generator().manual_seed(0)
    matches = pairwise(torch.randn(1, 2, 64, 6, 8, generator=random))
    assert matches.certainty.median() < 0.5


def test_of_many_frames_the_most_alike_are_matched_and_those_beside() -> None:
    random = torch.Generator().manual_seed(0)
    places = torch.randn(3, 16, 6, 8, generator=random)
    features = places[[0, 1, 2, 0, 1, 2, 0, 1, 2]][None]  # every third frame is the same
    target = matching.others(features, 2, 4)
    assert target.shape == (1, 9, 4)
    assert set(target[0, 4].tolist()) == {3, 5, 1, 7}
    assert set(target[0, 0].tolist()) >= {1, 3, 6}


def test_more_frames_than_are_matched_at_a_time_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = torch.randn(2, 5, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = pairwise(features)
    monkeypatch.setattr(matching, "CHUNK", 2)
    for a, b in zip(whole, pairwise(features), strict=True):
        assert_close(a, b)


def rendered() -> tuple[Truth, Tensor]:
    """Three frames, and features of their cells that know the point at the middle."""
    sample = synthetic.sample(3, synthetic.Path(3, (96, 128), 0.3))
    cameras = sample.cameras
    parts = (cameras.extrinsics, cameras.intrinsics, sample.depth, sample.valid)
    truth, _ = losses.normalize(Truth(*(x[None] for x in parts)))
    points, valid = losses.patch_points(truth, 8)
    waves = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)) * 3
    features = torch.cat([(points @ waves).sin(), (points @ waves).cos()], -1)
    return truth, (features * valid[..., None]).permute(0, 1, 4, 2, 3)


def errors(matches: Matches, truth: Truth) -> Tensor:
    """How far each certain match is from the truth, in cells."""
    points, _ = losses.patch_points(truth, 8)
    points = points.flatten(2, 3).gather(2, matches.cell[..., None].expand(-1, -1, -1, 3))
    found = []
    for k in range(matches.target.shape[2]):
        frame = matches.target[0, :, k]
        lens, pose = truth.intrinsics[:, frame], truth.extrinsics[:, frame]
        xy, _ = project(points[..., None, :], lens, pose)
        half = torch.tensor([128.0, 96.0]) / 2
        apart = (xy[..., 0, :] - half) / 64 - matches.place[:, :, k]
        found.append(apart.norm(dim=-1)[matches.certainty[:, :, k] > 0.2] * 8)
    return torch.cat(found)


def test_a_head_learns_where_in_a_cell_a_match_lies() -> None:
    torch.manual_seed(0)
    truth, features = rendered()
    head = MatchHead(48, 64)
    rough = matching.find(features, matching.others(features, 2), 20.0, 2)
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    terms = []
    for _ in range(150):
        said = matching.judge(rough, features, head)
        place, whether = match_loss(rough, said, truth, 8)
        optimizer.zero_grad()
        (place + whether).backward()
        optimizer.step()
        terms.append((place.item(), whether.item()))
    fine = matching.refine(rough, features, head)
    assert terms[-1][0] < terms[0][0] - 0.5, terms[::30]
    assert terms[-1][1] < 0.7 * terms[0][1], terms[::30]
    assert errors(fine, truth).median() < 0.6 * errors(rough, truth).median()


def test_nothing_to_see_is_no_match_for_a_head() -> None:
    truth, features = rendered()
    unseen = truth._replace(valid=torch.zeros_like(truth.valid))
    rough = matching.find(features, matching.others(features, 2), 20.0, 2)
    said = matching.judge(rough, features, MatchHead(48, 8))
    place, whether = match_loss(rough, said, unseen, 8)
    assert place == 0
    assert whether > 0


def test_what_is_not_exact_counts_less() -> None:
    _, features = rendered()
    rough = matching.find(features, matching.others(features, 2), 20.0, 2)
    head = MatchHead(48, 8)
    sure = matching.refine(rough, features, head).certainty
    with torch.no_grad():
        head.layers[4].get_parameter("bias")[2] += 9.0  # e^9 times less exact
    assert (matching.refine(rough, features, head).certainty < 0.01 * sure).all()
