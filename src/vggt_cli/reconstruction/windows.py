"""Long sequences: overlapping windows, each predicted alone, brought into one world.

S frames, W windows. A window lists its frames; the first window that holds a frame owns it, and
what later windows say of it joins them to that one.
"""

from __future__ import annotations

import dataclasses
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vggt_cli.formats import room
from vggt_cli.geometry import move_prediction
from vggt_cli.reconstruction import graph, loops
from vggt_cli.reconstruction.graph import Link
from vggt_cli.reconstruction.join import Joint, join, stretched, through
from vggt_cli.reconstruction.shelf import Shelf
from vggt_cli.scene import ImageSet, Prediction, Similarity

log = logging.getLogger(__name__)

Predict = Callable[[ImageSet], Prediction]  # of the frames of one window, in its own world
LOOP_SIDE = 10  # frames of each side of a loop that the network sees together
LOOPS = 0.5  # sought for each window, at most
ASKED = 1000  # frames at most that tell whether a set is a sequence
ROUGH = 3.0  # times the usual residual of joints: a loop that fits worse is refused


@dataclass(frozen=True, eq=False)
class Joined:
    """All frames in the world of frame 0, and how well it holds."""

    prediction: Prediction  # float16, on disk
    drift: dict[str, Any]  # see `_drift`

    @property
    def in_memory(self) -> Prediction:
        """The prediction as a network gives it, float32."""
        found = self.prediction
        return dataclasses.replace(
            found,
            depth=found.depth.float(),
            confidence=found.confidence.float(),
            tokens=None if found.tokens is None else found.tokens.float(),
        )


def stream(predict: Predict, chunks: Iterable[ImageSet], overlap: int) -> Iterator[Prediction]:
    """Predictions of the chunks' own frames, in the world of the first chunk.

    Each chunk is seen together with the last `overlap` frames before it. Nothing but one window
    is held, and no loop is closed: for that see `predict_windows`.
    """
    assert overlap > 0, overlap  # x[-0:] would be all of x
    before: tuple[ImageSet, Prediction] | None = None  # the last `overlap` frames
    for chunk in chunks:
        window = chunk if before is None else _then(before[0], chunk)
        prediction = predict(window)
        shared = 0 if before is None else len(before[0])
        if before is not None:
            joint = join(before[1], prediction[:shared], before[0].valid)
            log.debug("%s: residual %.4f", window.names[shared], joint.residual)
            prediction = _moved(prediction, joint)
        yield prediction[shared:]
        before = window[-overlap:], prediction[-overlap:]


def in_order(count: int, size: int, overlap: int) -> list[list[int]]:
    """Windows of `size` frames along a sequence; the last is as long as the others."""
    assert 0 < overlap < size, (overlap, size)
    starts = range(0, max(1, count - overlap), size - overlap)
    begins = [max(0, min(start, count - size)) for start in starts]
    return [list(range(begin, min(begin + size, count))) for begin in begins]


def between(count: int, main: Sequence[int], size: int, overlap: int) -> list[list[int]]:
    """Windows with the frames of a sequence that `main` lacks, and `overlap` of `main` around them.

    Each has at most size - overlap frames of a stretch, evenly spread over it: a heap of frames
    from one place would bend the window.
    """
    assert 0 < overlap < size, (overlap, size)
    windows: list[list[int]] = []
    missing, first = sorted({*range(count)} - {*main}), 0
    while missing:
        near = list(main[first : first + overlap])
        last = near[-1] == main[-1]
        here = len(missing) if last else bisect_left(missing, near[-1])
        some, missing = missing[:here], missing[here:]
        n = -(-len(some) // (size - overlap))
        windows += [sorted(near + some[k::n]) for k in range(n)]
        first = min(first + max(1, overlap - 1), len(main) - overlap)
    return windows


def by_looks(vectors: Tensor, size: int, overlap: int) -> list[list[int]]:
    """Windows of at most `size` frames that look alike, whatever their order.

    vectors: [S, D] of `loops.descriptors`. A window starts at the free frame most like one that
    is taken, holds the `overlap` frames of that one's window that are most like it, and grows by
    the frame most like any that it has, as Prim's tree does. Window 0 starts at frame 0.
    """
    assert 0 < overlap < size, (overlap, size)
    alike = vectors @ vectors.T
    free = torch.ones(len(alike), dtype=torch.bool)
    nearest = torch.zeros(len(alike))  # how like each frame is to the closest that is taken
    home = torch.zeros(len(alike), dtype=torch.long)  # last window of each taken frame
    windows: list[list[int]] = []
    while free.any():
        window = [0]
        if windows:
            seed = int(nearest.where(free, -torch.inf).argmax())
            closest = int(alike[seed].where(~free, -torch.inf).argmax())
            family = torch.tensor(windows[int(home[closest])])
            order = alike[seed, family].argsort(descending=True, stable=True)
            window = [*family[order[:overlap]].tolist(), seed]
        free[window] = False
        closeness = alike[window].amax(0)
        while len(window) < size and free.any():
            added = int(closeness.where(free, -torch.inf).argmax())
            window.append(added)
            free[added] = False
            closeness = torch.maximum(closeness, alike[added])
        home[window] = len(windows)
        nearest = torch.maximum(nearest, closeness) if windows else closeness
        windows.append(window)
    return windows


def follows(vectors: Tensor) -> bool:
    """Whether frames are a sequence: most look like the next one as like few others."""
    if len(vectors) < 3:
        return True
    some = torch.arange(0, len(vectors) - 1, -(-len(vectors) // ASKED))
    alike = vectors[some] @ vectors.T
    following = alike.gather(1, some[:, None] + 1)
    return bool((alike > following).float().mean(1).median() <= 0.1)


def predict_windows(
    predict: Predict,
    images: ImageSet,
    windows: Sequence[list[int]],
    between: Sequence[list[int]] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Joined:
    """All frames of the windows in the world of frame 0; memory of one window.

    Every window but the first holds frames of earlier ones. Loops are found by looks, confirmed
    by predicting frames of both sides together, and closed by `graph.solve`. Then come the windows
    `between`, each placed by its frames of `windows` alone: they move nothing.
    images: of all frames, perhaps on disk. progress: windows done, of all.
    Raises GeometryError if `predict` does; OutputError where the disk is full.
    """
    assert windows[0][0] == 0, windows[0][:3]
    owner = torch.full((len(images),), -1)
    shelf: Shelf | None = None
    links: list[Link] = []
    stretch: list[float] = []  # of each window's depth, so that it goes with those before it
    for number, window in enumerate(windows):
        prediction = predict(exact(images[window]))
        if shelf is None:
            shelf = Shelf.like(prediction, len(images))
        back, prediction = _links(number, window, owner, shelf, images.valid, prediction)
        links += back
        stretch.append(back[0].joint.stretch if back else 1.0)
        new = [k for k, frame in enumerate(window) if owner[frame] < 0]
        owner[[window[k] for k in new]] = number
        shelf.put([window[k] for k in new], prediction[new])
        room.let_go()
        progress(number + 1, len(windows) + len(between))
    assert shelf is not None
    found = _loops(predict, images, shelf, owner, links) if len(windows) > 1 else []
    start = graph.chain(len(windows), links)
    poses = graph.solve(start, links + found)
    log.info("%d windows, %d loops closed", len(windows), len(found))
    # Which windows are too deep nobody knows: as most frames were predicted, so are all.
    usual = float(torch.tensor(stretch)[owner[owner >= 0]].median())
    shelf.place(poses, owner, 1 / usual)
    drift = _drift(images.names, links, found, start, poses)
    known = owner >= 0
    for number, window in enumerate(between):
        joint, new = _place(predict, images, shelf, known, window)
        drift["between"].append({"images": [images.names[k] for k in new], **_words(joint)})
        progress(len(windows) + number + 1, len(windows) + len(between))
    assert known.all(), "a frame is in no window"
    return Joined(shelf.all, drift)


def exact(images: ImageSet) -> ImageSet:
    """The images as they were before they lay on disk: float32 of 8-bit values."""
    if images.pixels.dtype == torch.float32:
        return images
    return dataclasses.replace(images, pixels=(images.pixels.float() * 255).round() / 255)


def _links(
    number: int,
    window: list[int],
    owner: Tensor,
    shelf: Shelf,
    valid: Tensor,
    prediction: Prediction,
) -> tuple[list[Link], Prediction]:
    """The window's joints to the earlier ones that own frames of it, and what it says, stretched.

    The one that shares most with it comes first, and tells how deep it is: from then on, for few
    shared frames tell no scale of cameras.
    """
    of_frame = owner[window]
    others, counts = of_frame[of_frame >= 0].unique(return_counts=True)
    found: list[Link] = []
    for other in others[counts.argsort(descending=True, stable=True)].tolist():
        shared = (of_frame == other).nonzero()[:, 0].tolist()
        frames = [window[k] for k in shared]
        joint = join(shelf.read(frames), prediction[shared], valid[frames])
        if not found:
            prediction = stretched(prediction, joint.stretch)
        found.append(Link(other, number, joint))
    return found, prediction


def _moved(prediction: Prediction, joint: Joint) -> Prediction:
    """The second window's prediction in the first one's world."""
    return move_prediction(stretched(prediction, joint.stretch), joint.similarity)


def _place(
    predict: Predict, images: ImageSet, shelf: Shelf, known: Tensor, window: list[int]
) -> tuple[Joint, list[int]]:
    """Puts the frames of `window` that are not `known` on the shelf, by those that are.

    The joint, and the new frames.
    """
    prediction = predict(exact(images[window]))
    shared = known[window].nonzero()[:, 0].tolist()
    new = (~known[window]).nonzero()[:, 0].tolist()
    frames = [window[k] for k in shared]
    joint = join(shelf.read(frames), prediction[shared], images.valid[frames])
    shelf.put([window[k] for k in new], _moved(prediction[new], joint))
    known[[window[k] for k in new]] = True
    room.let_go()
    return joint, [window[k] for k in new]


def _loops(
    predict: Predict, images: ImageSet, shelf: Shelf, owner: Tensor, links: Sequence[Link]
) -> list[Link]:
    """Links between far windows that the network confirms."""
    count, seen = links[-1].second + 1, (owner >= 0).nonzero()[:, 0]
    most = int(owner[seen].bincount().max())
    side = min(LOOP_SIDE, most // 2)  # no more frames than a window has
    usual = float(torch.tensor([link.joint.residual for link in links]).median())
    pairs = loops.candidates(
        loops.descriptors(shelf.chunks(images, seen)),
        owner[seen],
        graph.hops(count, links),
        int(LOOPS * count) + 1,
    )
    found = []
    for i, j in seen[torch.tensor(pairs, dtype=torch.long).view(-1, 2)].tolist():
        sides = [_around(frame, owner, side) for frame in (i, j)]
        both = exact(images[sides[0] + sides[1]])
        prediction = predict(both)
        first = len(sides[0])
        halves = slice(0, first), slice(first, None)
        if not loops.sees_both(prediction, both.valid, first):
            continue
        joints = [
            join(shelf.read(side), prediction[half], both.valid[half])
            for side, half in zip(sides, halves, strict=True)
        ]
        joint = through(*joints)
        log.debug("loop %d %d: residual %.4f, usually %.4f", i, j, joint.residual, usual)
        if joint.residual <= ROUGH * usual + graph.FINEST:
            a, b = int(owner[i]), int(owner[j])
            found.append(Link(a, b, joint, (i, j)))
    return found


def _around(frame: int, owner: Tensor, count: int) -> list[int]:
    """Up to `count` frames of the window that owns `frame`, on both sides of it."""
    own = (owner == owner[frame]).nonzero()[:, 0].tolist()
    at = own.index(frame)
    start = max(0, min(at - count // 2, len(own) - count))
    return own[start : start + count]


def _drift(
    names: Sequence[str],
    links: Sequence[Link],
    found: Sequence[Link],
    start: Sequence[Similarity],
    poses: Sequence[Similarity],
) -> dict[str, Any]:
    """For report.json: how well windows fit, and how far loops were open before and after.

    Residuals and distances are shares of the depth.
    """

    closed = []
    for link in found:
        assert link.loop is not None
        before, after = (dataclasses.asdict(graph.gap(link, p)) for p in (start, poses))
        at = [names[frame] for frame in link.loop]
        closed.append({"images": at, "before": before, "after": after})
    joints = [{"windows": [link.first, link.second], **_words(link.joint)} for link in links]
    return {"windows": len(poses), "joints": joints, "loops": closed, "between": []}


def _words(joint: Joint) -> dict[str, Any]:
    names = "frames", "residual", "agree", "stretch"
    return {name: getattr(joint, name) for name in names}


def _then(first: ImageSet, second: ImageSet) -> ImageSet:
    assert first.size == second.size, (first.size, second.size)
    return ImageSet(
        first.names + second.names,
        torch.cat([first.pixels, second.pixels]),
        torch.cat([first.valid, second.valid]),
        torch.cat([first.source_from_network, second.source_from_network]),
        torch.cat([first.source_size, second.source_size]),
    )
