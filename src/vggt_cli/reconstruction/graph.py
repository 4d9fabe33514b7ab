"""The pose graph of windows: similarities that agree with every joint and every closed loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import shortest_path
from scipy.spatial.transform import Rotation

from vggt_cli.formats.colmap import Array
from vggt_cli.reconstruction.join import Joint
from vggt_cli.scene import Similarity

FINEST = 1e-3  # of the depth: joints are not believed beyond that
ROUNDS = 5  # of weighting the links anew
CONTRADICTED = 3.0  # sigmas, or usual residuals, at which a link has a quarter of its weight
UNKNOWNS = 7  # of a window: log scale, turn, shift


@dataclass(frozen=True, eq=False)
class Link:
    """Two windows, and the joint that leads from the second's world to the first's."""

    first: int
    second: int
    joint: Joint
    loop: tuple[int, int] | None = None  # frames that closed a loop; None: frames shared


@dataclass(frozen=True)
class Gap:
    """How far two placed windows are from what their link says."""

    distance: float  # root mean square over the anchors, of the depth there
    degrees: float
    scale: float  # log2 of the ratio


def chain(count: int, links: Sequence[Link]) -> list[Similarity]:
    """World from window of `count` windows, each by the link with most frames to an earlier one.

    The world is that of window 0.
    """
    poses = [Similarity(1.0, torch.eye(3).double(), torch.zeros(3).double())]
    for number in range(1, count):
        back = [link for link in links if link.second == number and link.loop is None]
        best = max(back, key=lambda link: (link.joint.frames, -link.joint.residual))
        poses.append(poses[best.first] @ best.joint.similarity)
    return poses


def hops(count: int, links: Sequence[Link]) -> Array:
    """[W, W] number of links between each two windows."""
    rows, columns = [link.first for link in links], [link.second for link in links]
    linked = coo_matrix((np.ones(len(links)), (rows, columns)), (count, count))
    found: Array = shortest_path(linked.tocsr(), directed=False, unweighted=True)
    return found


def gap(link: Link, poses: Sequence[Similarity]) -> Gap:
    """The link's word against where its windows are placed."""
    said = link.joint.similarity
    placed = poses[link.first].inverse @ poses[link.second]
    apart = placed(link.joint.anchors) - said(link.joint.anchors)
    distance = float(apart.norm() / math.sqrt(len(apart)) / link.joint.depth)
    turn = Rotation.from_matrix((said.rotation.mT @ placed.rotation).numpy()).magnitude()
    return Gap(distance, math.degrees(turn), math.log2(placed.scale / said.scale))


def solve(start: Sequence[Similarity], links: Sequence[Link]) -> list[Similarity]:
    """World from window where all links are kept best; window 0 stays.

    A link is kept at its anchors: their distance in the first window, of the depth there, over the
    joint's own residual. Least squares close all loops; then those that the others contradict
    lose their weight, Geman and McClure's. (The other way round true loops would lose it, as
    drift leaves them wide open.)
    """
    if len(links) < len(start):
        return list(start)  # a tree: nothing disagrees
    graph = _Graph(start, links)
    x, weight = np.zeros(UNKNOWNS * (len(start) - 1)), np.ones(len(links))
    for _ in range(ROUNDS):
        x = _least_squares(graph, x, weight)
        off = np.sqrt(np.square(graph.residuals(x, np.ones(len(links)))).mean(1))
        weight = (1 + np.square(off / (CONTRADICTED * max(1, np.median(off))))) ** -2
    scale, rotation, shift = graph.poses(x)
    return [
        Similarity(float(s), torch.from_numpy(R), torch.from_numpy(t))
        for s, R, t in zip(scale, rotation, shift, strict=True)
    ]


def _least_squares(graph: _Graph, x: Array, weight: Array) -> Array:
    # A chain of hundreds is badly conditioned: the steps' linear systems are solved to the end.
    exactly = {"maxiter": 20 * len(x), "atol": 1e-10, "btol": 1e-10, "conlim": 1e12}
    found: Array = least_squares(
        lambda x: graph.residuals(x, weight).ravel(),
        x,
        jac_sparsity=graph.sparsity(),
        tr_solver="lsmr",
        tr_options=exactly,
        ftol=1e-6,
        max_nfev=10,  # a false loop takes dozens before it loses its weight
    ).x
    return found


class _Graph:
    """The links as arrays over W windows, E links and A anchors."""

    def __init__(self, start: Sequence[Similarity], links: Sequence[Link]) -> None:
        self.scale = np.array([pose.scale for pose in start])
        self.rotation = torch.stack([pose.rotation for pose in start]).numpy()
        self.shift = torch.stack([pose.translation for pose in start]).numpy()
        self.first = np.array([link.first for link in links])
        self.second = np.array([link.second for link in links])
        self.anchors = torch.stack([link.joint.anchors for link in links]).numpy()  # [E, A, 3]
        wanted = [link.joint.similarity(link.joint.anchors) for link in links]
        self.wanted = torch.stack(wanted).numpy()
        depth = np.array([link.joint.depth for link in links])
        sigma = np.array([max(link.joint.residual, FINEST) for link in links])
        self.unit = (sigma * depth)[:, None, None]
        # Shifts are in units of what a window sees, so that all unknowns are of a size.
        seen = np.ones(len(start))
        seen[self.first] = depth
        self.step = (self.scale * seen)[1:, None]

    def poses(self, x: Array) -> tuple[Array, Array, Array]:
        """Scales [W], rotations [W, 3, 3] and shifts [W, 3] after the changes `x`."""
        change = x.reshape(-1, UNKNOWNS)
        scale, rotation, shift = self.scale.copy(), self.rotation.copy(), self.shift.copy()
        scale[1:] *= np.exp(change[:, 0])
        rotation[1:] = Rotation.from_rotvec(change[:, 1:4]).as_matrix() @ rotation[1:]
        shift[1:] += self.step * change[:, 4:]
        return scale, rotation, shift

    def residuals(self, x: Array, weight: Array) -> Array:
        """[E, 3 A] distances at the anchors in sigmas, times the root of the weights [E]."""
        scale, rotation, shift = self.poses(x)
        a, b = self.first, self.second
        world = scale[b, None, None] * self.anchors @ rotation[b].swapaxes(1, 2) + shift[b, None]
        inside = (world - shift[a, None]) @ rotation[a] / scale[a, None, None]
        off: Array = (inside - self.wanted) / self.unit * np.sqrt(weight)[:, None, None]
        return off.reshape(len(off), -1)

    def sparsity(self) -> Array:
        """[E A 3, 7 (W - 1)] sparse: which unknowns each residual depends on."""
        rows, columns = [], []
        per_link = self.anchors[0].size
        for link, pair in enumerate(zip(self.first, self.second, strict=True)):
            for window in pair:
                if window > 0:
                    row = np.arange(link * per_link, (link + 1) * per_link)
                    column = UNKNOWNS * (window - 1) + np.arange(UNKNOWNS)
                    rows.append(np.repeat(row, UNKNOWNS))
                    columns.append(np.tile(column, per_link))
        at = np.concatenate(rows), np.concatenate(columns)
        shape = len(self.first) * per_link, UNKNOWNS * (len(self.scale) - 1)
        found: Array = coo_matrix((np.ones(len(at[0])), at), shape).tocsr()
        return found
