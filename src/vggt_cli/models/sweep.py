"""A plane sweep: how alike a cell is to what other frames show at each of some depths.

The idea is MVSNet's (Yao et al., ECCV 2018), in small: no volume is warped, the likeness of all
pairs of cells is looked up where a depth would put them. Evidence, not yet a depth: where nothing
matches it says little, and a network reads it.

B sequences, S frames, K target frames of each, P planes, C channels; images of h x w cells. Places
and the focal length are in halves of the images' longer side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.models import matching, solver

PLANES = 32
REACH = 1.2  # of the planes about the guess, in log depth
DOUBT = 0.4  # standard deviation of the guess's log depth
FLOOR = 1e-2  # how likely a match is that was not seen: the view may be hidden or outside


class Cameras(NamedTuple):
    """Of all frames; lengths in units of the guess."""

    rotation: Tensor  # [B, S, 3, 3] world-to-camera
    translation: Tensor  # [B, S, 3]
    focal: Tensor  # [B]


class Belief(NamedTuple):
    """Of the cells of all frames: which planes they lie on."""

    chance: Tensor  # [B, S, P, h, w], one in sum
    change: Tensor  # [B, S, h, w] log depth against the guess, expected
    doubt: Tensor  # [B, S, h, w] its standard deviation


def planes(like: Tensor) -> Tensor:
    """[P]: log depth of the planes about the guess."""
    return torch.linspace(-REACH, REACH, PLANES).to(like)


def evidence(
    features: Tensor, target: Tensor, cameras: Cameras, depth: Tensor, sharpness: float
) -> Tensor:
    """[B, S, P, h, w]: logarithm of how likely a cell lies on each plane, but for a constant.

    features: [B, S, C, h, w]; target: [B, S, K]; depth: guess [B, S, h, w]. sharpness: of likeness,
    with which the features were trained. Behind a camera and beside its image a plane is as unseen
    as where nothing is alike. A frame at a time, for memory.
    """
    B, S, _, h, w = features.shape
    unit = F.normalize(features.float().flatten(3), dim=2).mT  # [B, S, cells, C]
    ray = solver.rays(matching.places(h, w).to(unit).expand(B, -1, -1), cameras.focal)
    far = planes(unit).exp()[:, None]
    every = torch.arange(B, device=unit.device)
    frames = []
    for s in range(S):
        points = ray[:, :, None] * (depth[:, s].flatten(1)[:, :, None, None] * far)
        said = unit.new_zeros(B, h * w, PLANES)
        for q in target[:, s].unbind(1):
            turn = cameras.rotation[every, q] @ cameras.rotation[:, s].mT
            move = (
                cameras.translation[every, q, :, None] - turn @ cameras.translation[:, s, :, None]
            )
            there = points.flatten(1, 2) @ turn.mT + move.mT  # [B, cells P, 3]
            chance = _mutual(unit[:, s], unit[every, q], sharpness)
            said = (
                said
                + (_looked_up(chance, there.view_as(points), cameras.focal, (h, w)) + FLOOR).log()
            )
        frames.append(said.mT.unflatten(2, (h, w)))
    return torch.stack(frames, 1)


def _mutual(own: Tensor, other: Tensor, sharpness: float) -> Tensor:
    """[B, cells, cells]: in [0, 1], how likely cells of [B, cells, C] are each other's match."""
    alike = (own * sharpness @ other.mT).exp_()
    rows, columns = alike.sum(-1, keepdim=True).rsqrt(), alike.sum(-2, keepdim=True).rsqrt()
    return alike.mul_(rows).mul_(columns).square_()


def _looked_up(chance: Tensor, points: Tensor, focal: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, cells, P] of chances [B, cells, cells] where points [B, cells, P, 3] are seen; else 0."""
    h, w = grid
    z = points[..., 2].clamp(min=solver.NEAREST)
    # Halves of the longer side to halves of each, which is what grid_sample asks for.
    scale = (max(h, w) / points.new_tensor([w, h])) * focal.view(-1, 1, 1, 1)
    at = points[..., :2] / z[..., None] * scale
    inside = (at.abs() <= 1).all(-1) & (points[..., 2] > solver.NEAREST)
    found = F.grid_sample(
        chance.view(-1, 1, h, w),
        at.flatten(0, 1)[:, None],
        padding_mode="border",
        align_corners=False,
    )
    return found.view_as(z) * inside


def believed(evidence: Tensor) -> Belief:
    """What evidence [B, S, P, h, w] amounts to.

    A cell hears its eight neighbours, because few cells are as alike as they should be; the guess
    is believed as far as DOUBT says.
    """
    at = planes(evidence)[:, None, None]
    around = F.avg_pool2d(evidence.flatten(0, 1), 3, 1, 1, count_include_pad=False) * 3
    chance = (around - (at / DOUBT).square() / 2).softmax(1).unflatten(0, evidence.shape[:2])
    change = (chance * at).sum(2, keepdim=True)
    doubt = (chance * (at - change).square()).sum(2).sqrt()
    return Belief(chance, change[:, :, 0], doubt)
