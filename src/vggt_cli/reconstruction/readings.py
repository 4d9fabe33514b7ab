"""What given poses mean: the reading of their matrices that agrees with what the photos show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cli.formats.priors import Poses
from vggt_cli.geometry import compose, invert, keep_points
from vggt_cli.reconstruction.judge import hold_out, score
from vggt_cli.scene import Cameras, Setup, Tracks

PAIRS = 20_000  # of photos that are compared, at most
TRACKS = 500  # that are triangulated, at most
CLOSE_DEGREES = 15.0  # median over pairs: a reading that agrees with the prediction
CLOSE_PIXELS = 20.0  # at 1024, median: one that agrees with tracks; focal lengths are predicted
WORSE = 3.0  # times the error of the best reading, at least: a mistake
GAP_DEGREES, GAP_PIXELS = 15.0, 5.0  # and so much more than it
CONFIRMED = 0.8  # of the error on tracks as documented: below it they confirm the prediction
FEW_TRACKS = 20
FARTHEST = 1000.0  # an error above it is of points behind cameras
SHORT = 0.01  # of the longest way between two photos: too short to have a direction

QUARTER = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
OPENCV, OPENGL = torch.eye(3), torch.diag(torch.tensor([1.0, -1, -1]))


def _signs(x: int, y: int, z: int) -> Tensor:
    return torch.diag(torch.tensor([float(x), y, z]))


# Axes of cameras in the file: what turns them into OpenCV's. The first that fits is named, so the
# plain ones come first; cameras on a level circle cannot tell all of them apart.
AXES: dict[str, Tensor] = {
    "OpenCV axes (x right, y down, z forward)": OPENCV,
    "OpenGL axes (x right, y up, z back)": OPENGL,
    "axes x left, y up, z forward": _signs(-1, -1, 1),
    "axes x left, y down, z back": _signs(-1, 1, -1),
    "OpenCV axes of photos not yet turned right by 90 degrees": QUARTER,
    "OpenCV axes of photos not yet turned left by 90 degrees": QUARTER.mT,
    "OpenGL axes of photos not yet turned right by 90 degrees": QUARTER @ OPENGL,
    "OpenGL axes of photos not yet turned left by 90 degrees": QUARTER.mT @ OPENGL,
    "left-handed, mirrored axes (x right, y up, z forward)": _signs(1, -1, 1),
    "left-handed, mirrored axes (x left, y down, z forward)": _signs(-1, 1, 1),
    "left-handed, mirrored axes (x right, y down, z back)": _signs(1, 1, -1),
    "left-handed, mirrored axes (x left, y up, z back)": _signs(-1, -1, -1),
}


@dataclass(frozen=True)
class Reading:
    """One meaning of the matrices of a file."""

    camera_to_world: bool
    axes: str  # of AXES

    @property
    def words(self) -> str:
        way = "camera-to-world" if self.camera_to_world else "world-to-camera"
        return f"{way} with {self.axes}"

    def extrinsics(self, matrices: Tensor) -> Tensor:
        """[P, 3, 4] world-to-camera with OpenCV axes, improper where a mirrored set is."""
        found = invert(matrices) if self.camera_to_world else matrices
        return AXES[self.axes].to(found) @ found


@dataclass(frozen=True)
class Witness:
    """What tells readings apart."""

    error: Callable[[Tensor], float]  # of extrinsics [P, 3, 4]; improper ones are of a mirrored set
    close: float  # an error of a reading that agrees
    gap: float  # between that and the error of one that does not
    words: str  # what the error is, with its place {}

    def said(self, error: float) -> str:
        """The error in words."""
        return self.words.format(f"{error:.1f}" if error < FARTHEST else f"over {FARTHEST:.0f}")


@dataclass(frozen=True)
class Mistake:
    """Poses that are not what their format says, with the figures that show it."""

    reading: Reading
    words: str
    hint: str


def documented(poses: Poses) -> Reading:
    """The meaning that the format gives them."""
    return Reading(poses.camera_to_world, list(AXES)[poses.opengl])


def disagreement(given: Tensor, predicted: Tensor) -> float:
    """Degrees, median over pairs of photos, of the larger error of relative turn and direction.

    given, predicted: [P, 3, 4] world-to-camera in any two worlds, P at least 2.
    """
    P = len(given)
    ends = torch.arange(P - 1, 0, -1).cumsum(0)  # of each row of the triangle of all pairs
    count = int(ends[-1])
    pairs = torch.arange(0, count, -(-count // PAIRS))
    i = torch.searchsorted(ends, pairs, right=True)
    j = pairs - ends[i] + P
    a, b = (compose(e[j], invert(e[i])) for e in (given.double(), predicted.double()))
    cosine = ((a[:, :, :3] * b[:, :, :3]).sum((-2, -1)) - 1) / 2
    ways, lengths = (a[:, :, 3], b[:, :, 3]), (a[:, :, 3].norm(dim=-1), b[:, :, 3].norm(dim=-1))
    along = (ways[0] * ways[1]).sum(-1) / (lengths[0] * lengths[1]).clamp(min=1e-30)
    long = torch.stack([n > SHORT * n.max() for n in lengths]).all(0)
    turn, direction = (c.clamp(-1, 1).acos().rad2deg() for c in (cosine, along))
    error = torch.maximum(turn, torch.where(long, direction, 0.0))
    return float(error.quantile(0.5))


def predicted_witness(predicted: Tensor) -> Witness:
    """The predicted extrinsics [P, 3, 4] of the photos."""
    words = "pairs of photos are {} degrees from the prediction"
    return Witness(lambda given: disagreement(given, predicted), CLOSE_DEGREES, GAP_DEGREES, words)


def track_witness(tracks: Tracks, predicted: Cameras) -> Witness | None:
    """Feature tracks of the photos; None where there are too few of them.

    predicted: P cameras, whose intrinsics count. Tracks know nothing of predicted poses.
    """
    held = hold_out(tracks, 0)[0]
    if len(held.xyz) < FEW_TRACKS:
        return None
    held = keep_points(held, torch.arange(len(held.xyz)) < TRACKS)
    group = tuple(range(len(predicted)))
    mirror = torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)

    def error(given: Tensor) -> float:
        # The mirror image of a world makes its improper cameras possible ones.
        improper = (torch.linalg.det(given[:, :, :3]) < 0)[:, None, None]
        extrinsics = torch.where(improper, given * mirror, given)
        cameras = Cameras(extrinsics, predicted.intrinsics.double(), predicted.image_size)
        return score(Setup(cameras, torch.zeros(len(group)).double(), group), held).median

    return Witness(error, CLOSE_PIXELS, GAP_PIXELS, "feature tracks are {} px off (at 1024 px)")


def mistake(poses: Poses, rows: list[int], witness: Witness) -> Mistake | None:
    """What was written instead of what `poses` should be, if `witness` says so clearly.

    rows: those of the witness's photos.
    """
    plain, matrices = documented(poses), poses.matrices[rows]
    errors = {r: witness.error(r.extrinsics(matrices)) for r in _simplest_first(plain)}
    least, as_said = min(errors.values()), errors[plain]
    best = next(r for r, error in errors.items() if error <= 1.1 * least + witness.close / 30)
    if errors[best] > witness.close:
        return None
    if as_said < max(WORSE * errors[best], errors[best] + witness.gap):
        return None
    words = (
        f"the poses are not {plain.words}, but {best.words}: read so, "
        f"{witness.said(errors[best])} in the median; as documented, {witness.said(as_said)}: "
        f"{poses.path}"
    )
    return Mistake(best, words, _mend(plain, best, matrices))


def _simplest_first(plain: Reading) -> list[Reading]:
    """All readings: the documented, the same inverted, then by AXES."""
    ways = (plain.camera_to_world, not plain.camera_to_world)
    rest = [Reading(way, axes) for axes in AXES if axes != plain.axes for way in ways]
    return [*(Reading(way, plain.axes) for way in ways), *rest]


def _mend(wanted: Reading, found: Reading, matrices: Tensor) -> str:
    """How to write what is wanted, from a file as it was found."""
    if "turned" in found.axes:
        return "they are poses of the photos as stored; poses of upright photos are needed"
    steps = []
    if wanted.camera_to_world != found.camera_to_world:
        steps.append("invert each matrix [R | t]: [R' | -R' t], R' the transpose of R")
    flip = torch.diagonal(AXES[wanted.axes] @ AXES[found.axes]) < 0
    numbers = [k + 1 for k in flip.nonzero()[:, 0].tolist()]
    columns, rows = ("column", "R"), ("row", "[R | t]")
    if numbers:
        part, of = columns if wanted.camera_to_world else rows
        many = "s" if len(numbers) > 1 else ""
        steps.append(f"negate {part}{many} {' and '.join(map(str, numbers))} of {of}")
    if len(numbers) % 2 and bool((torch.linalg.det(matrices[:, :, :3]) > 0).all()):
        part, of = rows if wanted.camera_to_world else columns
        steps.append(f"negate {part} 1 of {of}, which mirrors the world back")
    return "; then ".join(steps)


def confirms(witness: Witness, found: Mistake, poses: Poses, rows: list[int]) -> bool:
    """The reading of `found` has clearly less error than the documented one."""
    readings = (found.reading, documented(poses))
    a, b = (witness.error(reading.extrinsics(poses.matrices[rows])) for reading in readings)
    return a < CONFIRMED * b
