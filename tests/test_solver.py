"""The solver inside mini: exact on exact matches, hardly moved by wrong ones."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from vggt_cli.models import matching, solver
from vggt_cli.models.matching import Matches

GRID = (6, 8)
FOCAL = 1.5


def scene(frames: int, seed: int = 0) -> tuple[Matches, Tensor, Tensor, Tensor]:
    """Exact matches of a bumpy wall, its depths [1, S, N], rotations and translations."""
    random = torch.Generator().manual_seed(seed)
    N = GRID[0] * GRID[1]
    own = torch.stack([_cells() for _ in range(frames)])[None]  # [1, S, N, 2]
    spin = 0.25 * torch.randn(frames, 3, generator=random)
    spin[0] = 0
    R = torch.stack([_turn(v) for v in spin])[None]
    depth = 2 + torch.rand(1, frames, N, generator=random)
    # The wall is before every camera: they turn about a point three units away.
    middle = torch.tensor([0.0, 0.0, 3.0])
    t = middle - (R @ middle[:, None])[..., 0] + 0.1 * torch.randn(1, frames, 3, generator=random)
    t[:, 0] = 0
    rays = F.pad(own / FOCAL, (0, 1), value=1.0) * depth[..., None]
    world = (rays - t[:, :, None]) @ R  # [1, S, N, 3]
    order = torch.arange(frames)
    target = (order[:, None] + order[1:]).remainder(frames)[None]  # [1, S, K]
    seen = world[:, :, None] @ R[0, target].mT + t[0, target][..., None, :]
    place = FOCAL * seen[..., :2] / seen[..., 2:]
    assert seen[..., 2].min() > 0.5
    cell = torch.arange(N).expand(1, frames, N)
    certainty = torch.ones(1, frames, frames - 1, N)
    best = torch.zeros_like(certainty, dtype=torch.int64)  # the solver does not ask
    return Matches(cell, own, target, place, certainty, best), depth, R, t


def _cells() -> Tensor:
    h, w = GRID
    rows, columns = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    return (torch.stack([columns, rows], -1).flatten(0, 1) - torch.tensor([w / 2, h / 2])) / 4


def _turn(v: Tensor) -> Tensor:
    x, y, z = v.tolist()
    turn: Tensor = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]]))
    return turn


def pairwise(features: Tensor) -> Matches:
    """Matches of every frame with all others."""
    return matching.find(features, matching.others(features, 2), 20.0, 2)


def chart(depth: Tensor) -> Tensor:
    """[1, S, *GRID] of the depths of all cells."""
    found: Tensor = depth.unflatten(-1, GRID)
    return found


def degrees(a: Tensor, b: Tensor) -> float:
    """The largest angle between rotations."""
    cosine = (torch.diagonal(a.mT @ b, dim1=-2, dim2=-1).sum(-1) - 1) / 2
    return math.degrees(float(cosine.clamp(-1, 1).acos().max()))


def directions(a: Tensor, b: Tensor) -> float:
    """The largest angle in degrees between translations of the frames after the first."""
    cosine = F.cosine_similarity(a[:, 1:], b[:, 1:], dim=-1)
    return math.degrees(float(cosine.clamp(-1, 1).acos().max()))


def still(like: Tensor) -> solver.Pose:
    B, S = like.shape[:2]
    return torch.eye(3).expand(B, S, 3, 3), torch.zeros(B, S, 3)


@pytest.mark.parametrize("frames", [2, 3, 6])
def test_exact_matches_and_depths_give_the_cameras(frames: int) -> None:
    matches, depth, R, t = scene(frames)
    found = solver.cameras(matches, chart(depth), still(depth), torch.tensor([FOCAL]))
    assert degrees(found.rotation, R) < 0.5
    assert directions(found.translation, t) < 1
    assert_close(found.focal, torch.tensor([FOCAL]), rtol=0.02, atol=0)
    scale = (depth / found.depth).median()  # guessed, not measured
    assert 0.8 < float(scale) < 1.25
    assert_close(found.depth * scale, depth, rtol=0.03, atol=0)
    assert found.agreement.min() > 0.95


def test_many_frames_are_solved_after_threads_were_asked_for() -> None:
    matches, depth, R, _ = scene(30)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # from then on MKL's LU of several large matrices is wrong
        found = solver.cameras(matches, chart(depth), still(depth), torch.tensor([FOCAL]))
    finally:
        torch.set_num_threads(threads)
    assert degrees(found.rotation, R) < 0.5


def test_without_depth_the_cameras_are_found_all_the_same() -> None:
    matches, depth, R, t = scene(4, seed=1)
    flat = torch.full_like(depth, 2.5)
    found = solver.cameras(matches, chart(flat), still(depth), torch.tensor([solver.FOCAL]))
    assert degrees(found.rotation, R) < 5
    assert directions(found.translation, t) < 10
    assert abs(float(found.focal) / FOCAL - 1) < 0.1


def test_wrong_matches_hardly_matter_and_are_known_afterwards() -> None:
    matches, depth, R, t = scene(4, seed=2)
    random = torch.Generator().manual_seed(0)
    wrong = torch.rand(matches.certainty.shape, generator=random) < 0.3
    anywhere = 2 * torch.rand(matches.place.shape, generator=random) - 1
    matches = matches._replace(place=torch.where(wrong[..., None], anywhere, matches.place))
    noisy = depth * torch.exp(0.1 * torch.randn(depth.shape, generator=random))
    found = solver.cameras(matches, chart(noisy), still(depth), torch.tensor([FOCAL]))
    assert degrees(found.rotation, R) < 2
    assert directions(found.translation, t) < 4
    assert found.agreement[wrong].mean() < 0.2
    assert found.agreement[~wrong].mean() > 0.8


def test_the_first_camera_is_the_world() -> None:
    matches, depth, *_ = scene(3)
    found = solver.cameras(matches, chart(depth), still(depth), torch.tensor([FOCAL]))
    assert torch.equal(found.rotation[:, 0], torch.eye(3)[None])
    assert torch.equal(found.translation[:, 0], torch.zeros(1, 3))


def test_sequences_of_a_batch_do_not_touch_each_other() -> None:
    a, b = scene(3, seed=3), scene(3, seed=4)
    matches = Matches(*(torch.cat(x) for x in zip(a[0], b[0], strict=True)))
    depth = torch.cat([a[1], b[1]])
    focal = torch.full((2,), FOCAL)
    both = solver.cameras(matches, chart(depth), still(depth), focal)
    one = solver.cameras(b[0], chart(b[1]), still(b[1]), focal[:1])
    assert_close(both.rotation[1:], one.rotation, atol=1e-3, rtol=0)
    assert_close(both.translation[1:], one.translation, atol=2e-3, rtol=0)


def test_one_frame_stays_where_it_is() -> None:
    matches = pairwise(torch.randn(2, 1, 8, 6, 8, generator=torch.Generator().manual_seed(0)))
    depth = torch.full((2, 1, 6 * 8), 2.0)
    found = solver.cameras(matches, chart(depth), still(depth), torch.full((2,), FOCAL))
    assert_close(found.rotation, torch.eye(3).expand(2, 1, 3, 3))
    assert found.translation.abs().max() == 0
    assert_close(found.depth, depth[:, :, :12])  # one cell of each patch
