"""Cameras from matches: robust least squares over poses, depths and one focal length.

What a large network finds by attention, the small one computes. No gradient passes through.

B sequences, S frames, K target frames of each, N patches, each with one cell of the features'
grid. Places are (x, y) in halves of the images' longer side from the centre, and so is the focal
length; lengths are in units of the guess. World is the first camera.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.models.matching import Matches

Pose = tuple[Tensor, Tensor]  # rotation [..., 3, 3] and translation [..., 3]

FOCAL = 3**0.5  # 60 degrees along the longer side, until the matches know better
STEPS = 30
LOOSE, TIGHT = 0.4, 0.04  # scale of errors that are believed, in the first and in the last step
DEPTH_DOUBT, FOCAL_DOUBT = 0.5, 0.3  # standard deviations of the guesses' logarithms
NEAREST = 0.05  # depth before a camera


class Solution(NamedTuple):
    """Cameras, and the depth of the cells."""

    rotation: Tensor  # [B, S, 3, 3] world-to-camera
    translation: Tensor  # [B, S, 3]
    depth: Tensor  # [B, S, N]
    focal: Tensor  # [B]
    agreement: Tensor  # [B, S, K, N] certainty, the less the worse the match fits


class _Equations(NamedTuple):
    """Normal equations of one step: of poses and focal length, and of depths, and both."""

    pose: Tensor  # [B, S, L, L] of a frame, its K targets and the focal length: L = 6 K + 7
    pose_right: Tensor  # [B, S, L]
    mixed: Tensor  # [B, S, N, L]
    depth: Tensor  # [B, S, N]
    depth_right: Tensor  # [B, S, N]


def cameras(matches: Matches, depth: Tensor, pose: Pose, focal: Tensor) -> Solution:
    """The best of three solutions: from the guessed cameras, from guessed depth, from no guess.

    depth: [B, S, h, w] of all cells; pose, focal: guesses [B, S, ...] and [B].
    """
    flat = torch.ones_like(depth) * depth.flatten(1).median(1).values[:, None, None, None]
    usual = torch.full_like(focal, FOCAL)
    starts = [
        (depth, focal, *pose),
        (depth, focal, *start(matches, depth, focal)),
        (flat, usual, *start(matches, flat, usual)),
    ]
    # All at once: that is faster by far where there are few photos.
    thrice = Matches(*(torch.cat([x] * len(starts)) for x in matches))
    depth, focal, R, t = (torch.cat(x) for x in zip(*starts, strict=True))
    found = solve(thrice, at_cells(depth, thrice), focal, (R, t))
    parts = [x.unflatten(0, (len(starts), -1)) for x in found]
    # Where they explain the matches equally well, the one that is nearest to the guess.
    fit = parts[-1].sum((2, 3, 4))
    best = (fit * fit.new_tensor([[1.0], [0.99], [0.98]])).argmax(0)
    every = torch.arange(len(best), device=best.device)
    return Solution(*(x[best, every] for x in parts))


def at_cells(depth: Tensor, matches: Matches) -> Tensor:
    """[B, S, N]: what a map [B, S, h, w] has at the cells that were matched."""
    return depth.flatten(2).gather(2, matches.cell)


def rays(place: Tensor, focal: Tensor) -> Tensor:
    """Directions [B, ..., 3] with z = 1 through places [B, ..., 2], focal [B]."""
    return F.pad(place / focal.view(-1, *[1] * (place.ndim - 1)), (0, 1), value=1.0)


def start(matches: Matches, depth: Tensor, focal: Tensor) -> Pose:
    """Poses along the tree of the best pairs: each moves matched points rigidly onto another's.

    depth: [B, S, h, w] of all cells.
    """
    B, S, K, _ = matches.certainty.shape
    every, target = torch.arange(B)[:, None, None], matches.target
    # Twice the place, for each axis in halves of its own side, is what grid_sample asks for.
    grid = depth.shape[2:]
    scale = max(grid) / torch.tensor(grid[::-1]).to(depth)
    there = F.grid_sample(
        depth[every, target].flatten(0, 2)[:, None],
        (matches.place * scale).flatten(0, 2)[:, None],
        mode="nearest",
        padding_mode="border",
        align_corners=False,
    )[:, 0, 0].unflatten(0, (B, S, K))
    a = (rays(matches.own, focal) * at_cells(depth, matches)[..., None])[:, :, None].expand(
        -1, -1, K, -1, -1
    )
    b = rays(matches.place, focal) * there[..., None]
    sure = _trust(matches.certainty)
    weight = sure
    for i in range(6):
        rotation, translation = _rigid(a, b, weight)
        error = (b - a @ rotation.mT - translation[..., None, :]).norm(dim=-1) / b.norm(dim=-1)
        fit = sure * torch.exp(-((error / 0.25) ** 2)) + 1e-9
        weight = sure / (error + 0.05) if i < 2 else fit
    source = torch.arange(S, device=depth.device)[None, :, None].expand_as(target)
    quality = depth.new_zeros(B, S, S).index_put((every, target, source), fit.sum(-1))
    turn = torch.eye(3).to(depth).repeat(B, S, S, 1, 1)
    turn[every, target, source] = rotation
    move = depth.new_zeros(B, S, S, 3).index_put((every, target, source), translation)
    return _along_tree(quality, turn, move)


def _along_tree(quality: Tensor, turn: Tensor, move: Tensor) -> Pose:
    """Poses from the first frame along the tree of the best pairs [b, target, source]."""
    B, S = quality.shape[:2]
    back = turn.transpose(1, 2).mT
    back_move = -(back @ move.transpose(1, 2)[..., None])[..., 0]
    other = quality.mT > quality  # the pair seen from its other side
    turn = torch.where(other[..., None, None], back, turn)
    move = torch.where(other[..., None], back_move, move)
    quality = torch.maximum(quality, quality.mT)
    R, t = turn.new_zeros(B, S, 3, 3) + torch.eye(3).to(turn), turn.new_zeros(B, S, 3)
    placed = torch.zeros(B, S, dtype=torch.bool, device=turn.device)
    placed[:, 0] = True
    every = torch.arange(B)
    for _ in range(S - 1):
        leads_on = placed[:, None] & ~placed[:, :, None]
        best = quality.masked_fill(~leads_on, -1.0).flatten(1).argmax(1)
        new, old = best // S, best % S
        step = turn[every, new, old]
        t[every, new] = (step @ t[every, old][..., None])[..., 0] + move[every, new, old]
        R[every, new] = step @ R[every, old]
        placed[every, new] = True
    return R, t


def _trust(certainty: Tensor) -> Tensor:
    return torch.where(certainty > 0.05, certainty, 0.1 * certainty) + 1e-6


def _rigid(a: Tensor, b: Tensor, weight: Tensor) -> Pose:
    """The motion that brings points a [..., N, 3] nearest to b: Kabsch's."""
    weight = (weight / weight.sum(-1, keepdim=True))[..., None]
    middle_a, middle_b = (weight * a).sum(-2, keepdim=True), (weight * b).sum(-2, keepdim=True)
    # Equal points have no rotation; the shift makes it the identity.
    spread = ((b - middle_b) * weight).mT @ (a - middle_a) + 1e-9 * torch.eye(3).to(a)
    u, _, v = torch.linalg.svd(spread)
    sign = torch.ones_like(u[..., 0])
    sign[..., 2] = torch.det(u @ v)
    rotation = (u * sign[..., None, :]) @ v
    return rotation, (middle_b - middle_a @ rotation.mT)[..., 0, :]


def solve(matches: Matches, depth: Tensor, focal: Tensor, pose: Pose) -> Solution:
    """Gauss-Newton steps from `pose`, a guess of depth [B, S, N] and one of the focal length [B].

    Errors beyond a scale that shrinks from step to step lose their say (Geman-McClure).
    """
    R, t = pose
    guess = log_depth, log_focal = depth.log(), focal.log()
    for i in range(STEPS):
        scale = LOOSE * (TIGHT / LOOSE) ** (i / (STEPS - 1))
        equations, _ = _linearized(matches, (R, t), log_depth, log_focal, scale)
        wrong = log_depth - guess[0], log_focal - guess[1]
        step, deeper = _step(equations, matches.target, wrong)
        by, longer = step[:, :-1].unflatten(1, (-1, 6)), step[:, -1]
        by = by * (0.5 / by[..., :3].norm(dim=-1, keepdim=True).clamp(min=0.5))
        rotate = _rotation(by[..., :3])
        R, t = rotate @ R, (rotate @ t[..., None])[..., 0] + by[..., 3:]
        log_depth = log_depth + deeper.clamp(-0.7, 0.7)
        log_focal = log_focal + longer.clamp(-0.2, 0.2)
    _, fit = _linearized(matches, (R, t), log_depth, log_focal, TIGHT)
    return Solution(R, t, log_depth.exp(), log_focal.exp(), matches.certainty * fit)


def _linearized(
    matches: Matches, pose: Pose, log_depth: Tensor, log_focal: Tensor, scale: float
) -> tuple[_Equations, Tensor]:
    """The equations of one step, and how well each match fits, [B, S, K, N] in [0, 1]."""
    R, t = pose
    f = log_focal.exp()
    B, S, K, N = matches.certainty.shape
    every = torch.arange(B)[:, None, None]
    x = (rays(matches.own, f) * log_depth.exp()[..., None])[:, :, None]  # [B, S, 1, N, 3]
    turn = R[every, matches.target] @ R[:, :, None].mT  # [B, S, K, 3, 3] own to target
    move = t[every, matches.target] - (turn @ t[:, :, None, :, None])[..., 0]
    y = x @ turn.mT + move[..., None, :]  # in the target
    z = y[..., 2].clamp(min=NEAREST)
    f = f[:, None, None, None]
    seen = (f / z)[..., None] * y[..., :2]
    error = seen - matches.place
    fit = (y[..., 2] > NEAREST) / (1 + error.square().sum(-1) / scale**2) ** 2
    weight = (_trust(matches.certainty) * fit)[..., None, None]
    # Derivatives of the place in the target, by the point there and by all that moves it; the
    # gradient by a turn about the origin is the cross product of point and gradient.
    sides = torch.eye(2).to(y).expand(*y.shape[:-1], 2, 2)
    by_y = torch.cat([sides, -(y[..., :2] / z[..., None])[..., None]], -1)
    by_y = by_y * (f / z)[..., None, None]  # [B, S, K, N, 2, 3]
    by_x = (by_y.flatten(3, 4) @ turn).unflatten(3, (N, 2))
    x, y = x.expand_as(y)[..., None, :].expand_as(by_x), y[..., None, :].expand_as(by_y)
    to_focal = seen - (by_x * x)[..., :2].sum(-1)
    by_own = torch.cat([torch.linalg.cross(by_x, x), -by_x, to_focal[..., None]], -1)
    rows = torch.cat([by_own, torch.linalg.cross(y, by_y), by_y], -1)  # [B, S, K, N, 2, 13]
    by_depth = (by_x * x).sum(-1, keepdim=True)  # [B, S, K, N, 2, 1]
    heavy, error = rows * weight, error[..., None]
    pairs = heavy.flatten(3, 4).mT @ rows.flatten(3, 4)  # [B, S, K, 13, 13]
    rights = (heavy * error).sum((3, 4))
    both = (heavy * by_depth).sum(4)  # [B, S, K, N, 13]
    # Of a frame's unknowns a pair has its own pose, the focal length and one target's pose.
    L, own = 6 * K + 7, [*range(6), 6 * K + 6]
    left, right, mixed = (y.new_zeros(B, S, *n) for n in ((L, L), (L,), (N, L)))
    for k in range(K):
        slot = torch.tensor([*own, *range(6 * k + 6, 6 * k + 12)], device=y.device)
        left[:, :, slot[:, None], slot] += pairs[:, :, k]
        right[:, :, slot] += rights[:, :, k]
        mixed[..., slot] += both[:, :, k]
    equations = _Equations(
        left,
        right,
        mixed,
        (weight * by_depth.square()).sum((2, 4, 5)),
        (weight * by_depth * error).sum((2, 4, 5)),
    )
    return equations, fit


def _step(
    equations: _Equations, target: Tensor, wrong: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Steps [B, 6 S + 1] of poses (turn, move) and log focal, and [B, S, N] of log depth.

    wrong: how far log depth and log focal are from their guesses. The first camera stays.
    """
    B, S = target.shape[:2]
    strength = 0.05 * (TIGHT / DEPTH_DOUBT) ** 2
    depth = equations.depth + strength
    depth_right = equations.depth_right + strength * wrong[0]
    mixed = equations.mixed
    reduced = equations.pose - (mixed / depth[..., None]).mT @ mixed
    right = equations.pose_right - (mixed * (depth_right / depth)[..., None]).sum(2)
    frames = torch.cat([torch.arange(S, device=target.device).expand(B, S)[..., None], target], -1)
    slot = (frames[..., None] * 6 + torch.arange(6, device=target.device)).flatten(2)
    slot = F.pad(slot, (0, 1), value=6 * S)  # [B, S, L]: whose unknowns each frame's are
    G = 6 * S + 1
    pairs = (slot[..., None] * G + slot[..., None, :]).flatten(1)
    whole = right.new_zeros(B, G * G).scatter_add(1, pairs, reduced.flatten(1)).view(B, G, G)
    sides = right.new_zeros(B, G).scatter_add(1, slot.flatten(1), right.flatten(1))
    strength = S * (TIGHT / FOCAL_DOUBT) ** 2
    whole[:, -1, -1] += strength
    sides[:, -1] += strength * wrong[1]
    free = whole[:, 6:, 6:]
    free = free + torch.diag_embed(1e-3 * torch.diagonal(free, dim1=-2, dim2=-1) + 1e-6)
    # Not linalg.solve: once torch.set_num_threads was called, MKL's LU of several matrices of more
    # than about 150 rows is wrong, without a word. Where rounding leaves one indefinite: no step.
    factor, indefinite = torch.linalg.cholesky_ex(free)
    solved = torch.cholesky_solve(sides[:, 6:, None], factor)[..., 0]
    step = F.pad(torch.where(indefinite[:, None] == 0, -solved, 0), (6, 0))
    own = step.gather(1, slot.flatten(1)).view(B, S, -1, 1)
    return step, -(depth_right + (mixed @ own)[..., 0]) / depth


def _cross(v: Tensor) -> Tensor:
    """[..., 3, 3]: the matrix of the cross product with v [..., 3]."""
    x, y, z = v.unbind(-1)
    o = torch.zeros_like(x)
    return torch.unflatten(torch.stack([o, -z, y, z, o, -x, -y, x, o], -1), -1, (3, 3))


def _rotation(v: Tensor) -> Tensor:
    """[..., 3, 3]: turns about v [..., 3] by its length in radians (Rodrigues)."""
    angle = v.norm(dim=-1)[..., None, None].clamp(min=1e-9)
    axis = _cross(v) / angle
    turn: Tensor = torch.eye(3).to(v) + angle.sin() * axis + (1 - angle.cos()) * axis @ axis
    return turn
