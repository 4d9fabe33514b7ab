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
GAIN = 0.9  # of the residuals along the radius: what a radial term must bring them below
ENOUGH = 500  # observations of a lens
MOST = 4000  # tracks that are looked at


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
    """Lenses with a radial term, and those whose residuals ask for one.

    tracks: features in source pixels, as they were found. setup: refined cameras.
    """
    found = []
    trend = radial_trend(tracks, setup)
    group = torch.tensor(setup.group)
    for n in group.unique().tolist():
        members = (group == n).nonzero()[:, 0]
        first = int(members[0])
        files = tuple(photos[i].name for i in members.tolist())
        kept = float(setup.radial[first])
        moved = corner_shift(setup, first, kept or float(trend[first]))
        if not moved > CLOSE:
            continue
        words = f"the lens of {len(files)} photos moves their corners by {moved:.0f} px at 1024 px"
        if kept:
            words += f" (radial term {kept:.3g}); it was measured and is taken out"
            command = "use the photos in SCENE/images, not the originals, with these cameras"
        else:
            words += ", as the errors of features grow towards the corners; it was not taken out"
            command = "calibrate the lens and give photos without distortion"
            if len(members) < RADIAL_IMAGES <= len(photos) and len({p.size for p in photos}) == 1:
                command = (
                    "if one lens took all: vggt reconstruct PHOTOS --out SCENE --camera shared"
                )
        found.append(Finding("distortion", words, files, command))
    return found


def corner_shift(setup: Setup, frame: int, radial: float) -> float:
    """Pixels at 1024 by which the lens moves the corner of the photo; inf: the lens ends before."""
    corner = setup.cameras.image_size[frame].flip(0).double()
    k = torch.tensor(radial, dtype=torch.float64)
    moved = distort(corner, setup.cameras.intrinsics[frame], k) - corner
    return float((moved.norm() / pixel_scale(setup.cameras)[frame]).nan_to_num(torch.inf))


def radial_trend(tracks: Tracks, setup: Setup) -> Tensor:
    """[S] radial term that the residuals of each frame's lens ask for; 0: none.

    The points are triangulated anew under `setup`. Of each residual the part along the radius r, in
    units of the focal length, is fitted by a r + k r^3 with least absolute error: the focal length
    has taken the linear part, and gives it back. k is believed where it explains a tenth.
    """
    long = torch.bincount(tracks.point, minlength=len(tracks.xyz)) >= 3
    kept = torch.zeros_like(long)
    chosen = long.nonzero()[:, 0]
    kept[chosen[:: max(1, len(chosen) // MOST)]] = True
    found = torch.zeros(len(setup.group), dtype=torch.float64)
    if not kept.any():
        return found
    tracks = keep_points(tracks, kept)
    points = triangulate(tracks, setup, LOOSE)
    good = points.good(tracks, LOOSE)
    frame = tracks.frame.long()
    xy, _ = project_tracks(Tracks(points.xyz, tracks.point, tracks.frame, tracks.xy), setup.cameras)
    k = setup.cameras.intrinsics[frame]
    focal = torch.diagonal(k, dim1=-2, dim2=-1)[:, :2]
    ray, residual = (xy - k[:, :2, 2]) / focal, (tracks.xy.double() - xy) / focal
    r = ray.norm(dim=-1).clamp(min=1e-9)
    along = (residual * ray).sum(-1) / r
    lens = torch.tensor(setup.group)
    for n in lens.unique().tolist():
        rows = good & (lens[frame] == n) & (setup.radial[frame] == 0)
        if int(rows.sum()) >= ENOUGH:
            found[lens == n] = _cubic(r[rows], along[rows])
    return found


def _cubic(r: Tensor, along: Tensor) -> float:
    """k of `radial_trend`; 0 where it explains too little."""
    powers = torch.stack([r, r**3], -1)
    weight = torch.ones_like(r)
    for _ in range(20):
        matrix = powers.mT @ (weight[:, None] * powers)
        fit = torch.linalg.lstsq(matrix, powers.mT @ (weight * along)).solution
        left = (along - powers @ fit).abs()
        weight = 1 / (left + 1e-5)
    return float(fit[1]) if left.sum() < GAIN * along.abs().sum() else 0.0
