"""What does not fit a lens: focal lengths that scatter or contradict the header, and distortion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vggt_cli.formats.lenses import camera_groups
from vggt_cli.geometry import distort, keep_points, project_tracks
from vggt_cli.reconstruction.judge import CLOSE, EXIF_AGREES
from vggt_cli.reconstruction.refine import RADIAL_IMAGES
from vggt_cli.reconstruction.triangulate import pixel_scale, triangulate
from vggt_cli.scene import Cameras, Finding, Photo, Setup, Tracks

# Of the focal length, which half of a lens's photos lie further from the median. What they share is
# then less sure than the 3 % that bundle adjustment is shown to mend.
SCATTER = 0.05
LOOSE = 8.0  # pixels at 1024: distortion may move an observation that far from its point
EDGE = 0.7  # of the way from the centre to a corner: beyond it lie the edges
ENOUGH = 200  # observations there
MOST = 4000  # tracks that are looked at
# Pixels at 1024, and of the usual error there: what features must lean outwards or inwards by.
LEAN, CLEAR = 0.05, 0.3


def scattered(photos: Sequence[Photo], raw: Cameras, group: Sequence[int]) -> list[Finding]:
    """Lenses to which the network gave a different focal length in each photo.

    raw: as the network has them, before they were shared. group: frame i shares its intrinsics in
    the scene with those of equal group[i].
    """
    found = []
    lens = torch.tensor(camera_groups(photos, "auto"))
    focal = _focal(raw)
    for n in lens.unique().tolist():
        members = (lens == n).nonzero()[:, 0]
        away = (focal[members] / focal[members].quantile(0.5) - 1).abs()
        spread = float(away.quantile(0.5))
        if len(members) < 3 or spread <= SCATTER:
            continue
        files = tuple(photos[i].name for i in members[away > SCATTER].tolist())
        words = (
            f"the predicted focal lengths of {len(members)} photos by one lens scatter by "
            f"{spread:.0%} (median); {len(files)} are further off than {SCATTER:.0%}"
        )
        shared = len({group[i] for i in members.tolist()}) == 1
        why, mode = (
            ("if the lens was zoomed between them", "per-image")
            if shared
            else ("if it was not zoomed", "shared" if len(members) == len(photos) else "auto")
        )
        command = f"{why}: vggt reconstruct PHOTOS --out SCENE --camera {mode}"
        found.append(Finding("focal", words, files, command))
    return found


def _focal(cameras: Cameras) -> Tensor:
    """[S] float64 geometric mean of both axes."""
    k = cameras.intrinsics.double()
    return (k[:, 0, 0] * k[:, 1, 1]).sqrt()


def against_headers(photos: Sequence[Photo], cameras: Cameras) -> list[Finding]:
    """Photos whose focal length is far from what their headers say; cameras in source pixels."""
    header = torch.tensor([photo.focal_pixels for photo in photos], dtype=torch.float64)
    ratio = _focal(cameras) / header
    off = ((ratio - 1).abs() > EXIF_AGREES).nonzero()[:, 0].tolist()  # NaN is not
    if not off:
        return []
    worst = max(off, key=lambda i: abs(float(ratio[i].log())))
    files = tuple(photos[i].name for i in off)
    words = (
        f"the focal length of {len(off)} of {len(photos)} photos is not what headers say; most: "
        f"{ratio[worst]:.0%} of {header[worst]:.0f} px in {photos[worst].name}"
    )
    f, (h, w) = header[worst], photos[worst].size
    one_lens = len({(photo.size, photo.focal_35mm) for photo in photos}) == 1
    how = f"--intrinsics {f:.0f},{f:.0f},{w / 2:g},{h / 2:g}" if one_lens else "--refine ba"
    command = f"unless the photos are crops: vggt reconstruct PHOTOS --out SCENE {how}"
    return [Finding("focal", words, files, command)]


def bent(photos: Sequence[Photo], tracks: Tracks, setup: Setup) -> list[Finding]:
    """Lenses with a radial term that moves pixels, and those whose residuals ask for one.

    tracks: features in source pixels, as they were found. setup: refined cameras.
    """
    found = []
    lens = torch.tensor(camera_groups(photos, "auto"))
    frame, along = at_the_edges(tracks, setup)
    for n in lens.unique().tolist():
        members = (lens == n).nonzero()[:, 0].tolist()
        files = tuple(photos[i].name for i in members)
        moved, kept = max((corner_shift(setup, i), float(setup.radial[i])) for i in members)
        if moved > CLOSE:
            words = (
                f"the lens of {len(files)} photos moves their corners by {moved:.0f} px at 1024 px "
                f"(radial term {kept:.3g}); it was measured and is taken out"
            )
            command = "use the photos in SCENE/images, not the originals, with these cameras"
            found.append(Finding("distortion", words, files, command))
        elif kept == 0 and (lean := outward_lean(along[lens[frame] == n])):
            words = (
                f"the lens of {len(files)} photos may bend straight lines: near its edges features "
                f"lie {abs(lean):.2f} px at 1024 px too far {'out' if lean > 0 else 'in'}"
            )
            command = "calibrate the lens and give photos without distortion"
            if len(files) >= RADIAL_IMAGES and len({setup.group[i] for i in members}) > 1:
                mode = "shared" if len(files) == len(photos) else "auto"
                command = f"vggt reconstruct PHOTOS --out SCENE --camera {mode}"
            found.append(Finding("distortion", words, files, command))
    return found


def corner_shift(setup: Setup, frame: int) -> float:
    """Pixels at 1024 by which the lens moves the corner of the photo; inf: the lens ends before."""
    corner = setup.cameras.image_size[frame].flip(0).double()
    moved = distort(corner, setup.cameras.intrinsics[frame], setup.radial[frame]) - corner
    return float((moved.norm() / pixel_scale(setup.cameras)[frame]).nan_to_num(torch.inf))


def at_the_edges(tracks: Tracks, setup: Setup) -> tuple[Tensor, Tensor]:
    """Frames [M] of features near the edges, and how much farther out than their points they lie.

    The points are triangulated anew under `setup`. In pixels at 1024, [M].
    """
    chosen = (torch.bincount(tracks.point, minlength=len(tracks.xyz)) >= 3).nonzero()[:, 0]
    if len(chosen) == 0:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
    kept = torch.zeros(len(tracks.xyz), dtype=torch.bool)
    kept[chosen[:: max(1, len(chosen) // MOST)]] = True
    tracks, c = keep_points(tracks, kept), setup.cameras
    cameras = Cameras(c.extrinsics.double(), c.intrinsics.double(), c.image_size)
    points = triangulate(tracks, Setup(cameras, setup.radial, setup.group), LOOSE)
    frame = tracks.frame.long()
    xy, _ = project_tracks(Tracks(points.xyz, tracks.point, tracks.frame, tracks.xy), cameras)
    ray = xy - cameras.intrinsics[frame, :2, 2]
    half = cameras.image_size[frame].double().norm(dim=-1) / 2
    edge = points.good(tracks, LOOSE) & (ray.norm(dim=-1) > EDGE * half)
    ray, residual, frame = ray[edge], (tracks.xy.double() - xy)[edge], frame[edge]
    along = (residual * ray).sum(-1) / ray.norm(dim=-1) / pixel_scale(cameras)[frame]
    return frame, along


def outward_lean(along: Tensor) -> float:
    """The median of `along` [M], of `at_the_edges` for one lens; 0: no more than chance.

    Points and focal lengths hide most of a distortion: a lens that moves corners by 37 pixels
    leaves 0.1, sound ones leave 0.01.
    """
    if len(along) < ENOUGH:
        return 0.0
    lean, usual = float(along.median()), float(along.abs().median())
    return lean if abs(lean) > max(LEAN, CLEAR * usual) else 0.0
