"""Joints of windows and their graph: what is wrong in a frame or in a loop does not carry."""

import dataclasses
import math

import pytest
import torch
from disturb import generator
from stand_in import flawless
from torch.testing import assert_close

from vggt_cli.errors import GeometryError
from vggt_cli.geometry import move_prediction
from vggt_cli.reconstruction.graph import Link, chain, gap, hops, solve
from vggt_cli.reconstruction.join import Joint, fit_robustly, join, through
from vggt_cli.scene import Prediction, Similarity

HERE = Similarity(1.0, torch.eye(3).double(), torch.zeros(3).double())


def turn(degrees: float) -> torch.Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]]).double()


THERE = Similarity(1.7, turn(40), torch.tensor([3.0, -1.0, 0.5]).double())


def window() -> tuple[Prediction, torch.Tensor]:
    network = flawless(8, lap=100)
    images = network.images(list(range(8)))
    return network(images), images.valid


def same(found: Similarity, wanted: Similarity, tolerance: float) -> None:
    assert abs(found.scale / wanted.scale - 1) < tolerance
    assert_close(found.rotation, wanted.rotation, atol=tolerance, rtol=0)
    assert_close(found.translation, wanted.translation, atol=10 * tolerance, rtol=0)


@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.4])
def test_wrong_pixels_do_not_move_a_joint(wrong: float) -> None:
    second, valid = window()
    first = move_prediction(second, THERE)
    bad = torch.rand(second.depth.shape, generator=generator(0)) < wrong
    second.depth[bad] *= 3
    joint = join(first, second, valid)
    same(joint.similarity, THERE, 1e-4)
    assert joint.residual < 1e-4
    assert joint.frames == 8
    assert joint.agree == pytest.approx(1 - wrong, abs=0.1)


def test_padding_unsure_and_unusable_pixels_are_not_compared() -> None:
    second, valid = window()
    first = move_prediction(second, THERE)
    valid = valid.clone()
    valid[:, :4] = False
    second.depth[:, :4] = 9
    second.depth[0, 5], second.depth[1, 5], second.depth[2, 5] = math.nan, math.inf, 0
    second.depth[:, 6] *= 5
    second.confidence[:, 6] = 1
    joint = join(first, second, valid)
    same(joint.similarity, THERE, 1e-4)
    assert joint.agree == 1


def lens_taken_for_longer(window: Prediction, factor: float) -> Prediction:
    """As a network may see a camera that moves sideways only: what is farther may be magnified."""
    intrinsics = window.cameras.intrinsics.clone()
    intrinsics[:, [0, 1], [0, 1]] *= factor
    cameras = dataclasses.replace(window.cameras, intrinsics=intrinsics)
    return dataclasses.replace(window, cameras=cameras, depth=window.depth * factor)


def test_cameras_far_apart_tell_the_scale_where_depth_is_as_much_too_long_as_the_lens() -> None:
    second, valid = window()
    first = lens_taken_for_longer(move_prediction(second, THERE), 1.5)
    joint = join(first, second, valid)
    same(joint.similarity, THERE, 1e-3)
    assert joint.stretch == pytest.approx(1.5, rel=1e-3)
    assert joint.residual < 1e-3


def test_cameras_close_to_each_other_leave_the_scale_to_depth() -> None:
    second, valid = window()
    rotation, centers = second.cameras.extrinsics[..., :3], second.cameras.centers
    for spread, noise in ((1e-3, 1e-4), (1.0, 0.3)):  # too close, too uncertain
        there = centers[:1] + spread * (centers - centers[:1])
        there = there + noise * torch.randn(8, 3, generator=generator(4))
        second.cameras.extrinsics[..., 3] = -(rotation @ there[..., None])[..., 0]
        first = move_prediction(second, THERE)
        first.cameras.extrinsics[..., 3] += noise * torch.randn(8, 3, generator=generator(5))
        joint = join(first, second, valid)
        assert joint.stretch == 1
        assert joint.similarity.scale == pytest.approx(THERE.scale, rel=0.02)  # what depth says


def test_where_no_pixel_is_usable_the_cameras_decide() -> None:
    second, valid = window()
    similarity = dataclasses.replace(THERE, scale=1.0)
    first = move_prediction(second, similarity)
    joint = join(first, second, torch.zeros_like(valid))
    same(joint.similarity, similarity, 1e-4)
    assert joint.residual == 1
    assert joint.anchors.shape == (6, 3)


def test_no_points_fix_no_similarity() -> None:
    none = torch.zeros(0, 3).double()
    with pytest.raises(GeometryError, match="no points"):
        fit_robustly(none, none, none[:, 0], HERE)


def said(similarity: Similarity, residual: float = 0.01) -> Joint:
    """A joint of windows that see things about the origin of the second."""
    axes = 2 * torch.eye(3).double()
    return Joint(similarity, torch.cat([axes, -axes]), 2.0, residual, 1.0, 5)


def test_a_way_through_a_third_window_is_the_way() -> None:
    to_first, to_second = said(THERE), said(Similarity(0.5, turn(-20), torch.ones(3).double()))
    joint = through(to_first, to_second)
    point = torch.tensor([0.3, 0.2, 5.0]).double()  # in the third window
    way = joint.similarity(to_second.similarity(point))
    assert_close(way, to_first.similarity(point))
    assert_close(joint.anchors, to_second.similarity(to_second.anchors))


def ring(count: int, drift: float) -> tuple[list[Similarity], list[Link]]:
    """The true poses of windows on a circle, and links that turn and stretch them by `drift`."""
    step = Similarity(1.0, turn(360 / count), torch.tensor([1.0, 0.0, 0.0]).double())
    poses = [HERE]
    for _ in range(count - 1):
        poses.append(poses[-1] @ step)
    bent = Similarity(math.exp(drift), turn(360 / count + 20 * drift), step.translation)
    links = [Link(k, k + 1, said(bent)) for k in range(count - 1)]
    return poses, [*links, Link(count - 1, 0, said(step), (9, 0))]


def test_a_closed_ring_spreads_what_was_open_over_all_links() -> None:
    poses, links = ring(40, 0.003)
    start = chain(40, links)
    closed = solve(start, links)
    before, after = gap(links[-1], start), gap(links[-1], closed)
    assert before.distance > 0.3
    assert abs(before.degrees) > 2
    assert after.distance < before.distance / 20
    assert abs(after.scale) < abs(before.scale) / 20
    errors = [
        max(float((a.translation - b.translation).norm()) for a, b in zip(p, poses, strict=True))
        for p in (start, closed)
    ]
    print(f"ring of 40: error {errors[0]:.3f} open, {errors[1]:.3f} closed")
    assert errors[1] < 0.5 * errors[0]
    assert closed[0].scale == 1
    assert torch.equal(closed[0].rotation, torch.eye(3).double())


def test_a_loop_that_the_others_contradict_is_let_go() -> None:
    poses, links = ring(30, 0.0)
    across = [Link(k, k + 15, said(poses[k].inverse @ poses[k + 15]), (k, k)) for k in (2, 6, 11)]
    false = Link(4, 20, said(THERE), (1, 2))
    found = solve(chain(30, links), [*links, *across, false])
    for pose, true in zip(found, poses, strict=True):
        same(pose, true, 2e-3)
    assert gap(false, found).distance > 0.5


def test_a_tree_stays_as_it_is() -> None:
    _, links = ring(5, 0.01)
    start = chain(5, links)
    assert solve(start, links[:-1]) == start
    assert hops(5, links[:-1])[0].tolist() == [0, 1, 2, 3, 4]
