"""Track labels: what the renderer confirms, what occlusion hides, what is drawn."""

import pytest
import torch
from torch import Tensor

from vggt_cli.geometry import project, unproject
from vggt_cli.learning import synthetic
from vggt_cli.learning.labels import MARGIN, Labels, labels
from vggt_cli.learning.losses import Truth

SIZE = (96, 128)
HIDING = (2, 4, 17, 19)  # seeds whose wide baselines hide much behind objects


def rendered(*seeds: int, spread: float = 1.0, frames: int = 4) -> Truth:
    """The truth of one sequence a seed, in the renderer's own world."""
    samples = [synthetic.sample(seed, synthetic.Path(frames, SIZE, spread)) for seed in seeds]
    parts = [(s.cameras.extrinsics, s.cameras.intrinsics, s.depth, s.valid) for s in samples]
    return Truth(*(torch.stack(x) for x in zip(*parts, strict=True)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def starts(truth: Truth, found: Labels, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """World points [N, 3] of a sequence's tracks, their xy [S, N, 2] and where they are seen."""
    real = found.seen[b].any(0)
    xy, seen = found.xy[b][:, real], found.seen[b][:, real]
    column, row = xy[0].long().unbind(-1)
    points = unproject(truth.depth[b, 0], truth.intrinsics[b, 0], truth.extrinsics[b, 0])
    return points[row, column], xy, seen


def test_the_renderer_confirms_what_is_seen_and_occlusion_hides_the_rest() -> None:
    seen_and_confirmed, seen_in_all, hidden_called_seen, hidden_in_all = 0, 0, 0, 0
    for seed in HIDING:
        random = generator(seed)
        world = synthetic.world(random)
        cameras = synthetic.cameras(random, world, synthetic.Path(4, SIZE))
        truth = rendered(seed)
        assert torch.equal(truth.extrinsics[0], cameras.extrinsics)
        points, xy, seen = starts(truth, labels(truth, generator(), 4096, slack=0.0), 0)
        # A surface less than 5 % before a point counts as the same.
        visible = synthetic.visible(world, points, cameras, tolerance=0.06)
        places, z = project(points[None, None], cameras.intrinsics, cameras.extrinsics)
        places, z = places[:, 0], z[:, 0]
        torch.testing.assert_close(xy[seen], places[seen], atol=1e-3, rtol=0)
        low, high = MARGIN, torch.tensor([SIZE[1], SIZE[0]]) - MARGIN
        inside = (z > 0) & (places >= low).all(-1) & (places <= high).all(-1)
        assert not (seen & ~inside).any()
        seen_in_all += int(seen.sum())
        seen_and_confirmed += int((seen & visible).sum())
        hidden_in_all += int((inside & ~visible).sum())
        hidden_called_seen += int((inside & ~visible & seen).sum())
        # What is in view and not hidden is called seen.
        assert (inside & visible & ~seen).sum() < 0.02 * (inside & visible).sum(), seed
    assert hidden_in_all > 2000
    assert seen_and_confirmed > 0.985 * seen_in_all
    assert hidden_called_seen < 0.15 * hidden_in_all  # those within a pixel of an outline


def test_depth_at_a_label_is_its_points_in_every_frame() -> None:
    truth = rendered(*HIDING)
    found = labels(truth, generator(), slack=0.0)
    every = unproject(truth.depth, truth.intrinsics, truth.extrinsics)
    for b in range(len(HIDING)):
        points, xy, seen = starts(truth, found, b)
        frame, track = seen.nonzero(as_tuple=True)
        column, row = xy[seen].long().unbind(-1)
        off = (every[b, frame, row, column] - points[track]).norm(dim=-1)
        assert (off < 0.1 * truth.depth[b, frame, row, column]).float().mean() > 0.95


def test_every_track_is_seen_in_frame_zero_and_another_or_never() -> None:
    truth = rendered(0, 3, 2)
    truth.valid[2, 1:] = False  # its frames show nothing in common
    found = labels(truth, generator(), 600)
    assert found.xy.shape == (3, 4, 600, 2)
    frames = found.seen.sum(1)
    assert ((frames > 1) == found.seen[:, 0]).all()
    assert ((frames > 1) | (frames == 0)).all()
    assert (frames[:2] > 1).all()
    assert not found.seen[2].any()
    assert found.xy.isfinite().all()
    assert (found.xy[2] >= 0).all()  # a place to ask for, all the same
    assert (found.xy[2] <= torch.tensor([SIZE[1], SIZE[0]])).all()


def test_the_tracks_are_of_the_better_half_by_number_of_frames() -> None:
    truth = rendered(3)
    half = labels(truth, generator(), 20_000).seen.sum(1)[0]
    few = labels(truth, generator(), 64).seen.sum(1)[0]
    size = int((half > 0).sum())
    assert 64 < size < 20_000
    assert few.min() >= half[:size].min()
    # All tracks, of which the half is the better: those that two frames show.
    pairs = [labels(Truth(*(x[:, [0, s]] for x in truth)), generator(), 20_000) for s in (1, 2, 3)]
    assert size > max(int(p.seen[0, 0].sum()) for p in pairs) / 2
    assert half.float()[:size].mean() > 3


def test_the_same_generator_draws_the_same_labels_and_another_does_not() -> None:
    truth = rendered(1)
    first, again, other = (labels(truth, generator(seed), 32) for seed in (0, 0, 1))
    assert torch.equal(first.xy, again.xy)
    assert torch.equal(first.seen, again.seen)
    assert not torch.equal(first.xy, other.xy)


@pytest.mark.parametrize(
    ("nearer", "slack", "seen"), [(0.96, 0.0, 1), (0.94, 0.0, 0), (0.94, 0.1, 1)]
)
def test_depth_agrees_within_five_percent_and_the_slack(
    nearer: float, slack: float, seen: int
) -> None:
    """Two cameras at one place before a wall, of which the second sees another depth."""
    depth = torch.full((1, 2, 32, 32), 2.0)
    depth[:, 1] *= nearer
    lens = torch.tensor([[20.0, 0, 16], [0, 20, 16], [0, 0, 1]])
    still = torch.eye(3, 4).expand(1, 2, 3, 4)
    truth = Truth(still, lens.expand(1, 2, 3, 3), depth, torch.ones(1, 2, 32, 32) > 0)
    assert labels(truth, generator(), 16, slack).seen.float().mean() == seen


def test_a_label_needs_one_of_four_pixels_to_agree() -> None:
    depth = torch.full((1, 2, 32, 32), 2.0)
    depth[:, 1] = 1.0
    depth[0, 1, 16, 20] = 2.0
    lens = torch.tensor([[20.0, 0, 16], [0, 20, 16], [0, 0, 1]])
    still = torch.eye(3, 4).expand(1, 2, 3, 4)
    truth = Truth(still, lens.expand(1, 2, 3, 3), depth, torch.ones(1, 2, 32, 32) > 0)
    found = labels(truth, generator(), 16)
    places = {tuple(x) for x in found.xy[0, 0, found.seen[0, 1]].tolist()}
    assert places <= {(19.5, 15.5), (20.5, 15.5), (19.5, 16.5), (20.5, 16.5)}
    assert len(places) == 2  # the better half of four
    truth.valid[0, 1, 16, 20] = False
    assert not labels(truth, generator(), 16).seen.any()
