"""Laws of similarities: they form a group, are found from points, and move cameras."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_geometry import random_cameras, random_rotations
from torch import Tensor
from torch.testing import assert_close

from vggt_cli import geometry
from vggt_cli.errors import GeometryError
from vggt_cli.scene import Cameras, Similarity

SEEDS = st.integers(0, 10_000)
IDENTITY = Similarity(1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


def drawn(seed: int) -> Similarity:
    random = torch.Generator().manual_seed(seed)
    scale = float(torch.randn(1, generator=random, dtype=torch.float64).exp())
    translation = 3 * torch.randn(3, generator=random, dtype=torch.float64)
    return Similarity(scale, random_rotations(seed=seed), translation)


def points(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(a: Similarity, b: Similarity) -> None:
    assert a.scale == pytest.approx(b.scale, rel=1e-9)
    assert_close(a.rotation, b.rotation, atol=1e-9, rtol=0)
    assert_close(a.translation, b.translation, atol=1e-8, rtol=1e-9)


@settings(deadline=None, max_examples=20)
@given(SEEDS, SEEDS, SEEDS)
def test_similarities_are_a_group_that_acts_on_points(i: int, j: int, k: int) -> None:
    a, b, c = drawn(i), drawn(j), drawn(k)
    assert_equal((a @ b) @ c, a @ (b @ c))
    assert_equal(a @ IDENTITY, a)
    assert_equal(IDENTITY @ a, a)
    assert_equal(a @ a.inverse, IDENTITY)
    assert_equal(a.inverse @ a, IDENTITY)
    assert_close((a @ b)(points(5)), a(b(points(5))))


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(3, 12))
def test_a_similarity_is_found_from_what_it_does_to_points(seed: int, n: int) -> None:
    true = drawn(seed)
    x = points(n, seed)
    assert_equal(geometry.fit_similarity(x, true(x), torch.ones(n)), true)


def test_points_without_weight_do_not_count() -> None:
    true, x = drawn(3), points(6)
    y = true(x)
    y[4:] += 100
    assert_equal(geometry.fit_similarity(x, y, torch.tensor([1.0, 2, 3, 1, 0, 0])), true)


def test_weights_are_counts_and_no_other_similarity_fits_better() -> None:
    x, y = points(6), points(6, seed=1)
    weight = torch.tensor([2.0, 1, 1, 1, 1, 3])
    found = geometry.fit_similarity(x, y, weight)
    repeated = torch.tensor([0, 0, 1, 2, 3, 4, 5, 5, 5])
    assert_equal(found, geometry.fit_similarity(x[repeated], y[repeated], torch.ones(9)))

    def cost(similarity: Similarity) -> float:
        return float(weight.double() @ (similarity(x) - y).square().sum(-1))

    for seed in range(20):
        other = drawn(seed)
        small = torch.matrix_exp(0.01 * (other.rotation - other.rotation.mT))
        nudge = Similarity(1 + 0.01 * (other.scale - 1), small, 0.01 * other.translation)
        assert cost(nudge @ found) > cost(found)


def test_a_mirror_image_is_fitted_by_a_rotation() -> None:
    x = points(8)
    found = geometry.fit_similarity(x, x * torch.tensor([1.0, 1, -1]), torch.ones(8))
    assert torch.det(found.rotation) == pytest.approx(1)
    assert found.scale > 0


def test_points_on_a_line_and_two_points_fix_no_similarity() -> None:
    line = torch.arange(4.0)[:, None] * torch.tensor([1.0, 2, 3])
    with pytest.raises(GeometryError, match="on a line"):
        geometry.fit_similarity(line, points(4), torch.ones(4))
    with pytest.raises(GeometryError, match="on a line"):
        geometry.fit_similarity(points(4), line, torch.ones(4))
    with pytest.raises(GeometryError, match="2 points"):
        geometry.fit_similarity(points(3), points(3), torch.tensor([1.0, 1, 0]))


def cameras(n: int) -> Cameras:
    intrinsics, extrinsics = random_cameras(n)
    return Cameras(extrinsics, intrinsics, torch.tensor([[4, 6]] * n))


def test_moved_cameras_see_moved_points_where_they_saw_the_points() -> None:
    before, similarity = cameras(3), drawn(1)
    after = geometry.move(before, similarity)
    seen = geometry.unproject(torch.ones(3, 4, 6).double(), before.intrinsics, before.extrinsics)
    xy, z = geometry.project(seen, before.intrinsics, before.extrinsics)
    xy_after, z_after = geometry.project(similarity(seen), after.intrinsics, after.extrinsics)
    assert_close(xy_after, xy)
    assert_close(z_after, z * similarity.scale)
    assert_close(after.centers, similarity(before.centers))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_cameras_are_aligned_by_their_centres_and_on_a_line_by_their_axes(n: int) -> None:
    before, similarity = cameras(n), drawn(2)
    found = geometry.align_cameras(before, geometry.move(before, similarity))
    assert_equal(found, similarity)
    rotation = before.extrinsics[..., :3]
    line = torch.arange(n).double()[:, None] * torch.tensor([1.0, 0, 2])
    straight = torch.cat([rotation, -rotation @ line[..., None]], -1)
    row = Cameras(straight, before.intrinsics, before.image_size)
    assert_equal(geometry.align_cameras(row, geometry.move(row, similarity)), similarity)


def test_cameras_at_one_place_fix_no_scale() -> None:
    still = Cameras(torch.eye(3, 4).repeat(3, 1, 1), *(getattr(cameras(3), n) for n in REST))
    for pair in ((still, cameras(3)), (cameras(3), still)):
        with pytest.raises(GeometryError, match="at one place"):
            geometry.align_cameras(*pair)


REST = ("intrinsics", "image_size")
