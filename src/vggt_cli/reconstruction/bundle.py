"""Triangulate, filter, adjust, again: cameras and points that fit feature tracks.

Images that do not fit are left out and named; they keep their pose and the run goes on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from vggt_cli.errors import GeometryError
from vggt_cli.formats import adjust
from vggt_cli.geometry import keep_points, move
from vggt_cli.reconstruction.align import fit_cameras, hold_first
from vggt_cli.reconstruction.judge import CLOSE
from vggt_cli.reconstruction.triangulate import Points, pixel_scale, triangulate
from vggt_cli.scene import Cameras, Setup, Tracks

log = logging.getLogger(__name__)

ROUNDS = 12  # of triangulation, filter and adjustment, at most
FIRST_LIMIT = 50.0  # pixels at 1024: what may agree before anything was adjusted
SHARED_POINTS = 10  # that join an image to another
NARROW = 0.01  # of the longer side: the deviation of observations that hold no pose
INLIERS = 0.15  # of an image's observations: fewer, and it does not take part
ROUGH = 10.0  # pixels at 1024: a limit above it is that of cameras far off
POINTS = {False: 1000, True: 200}  # of an image in an adjustment; while it is rough
ENOUGH_TRACKS = 20
SETTLED = 0.002  # of the observations that agree: a smaller change ends the rounds


@dataclass(frozen=True, eq=False)
class Fit:
    """Cameras in the world of the prediction."""

    setup: Setup
    solved: Tensor  # [S] bool; the others keep their predicted pose
    reasons: dict[int, str] = field(default_factory=dict)  # of frames that are not solved


def fit_tracks(
    start: Setup, tracks: Tracks, radial: frozenset[int], free: bool, poses: bool = True
) -> Fit:
    """Triangulate, filter, adjust, until nothing changes; frames that do not fit are left out.

    The limit of the filter follows the errors down to CLOSE. The world drifts in scale.
    free: focal lengths may move; poses: so may poses.
    Raises GeometryError.
    """
    setup, limit, count = start, FIRST_LIMIT, -1
    solved = torch.ones(len(start.group), dtype=torch.bool)
    tried: set[int] = set()
    for turn in range(ROUNDS):
        points = triangulate(tracks, setup, limit)
        typical = float(points.error[solved[tracks.frame.long()]].median())
        limit = max(CLOSE, min(3 * typical, 4 * FIRST_LIMIT))
        good = points.good(tracks, limit)
        solved, reasons = _taking_part(tracks, good, setup)
        used = select(tracks, points, good & solved[tracks.frame.long()])
        log.debug(
            "round %d: error %.3f, limit %.2f, points %d", turn, typical, limit, len(used.xyz)
        )
        if len(used.xyz) < ENOUGH_TRACKS or int(solved.sum()) < 2:
            raise GeometryError(f"too few tracks agree: {len(used.xyz)} of {len(tracks.xyz)}")
        lost = [i for i in reasons if i not in tried] if turn > 0 and poses else []
        tried.update(lost)
        seen = good & solved[tracks.frame.long()]
        if (found := _resected(setup, tracks, points, seen, lost)) is not None:
            setup = found
            continue
        if limit == CLOSE and abs(int(good.sum()) - count) <= SETTLED * count:
            return Fit(setup, solved, reasons)
        count = int(good.sum())
        near = turn > 0 or limit < ROUGH  # far off, poses go before lenses
        loss = limit / 2 * float(pixel_scale(start.cameras).quantile(0.5))
        focal = free and near and int(solved.sum()) > 2  # two photos do not fix it
        how = adjust.Adjustment(loss, focal, radial if near else frozenset(), poses)
        most = POINTS[limit > CLOSE]
        setup = adjust.bundle_adjust(setup, _longest(used, most, len(start.group)), how)
    return Fit(setup, solved, reasons)


def _taking_part(tracks: Tracks, good: Tensor, setup: Setup) -> tuple[Tensor, dict[int, str]]:
    """[S] bool frames that share enough good observations, and why each other one does not."""
    frames, frame = len(setup.group), tracks.frame.long()
    seen = torch.bincount(frame, minlength=frames)
    agree = torch.bincount(frame[good], minlength=frames)
    sound = agree >= torch.maximum(INLIERS * seen, torch.tensor(float(SHARED_POINTS)))
    wide = torch.zeros_like(sound)
    for i in sound.nonzero()[:, 0].tolist():
        extent = tracks.xy[good & (frame == i)].std(0).max() / setup.cameras.image_size[i].max()
        wide[i] = extent > NARROW
    rows = good & (sound & wide)[frame]
    ones = np.ones(int(rows.sum()), np.int32)
    at = (tracks.frame[rows].numpy(), tracks.point[rows].numpy())
    sees = csr_array((ones, at), shape=(frames, len(tracks.xyz)))
    _, part = connected_components((sees @ sees.T) >= SHARED_POINTS, directed=False)
    labels = torch.from_numpy(part.astype(np.int64))
    largest = torch.bincount(labels[sound & wide], minlength=1).argmax()
    solved = sound & wide & (labels == largest)
    reasons = {}
    for i in (~solved).nonzero()[:, 0].tolist():
        if not sound[i]:
            reasons[i] = f"{int(agree[i])} of {int(seen[i])} observations agree with other images"
        elif not wide[i]:
            reasons[i] = "all its tracks lie in one spot"
        else:
            reasons[i] = "shares too few points with the other images"
    return solved, reasons


def select(tracks: Tracks, points: Points, rows: Tensor) -> Tracks:
    """The observations `rows` [K] bool of points that keep at least two."""
    enough = torch.bincount(tracks.point[rows], minlength=len(points.xyz)) >= 2
    rows = rows & enough[tracks.point]
    chosen = Tracks(points.xyz, tracks.point[rows], tracks.frame[rows], tracks.xy[rows])
    return keep_points(chosen, enough)


def _longest(tracks: Tracks, most: int, frames: int) -> Tracks:
    """The tracks that are among the `most` longest of a frame; more cost more than they give."""
    length = torch.bincount(tracks.point, minlength=len(tracks.xyz))
    chosen = torch.zeros(len(tracks.xyz), dtype=torch.bool)
    for frame in range(frames):
        point = tracks.point[tracks.frame == frame]
        chosen[point[length[point].argsort(descending=True, stable=True)[:most]]] = True
    return keep_points(tracks, chosen)


def _resected(
    setup: Setup, tracks: Tracks, points: Points, seen: Tensor, lost: list[int]
) -> Setup | None:
    """The cameras with those of `lost` that the points `seen` [K] bool by others place anew."""
    support = torch.bincount(tracks.point[seen], minlength=len(points.xyz)) >= 2
    extrinsics, any_found = setup.cameras.extrinsics.clone(), False
    scale = pixel_scale(setup.cameras)
    for i in lost:
        rows = (tracks.frame == i) & support[tracks.point]
        if int(rows.sum()) < ENOUGH_TRACKS:
            continue
        xyz, limit = points.xyz[tracks.point[rows]], 4 * CLOSE * float(scale[i])
        found = adjust.resect(setup, i, tracks.xy[rows], xyz, limit)
        if found is not None:
            extrinsics[i], any_found = found, True
    cameras = Cameras(extrinsics, setup.cameras.intrinsics, setup.cameras.image_size)
    return Setup(cameras, setup.radial, setup.group) if any_found else None


def settle(fit: Fit, start: Setup) -> Fit:
    """The fit in the world of `start`: frame 0 and the scale stay, so do unsolved poses."""
    found, given = fit.setup.cameras, start.cameras.extrinsics
    similarity = fit_cameras(found.extrinsics[fit.solved], given[fit.solved])
    moved = move(found, similarity).extrinsics
    moved[~fit.solved] = given[~fit.solved]
    cameras = Cameras(hold_first(moved, given[0]), found.intrinsics, found.image_size)
    return Fit(Setup(cameras, fit.setup.radial, fit.setup.group), fit.solved, fit.reasons)
