"""What is wrong with a set of photos or its scene, which files it concerns, and what to do next.

In commands, PHOTOS stands for the folder of photos and SCENE for that of the scene.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vggt_cli.formats.names import few
from vggt_cli.geometry import project, resize, unproject
from vggt_cli.reconstruction.improve import Improved
from vggt_cli.reconstruction.lenses import against_headers, bent, scattered
from vggt_cli.reconstruction.looks import blurred, components, copies, sharpness
from vggt_cli.reconstruction.pairs import ALL_PAIRS, SAMPLES, covisible
from vggt_cli.reconstruction.tracks import FeatureTracks
from vggt_cli.scene import Cameras, Finding, Photo, Prediction, Refinement

# Share of a photo's pixels that another must see for the two to belong together by the predicted
# geometry; unspoilt sets hold together up to 0.5 and more.
OVERLAP = 0.1
# Of the depth: median difference between two photos that see the same place. The rough depth of
# `mini` differs by 0.027 to 0.039 where its cameras are right, and by 0.07 where they are turned by
# 5 degrees and moved by a tenth of their extent.
LAYERED = 0.06
FEW = 50  # samples of a photo in another: fewer say nothing
BEHIND = -0.2  # of the depth: a point this far behind what another photo sees is hidden there


def diagnose(
    photos: Sequence[Photo],
    improved: Improved,
    raw: Cameras | None,
    group: Sequence[int],
) -> tuple[Finding, ...]:
    """All findings on a set of photos and what was made of it, none for a sound one.

    Of more than ALL_PAIRS photos every one is looked at, and not every two.

    raw: the network's cameras before any were shared; None where they are not known. group: frame
    i shares its lens with those of equal group[i].
    Reads the photos. Raises InputError if one cannot be read.
    """
    images, found, refinement = improved.images, improved.found, improved.refinement
    cameras = resize(improved.prediction.cameras, images.source_from_network, images.source_size)
    findings = [
        *(_of_pairs(improved) if len(photos) <= ALL_PAIRS else []),
        *soft(photos, sharpness(photos)),
        *([] if raw is None else scattered(photos, raw, group)),
        *against_headers(photos, refinement.lens.cameras if refinement else cameras),
    ]
    if found and refinement and refinement.method != "none":
        findings += bent(photos, found.tracks, refinement.lens)
    return tuple(findings)


def _of_pairs(improved: Improved) -> list[Finding]:
    """What comparing every two photos tells."""
    images, prediction, found = improved.images, improved.prediction, improved.found
    linked = _linked(prediction, images.valid, found)
    differ = disagreement(prediction, images.valid, linked)
    return [
        *strangers(images.names, components(linked), "feature" if found else "surface"),
        *layers(images.names, differ, improved.refinement),
        *twice(images.names, copies(images)),
    ]


def _linked(prediction: Prediction, valid: Tensor, found: FeatureTracks | None) -> Tensor:
    """[S, S] bool: photos that share verified features, or without any known, that should."""
    if found is None:
        return covisible(prediction, valid) > OVERLAP
    linked = torch.zeros(len(valid), len(valid), dtype=torch.bool)
    i, j = found.pairs.unbind(1)
    linked[i, j] = linked[j, i] = True
    return linked


def strangers(names: Sequence[str], groups: Sequence[list[int]], shared: str) -> list[Finding]:
    """Groups of frames, the largest first, that have nothing in common with that.

    shared: what photos of one group have in common, singular.
    """
    found = []
    lonely = [group[0] for group in groups[1:] if len(group) == 1]
    several = [group for group in groups[1:] if len(group) > 1]
    if len(groups) == len(names) > 1:
        lonely, several = list(range(len(names))), []
    for group in several:
        files = tuple(names[i] for i in group)
        words = (
            f"{len(files)} of {len(names)} photos share no {shared} with the others: "
            f"{few(files)}; their place beside the others is a guess"
        )
        command = (
            "take photos that lead from one group to the other, or give these alone, one path a "
            "line: vggt reconstruct - --out OTHER < LIST"
        )
        found.append(Finding("group", words, files, command))
    if lonely:
        files = tuple(names[i] for i in sorted(lonely))
        words = f"{len(files)} of {len(names)} photos share no {shared} with any: {few(files)}"
        command = "leave these out, or retake them so that two thirds of each are in another photo"
        found.append(Finding("group", words, files, command))
    return found


def disagreement(prediction: Prediction, valid: Tensor, linked: Tensor) -> Tensor:
    """[S, S] float32: by how much of the depth two frames differ on what both see; NaN: nothing.

    Row i: the median, over confident pixels of frame i that the other, `linked` [S, S] to it,
    should see too, of the difference between their depth there and its own. What is hidden in the
    other frame does not count; what it looks through does. valid: [S, H, W].
    """
    cameras, depth = prediction.cameras, prediction.depth
    S, H, W = depth.shape
    sure = valid & depth.isfinite() & (depth > 0)
    if sure.any():
        sure &= prediction.confidence >= prediction.confidence[sure].median()
    rows = torch.linspace(0, H - 1, min(H, SAMPLES)).round().long()[:, None]
    columns = torch.linspace(0, W - 1, min(W, SAMPLES)).round().long()
    result = torch.full((S, S), torch.nan)
    for i in range(S):
        others = linked[i].nonzero()[:, 0]
        others = others[others != i]
        points = unproject(depth[i], cameras.intrinsics[i], cameras.extrinsics[i])
        points = points[rows, columns][sure[i][rows, columns]]  # [n, 3]
        if not len(points) or not len(others):
            continue
        there = points.expand(len(others), 1, -1, 3)
        xy, z = project(there, cameras.intrinsics[others], cameras.extrinsics[others])
        xy, z = xy[:, 0], z[:, 0]
        inside = (z > 0) & (xy >= 0).all(-1) & (xy[..., 0] < W) & (xy[..., 1] < H)
        column, row = torch.where(inside[..., None], xy, 0).long().unbind(-1)
        frame = others[:, None]
        relative = depth[frame, row, column] / z - 1
        counts = inside & sure[frame, row, column] & (relative > BEHIND)
        median = torch.where(counts, relative.abs(), torch.nan).nanmedian(1).values
        result[i, others] = torch.where(counts.sum(1) >= FEW, median, torch.nan)
    return result


def layers(
    names: Sequence[str], disagreement: Tensor, refinement: Refinement | None
) -> list[Finding]:
    """Surfaces that photos put at several depths: everywhere, or single photos against the rest.

    disagreement: [S, S] of the function of that name.
    """
    if bool(disagreement.isnan().all()):
        return []
    scene = float(disagreement.nanmedian())
    both = torch.cat([disagreement, disagreement.mT], 1).nanmedian(1).values.nan_to_num(0)
    limit = LAYERED if scene > LAYERED else 2 * LAYERED
    worst = [i for i in both.argsort(descending=True).tolist() if both[i] > limit]
    if not worst and scene <= LAYERED:
        return []
    named = few([f"{names[i]} ({both[i]:.0%})" for i in worst])
    if scene > LAYERED:
        words = (
            f"surfaces lie in layers: where two photos show the same place, their depths differ by "
            f"{scene:.1%} (median of pairs; sound scenes stay below {LAYERED:.0%}); most: {named}"
        )
    else:
        words = f"the depth of {len(worst)} of {len(names)} photos disagrees with the rest: {named}"
    command = "leave out the worst of these photos, or take more between them and their neighbours"
    if refinement is None:
        command = "vggt refine SCENE"
    return [Finding("layers", words, tuple(names[i] for i in worst), command)]


def soft(photos: Sequence[Photo], sharpness: Sequence[float]) -> list[Finding]:
    """Photos whose edges are much softer than those of the others; `sharpness` of each."""
    frames = blurred(sharpness)
    if not frames:
        return []
    rest = [value for i, value in enumerate(sharpness) if i not in frames]
    usual = float(torch.tensor(rest, dtype=torch.float64).nanmedian())
    files = tuple(photos[i].name for i in frames)
    named = few([f"{photos[i].name} ({sharpness[i] / usual:.0%})" for i in frames])
    words = f"{len(files)} of {len(photos)} photos are blurred (sharpness beside the rest): {named}"
    return [Finding("blur", words, files, "retake these, or leave them out")]


def twice(names: Sequence[str], groups: Sequence[list[int]]) -> list[Finding]:
    """Groups of frames that hold the same photo: the first of each is to be kept."""
    found = []
    for group in groups:
        files = tuple(names[i] for i in group)
        words = f"{len(files)} photos show the same from the same place: {few(files)}"
        found.append(Finding("duplicate", words, files, f"leave out all of these but {files[0]}"))
    return found
