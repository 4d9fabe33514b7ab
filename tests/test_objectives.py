"""The objective of each published network: finite, it reaches the heads, it falls."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from vggt_cli.learning import losses, objectives, synthetic
from vggt_cli.learning.labels import Labels, labels
from vggt_cli.learning.losses import Truth
from vggt_cli.learning.objectives import Batch, Teacher, Weights, objective
from vggt_cli.models.networks import Config, Network, build
from vggt_cli.models.vggt import VGGT

SIZE = (70, 98)  # whole patches of VGGT; VGGT-Omega's leave a border out
OMEGA_SIZE = (64, 96)
CASES: list[tuple[Config, Weights]] = [
    (tiny.VGGT, objectives.VGGT_WEIGHTS),
    (replace(tiny.VGGT, point_head=False, track_head=False), objectives.VGGT_WEIGHTS),
    (tiny.OMEGA, objectives.OMEGA_WEIGHTS),
]
NAMES = ["VGGT", "VGGT without points and tracks", "VGGT-Omega"]


def batch(size: tuple[int, int]) -> Batch:
    """Two rendered sequences of three frames."""
    samples = [synthetic.sample(seed, synthetic.Path(3, size, 0.4)) for seed in (0, 3)]
    parts = [(s.cameras.extrinsics, s.cameras.intrinsics, s.depth, s.valid) for s in samples]
    truth, _ = losses.normalize(Truth(*(torch.stack(x) for x in zip(*parts, strict=True))))
    drawn = labels(truth, torch.Generator().manual_seed(0), 64)
    return Batch(torch.stack([s.pixels for s in samples]), truth, drawn)


def made(config: Config) -> tuple[Network, Teacher, Batch]:
    torch.manual_seed(0)
    network, teacher = build(config), Teacher(config)
    return network, teacher, batch(SIZE if isinstance(network, VGGT) else OMEGA_SIZE)


def unreached(part: nn.Module) -> list[str]:
    return [n for n, p in part.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize(("config", "weights"), CASES, ids=NAMES)
def test_the_gradient_reaches_all_of_the_heads(config: Config, weights: Weights) -> None:
    network, teacher, rendered = made(config)
    loss, terms = objective(network, teacher, rendered, weights)
    loss.backward()
    assert all(value.isfinite() for value in terms.values()), terms
    assert all(not value.requires_grad for value in terms.values())
    heads = [n for n, part in network.named_children() if "text" not in n and n != "aggregator"]
    assert [f"{n}.{p}" for n in heads for p in unreached(network.get_submodule(n))] == []
    assert unreached(network.get_submodule("aggregator.frame_blocks")) == []
    if not isinstance(network, VGGT):
        assert unreached(teacher) == []


@pytest.mark.parametrize(("config", "weights"), CASES, ids=NAMES)
def test_a_few_steps_on_one_batch_lower_the_loss(config: Config, weights: Weights) -> None:
    network, teacher, rendered = made(config)
    every = [*network.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(every, 1e-3)
    values = []
    for _ in range(12):
        loss, _ = objective(network, teacher, rendered, weights)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(every, 1.0)
        optimizer.step()
        values.append(float(loss.detach()))
    print([round(v, 3) for v in values])
    assert max(values[-3:]) < 0.9 * values[0], values


def test_tracks_of_vggt_start_at_their_labels() -> None:
    """Where frame 0 alone counts, whose points are given, VGGT's pixels must not be off by half."""
    network, teacher, rendered = made(tiny.VGGT)
    assert rendered.labels is not None
    seen = rendered.labels.seen.clone()
    seen[:, 1:] = False
    first = replace(rendered, labels=rendered.labels._replace(seen=seen))
    _, terms = objective(network, teacher, first, objectives.VGGT_WEIGHTS)
    assert float(terms["place"]) < 1e-4


def test_late_in_training_points_of_omega_come_from_the_predicted_lenses() -> None:
    network, teacher, rendered = made(tiny.OMEGA)
    early, middle, late = (
        objective(network, teacher, rendered, objectives.OMEGA_WEIGHTS, progress)[1]
        for progress in (0.0, 0.59, 0.6)
    )
    assert early["point"] == middle["point"]
    assert early["point"] != late["point"]
    assert early["depth"] == late["depth"]


def test_a_sequence_that_shows_nothing_does_not_count() -> None:
    network, teacher, rendered = made(tiny.OMEGA)
    weights = replace(objectives.OMEGA_WEIGHTS, matching=0.0)
    valid = rendered.truth.valid.clone()
    valid[1] = False
    blind = replace(rendered, truth=rendered.truth._replace(valid=valid))
    assert rendered.labels is not None
    alone = Batch(
        rendered.pixels[:1],
        Truth(*(x[:1] for x in rendered.truth)),
        Labels(*(x[:1] for x in rendered.labels)),
    )
    both, one = (objective(network, teacher, b, weights)[0] for b in (blind, alone))
    torch.testing.assert_close(both, one, rtol=2e-2, atol=0)  # bfloat16, batched otherwise


def test_the_total_weighs_each_term_by_its_name() -> None:
    terms = {name: torch.tensor(1.0) for name in ("camera", "depth", "point", "track")}
    assert float(objectives.total(terms, objectives.OMEGA_WEIGHTS)) == 20
    assert float(objectives.total(terms, objectives.VGGT_WEIGHTS)) == pytest.approx(7.05)
