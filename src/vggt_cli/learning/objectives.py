"""What a network is trained for: the terms of its losses, weighted and added up for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vggt_cli.geometry import unproject
from vggt_cli.learning import losses, losses_vggt
from vggt_cli.learning.labels import Labels
from vggt_cli.learning.losses import Truth
from vggt_cli.learning.losses_matching import match_loss, matching_loss
from vggt_cli.models.layers import Outputs, full_precision, normalized
from vggt_cli.models.matching import judge
from vggt_cli.models.mini import SHARPNESS, Guess, Mini, MiniConfig, Seen
from vggt_cli.models.networks import Config, Network
from vggt_cli.models.omega import VGGTOmega
from vggt_cli.models.vggt import VGGT

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Sequences of one size, and all that is drawn for them; the truth is normalised."""

    pixels: Tensor  # [B, S, 3, H, W]
    truth: Truth
    labels: Labels | None = None  # tracks, which the published networks learn from; mini does not
    exact: Tensor | None = None  # [B] bool, depth true to its edges, as rendered; None: all
    offsets: Sequence[tuple[int, int]] = losses.START  # of VGGT-Omega's gradient term

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(
            self.pixels.to(device),
            Truth(*(x.to(device) for x in self.truth)),
            self.labels and Labels(*(x.to(device) for x in self.labels)),
            None if self.exact is None else self.exact.to(device),
            self.offsets,
        )


@dataclass(frozen=True)
class Weights:
    """What each term counts."""

    camera: float = 5.0
    depth: float = 5.0
    point: float = 5.0
    track: float = 5.0
    matching: float = 0.3


# Equal say in the trunk: by gradient, camera and points would have ten times that of matches.
MINI_WEIGHTS = Weights(camera=1.0, depth=5.0, point=0.5, track=0.0, matching=5.0)
VGGT_WEIGHTS = Weights(camera=5.0, depth=1.0, point=1.0, track=0.05, matching=0.0)
OMEGA_WEIGHTS = Weights()  # published, but for the matching term, whose form and weight are ours


def weights_of(network: Network) -> Weights:
    """The weights with which networks of this kind were trained."""
    if isinstance(network, VGGT):
        return VGGT_WEIGHTS
    return OMEGA_WEIGHTS if isinstance(network, VGGTOmega) else MINI_WEIGHTS


class Teacher(nn.Module):
    """What only training needs, on the last layer's patches: features to match, mini's points."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if isinstance(config, MiniConfig):
            self.points = nn.Linear(2 * config.embed_dim, 3)
        else:
            self.features = nn.Linear(2 * config.embed_dim, 64)


def objective(
    network: Network, teacher: Teacher, batch: Batch, weights: Weights, progress: float = 0.0
) -> tuple[Tensor, Terms]:
    """The loss of a batch and, without gradient, what it is made of.

    progress: share of training done, which VGGT-Omega's point term asks for.
    """
    if isinstance(network, VGGT):
        terms, parts = _vggt(network, batch)
    elif isinstance(network, VGGTOmega):
        terms, parts = _omega(network, teacher, batch, progress)
    else:
        terms, parts = _mini(network, teacher, batch)
    loss = total(terms, weights)
    return loss, {name: value.detach() for name, value in {"loss": loss, **parts}.items()}


def total(terms: Terms, weights: Weights) -> Tensor:
    """The weighted sum of terms by the names of their weights."""
    return torch.as_tensor(
        sum(w * terms[name] for name, w in vars(weights).items() if name in terms)
    )


def _vggt(network: VGGT, batch: Batch) -> tuple[Terms, Terms]:
    """VGGT's terms, of those heads that it has, and their parts."""
    size = (batch.pixels.shape[-2], batch.pixels.shape[-1])
    truth, _ = losses_vggt.normalize(batch.truth)  # its own scale is a hair off VGGT-Omega's
    with torch.autocast(batch.pixels.device.type, torch.bfloat16):
        cached = network.aggregate(batch.pixels)
    outputs = network.read(cached, size)
    with full_precision(batch.pixels):
        camera = losses_vggt.camera_parts(outputs.pose_passes, truth)
        depth = losses_vggt.depth_parts(outputs.depth, outputs.confidence, truth)
        terms = {"camera": losses_vggt.camera_sum(camera), "depth": _sum(depth)}
        parts = {**camera, "depth": terms["depth"]}
        if outputs.points is not None and outputs.points_confidence is not None:
            true = unproject(truth.depth, truth.intrinsics, truth.extrinsics)
            point = losses_vggt.point_parts(
                outputs.points, outputs.points_confidence, true, truth.valid
            )
            terms["point"] = parts["point"] = _sum(point)
        if network.track_head is not None:
            assert batch.labels is not None, "the track head learns from labels"
            # VGGT counts from the centre of the first pixel, everything else from its corner.
            followed = network.track(cached, size, batch.labels.xy[:, 0] - 0.5)
            track = losses_vggt.track_parts(
                followed.xy + 0.5, followed.visibility, followed.confidence, batch.labels
            )
            terms["track"], parts = _sum(track), {**parts, **track}
    return terms, parts


def _omega(
    network: VGGTOmega, teacher: Teacher, batch: Batch, progress: float
) -> tuple[Terms, Terms]:
    """VGGT-Omega's published terms and one for matches of patches, and their parts."""
    config = network.config
    with torch.autocast(batch.pixels.device.type, torch.bfloat16):
        cached = network.aggregate(batch.pixels)
    outputs = network.read(cached, (batch.pixels.shape[-2], batch.pixels.shape[-1]))
    patches = cached[config.cached_layers[-1]][:, :, 1 + config.registers :]
    with full_precision(patches):
        terms, camera = omega_terms(outputs, batch, progress)
        matching, found = matching_loss(teacher.features(patches), batch.truth, config.patch_size)
    terms["matching"] = matching
    others = {name: value for name, value in terms.items() if name != "camera"}
    return terms, {**camera, **others, "found": found}


def omega_terms(
    outputs: Outputs, batch: Batch, progress: float, fewest: int = 4096
) -> tuple[Terms, Terms]:
    """VGGT-Omega's published terms: camera, depth, point and track; and the camera's parts.

    Sequences with hardly a valid pixel have no scale and do not count.
    """
    assert batch.labels is not None, "the term of track consistency needs labels"
    usable = batch.truth.valid.flatten(1).sum(1) > losses.FEWEST
    truth = losses.of_sequences(batch.truth, usable)
    depth, encoding = outputs.depth, outputs.pose_passes[-1]
    camera = losses.camera_parts(encoding[usable], Truth(*(x[usable] for x in truth)))
    points = losses.predicted_points(depth, encoding, truth, progress)
    terms = {
        "camera": losses.camera_sum(camera),
        "depth": losses.depth_loss(
            depth, outputs.confidence, truth, batch.exact, batch.offsets, fewest
        ),
        "point": losses.point_loss(points, truth),
        "track": losses.track_loss(points, truth, batch.labels.xy, batch.labels.seen),
    }
    return terms, camera


def _mini(network: Mini, teacher: Teacher, batch: Batch) -> tuple[Terms, Terms]:
    """The terms of those parts of mini that learn, and their parts.

    The encoder learns from matches of its features, alone; the depth head from its depth; all the
    rest from what is said before the solver, which has nothing to learn.
    """
    B, S = batch.pixels.shape[:2]
    early, late = _learns(network.camera_head), _learns(network.depth_head)
    if not early and not late:
        local = network.aggregator.patch_embed(normalized(batch.pixels).flatten(0, 1))
        cells = local.flatten(2).mT.unflatten(0, (B, S))
        matching, found = matching_loss(cells, batch.truth, 8, 1 / SHARPNESS, True)
        return {"matching": matching}, {"matching": matching, "found": found}
    terms: Terms = {}
    parts: Terms = {}
    # The short sequences of training go through the plain kernel faster than through the fused.
    with torch.autocast(batch.pixels.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        seen = network.aggregate(batch.pixels)
        guess = network.guess(seen)
        if late:
            # One cell of a patch is enough to learn from, and four times as fast.
            matches, features = network.find(seen, guess, 1)
            settled = network.settle(seen, guess, network.refined(matches, features))
            depth, confidence, _ = network.dense(seen, settled, features, B * S)
    with full_precision(batch.pixels):
        if early:
            terms, parts = _mini_guess(network, teacher, batch, (seen, guess))
        if late:
            said = judge(matches, features, network.match_head)
            place, whether = match_loss(matches, said, batch.truth, 8)
            dense = losses.depth_parts(depth, confidence, batch.truth)
            terms["depth"] = _sum(dense) + terms.get("depth", 0.0)
            terms["matching"] = place + whether + terms.get("matching", 0.0)
            parts = {**parts, **dense, "place": place, "whether": whether}
    return terms, parts


def _mini_guess(
    network: Mini, teacher: Teacher, batch: Batch, said: tuple[Seen, Guess]
) -> tuple[Terms, Terms]:
    """Camera, depth of cells, points and matches in the light of all frames, and their parts."""
    seen, guess = said
    config, truth = network.config, batch.truth
    cell = 8 * config.fine
    camera = losses.camera_parts(guess.pose, truth)
    _, known = losses.patch_points(truth, cell)
    middle = truth.depth[..., cell // 2 :: cell, cell // 2 :: cell]
    middle = middle[..., : known.shape[-2], : known.shape[-1]].clamp(min=1e-6)
    cells = (guess.depth / middle).log()[known].abs().clamp(max=3)
    true, valid = losses.patch_points(truth, config.patch_size)
    points = teacher.points(seen.layers[-1][:, :, 1 + config.registers :].float())
    point = (points.unflatten(2, true.shape[2:4]) - true).abs().clamp(max=10)[valid]
    context = guess.context.flatten(3).mT
    matching, found = matching_loss(context, truth, cell, 0.5 / SHARPNESS, True)
    terms = {
        "camera": losses.camera_sum(camera),
        "depth": _mean(cells),
        "point": _mean(point),
        "matching": matching,
    }
    own = {"cells": terms["depth"], "point": terms["point"], "matching": matching}
    return terms, {**camera, **own, "found": found}


def _learns(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


def _mean(values: Tensor) -> Tensor:
    """Zero of nothing."""
    return values.sum() / max(1, values.numel())


def _sum(parts: Terms) -> Tensor:
    return torch.stack(list(parts.values())).sum()
