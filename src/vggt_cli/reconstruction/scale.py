"""Metres: from a distance that the user knows, from poses, or from where photos were taken."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vggt_cli.errors import GeometryError, InputError
from vggt_cli.formats import headers
from vggt_cli.formats.names import few, pair
from vggt_cli.geometry import fit_similarity
from vggt_cli.reconstruction.align import fit_cameras
from vggt_cli.scene import Cameras, Photo, Similarity

METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001, "km": 1000.0, "ft": 0.3048, "in": 0.0254}
FORMS = "--scale-from takes A-B=1.5m (two photos and the distance between them), poses or gps"
FEW = 3  # photos with a GPS position
UNSURE = 0.1  # of the scale: a standard error that is worth a warning
# WGS 84: semi-major axis in metres and flattening (NIMA TR8350.2, table 3.1).
AXIS, FLATTENING = 6_378_137.0, 1 / 298.257223563


@dataclass(frozen=True)
class Distance:
    """Metres between the optical centres of two photos."""

    first: int  # frames
    second: int
    metres: float


@dataclass(frozen=True)
class Metric:
    """Metres in one unit of the scene, and how well what was given agrees with it."""

    factor: float
    source: Literal["distance", "poses", "gps"]
    photos: int  # that it rests on
    residual: float  # metres: median distance of their centres from where they should be
    unsure: float  # standard error of the factor, as a share of it; NaN where nothing tells

    @property
    def similarity(self) -> Similarity:
        """The map into the scene of metres; the first camera stays the origin."""
        eye = torch.eye(3, dtype=torch.float64)
        return Similarity(self.factor, eye, torch.zeros(3, dtype=torch.float64))

    @property
    def words(self) -> str:
        """The scale in a sentence."""
        said = f"scale from {self.source}: 1 unit of the prediction is {self.factor:.4g} m"
        if self.source == "distance":
            return said
        doubt = f", standard error {self.unsure:.1%}" if math.isfinite(self.unsure) else ""
        return f"{said}{doubt}; {self.photos} photos, median residual {self.residual:.3g} m"

    @property
    def warning(self) -> str:
        """Why the scale may be wrong, with figures; empty: nothing says so."""
        return f"the scale is not sure: {self.words}" if self.unsure > UNSURE else ""


def known_distance(text: str, names: Sequence[str]) -> Distance:
    """The two photos and the distance of "A-B=1.5m". Names may hold "-" and "=" too.

    Raises InputError for another form, no length, photos that are not there or not two.
    """
    ends, found, length = text.rpartition("=")
    number = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([a-z]+)\s*", length)
    if not found or not number or number[2] not in METRES:
        units = ", ".join(METRES)
        raise InputError(f"no distance with a unit ({units}): {text}", FORMS)
    try:
        metres = float(number[1]) * METRES[number[2]]
    except ValueError:
        metres = 0.0
    if not 0 < metres < math.inf:
        raise InputError(f"a distance must be positive: {text}", FORMS)
    pieces = ends.split("-")
    splits = [("-".join(pieces[:k]), "-".join(pieces[k:])) for k in range(1, len(pieces))]
    matches = [(pair([a.strip()], names), pair([b.strip()], names)) for a, b in splits]
    both = {(a[0], b[0]) for a, b in matches if a and b and a != b}
    if len(both) != 1:
        few_words = f"the photos are {few(names)}"
        why = "two photos are needed, each named as only one is" if not both else "not clear which"
        raise InputError(f"{why}: {ends} ({few_words})", FORMS)
    return Distance(*both.pop(), metres)


def from_distance(cameras: Cameras, distance: Distance) -> Metric:
    """The scale that puts the two photos that far apart. Raises GeometryError at one place."""
    first, second = cameras.centers.double()[[distance.first, distance.second]]
    apart = float((first - second).norm())
    if not apart > 0:
        raise GeometryError("the two photos of --scale-from are at one place")
    return Metric(distance.metres / apart, "distance", 2, 0.0, math.nan)


def from_poses(cameras: Cameras, original: Tensor) -> Metric:
    """The scale of given poses, whose unit is a metre.

    original: [S, 3, 4] world-to-camera in the world of their file; NaN where a photo has none.
    """
    given = original[:, 0, 0].isfinite()
    similarity = fit_cameras(cameras.extrinsics[given], original[given])
    rotation, shift = original[given, :, :3], original[given, :, 3:]
    there = -(rotation.mT @ shift)[..., 0]
    distance = (similarity(cameras.centers[given].double()) - there).norm(dim=-1)
    return _metric(similarity.scale, "poses", distance, there)


def from_gps(cameras: Cameras, photos: Sequence[Photo]) -> Metric:
    """The scale that brings optical centres closest to where EXIF says the photos were taken.

    Altitudes are often tens of metres off: all at one height is tried too, and taken where it
    fits better, or where a photo has no altitude. Raises InputError for fewer than three
    positions, or all at one place.
    """
    there = places(photos)
    has = ~there[:, 0].isnan()
    here, there = cameras.centers[has].double(), there[has]
    flat = there.clone()
    flat[:, 2] = 0.0
    tries = [flat, there] if there.isfinite().all() else [flat]
    try:
        fits = [_fit_robustly(here, east_north_up(place)) for place in tries]
    except GeometryError as error:
        raise InputError(f"GPS positions fix no scale: {error}", FORMS) from error
    factor, distance, metres = min(fits, key=lambda fit: float(fit[1].quantile(0.5)))
    return _metric(factor, "gps", distance, metres)


def places(photos: Sequence[Photo]) -> Tensor:
    """[S, 3] latitude, longitude (degrees) and altitude (metres) from EXIF; NaN: not there.

    Raises InputError for fewer than three photos with a position.
    """
    found = [headers.gps(photo.path) or (math.nan,) * 3 for photo in photos]
    said = torch.tensor(found, dtype=torch.float64)
    count = int((~said[:, 0].isnan()).sum())
    if count < FEW:
        words = f"{count} of {len(photos)} photos have a GPS position in EXIF"
        raise InputError(f"{words}; {FEW} are needed for --scale-from gps", FORMS)
    return said


def _metric(
    factor: float, source: Literal["poses", "gps"], distance: Tensor, there: Tensor
) -> Metric:
    """distance: [P] metres from `there` [P, 3]; half of them may be wrong."""
    typical = float(distance.quantile(0.5))
    middle = there.quantile(0.5, dim=0)
    extent = float((there - middle).square().sum().sqrt())  # grows with the number of photos
    # The deviation along each axis, if the median is that of a Gaussian in three.
    return Metric(factor, source, len(there), typical, typical / 1.54 / max(extent, 1e-30))


def _fit_robustly(here: Tensor, there: Tensor) -> tuple[float, Tensor, Tensor]:
    """Scale, [P] distances after the fit, and `there`: least sum of distances, by reweighting."""
    weight = torch.ones(len(here), dtype=torch.float64)
    for _ in range(30):
        fit = fit_similarity(here, there, weight)
        distance = (fit(here) - there).norm(dim=-1)
        weight = 1 / distance.clamp(min=max(1e-6, 0.1 * float(distance.quantile(0.5))))
    return fit.scale, distance, there


def east_north_up(there: Tensor) -> Tensor:
    """[P, 3] metres east, north and up of the first of the places `there` [P, 3].

    there: latitude and longitude in degrees on WGS 84, height in metres.
    Source: EPSG Guidance Note 7-2, methods 9602 (geographic to geocentric) and 9836 (geocentric to
    topocentric).
    """
    latitude, longitude = there[:, :2].deg2rad().unbind(-1)
    squared = FLATTENING * (2 - FLATTENING)
    radius = AXIS / (1 - squared * latitude.sin().square()).sqrt()
    level = (radius + there[:, 2]) * latitude.cos()
    up = (radius * (1 - squared) + there[:, 2]) * latitude.sin()
    geocentric = torch.stack([level * longitude.cos(), level * longitude.sin(), up], -1)
    sin_lat, cos_lat = latitude[0].sin(), latitude[0].cos()
    sin_lon, cos_lon = longitude[0].sin(), longitude[0].cos()
    zero = torch.zeros_like(sin_lat)
    axes = [
        torch.stack([-sin_lon, cos_lon, zero]),
        torch.stack([-sin_lat * cos_lon, -sin_lat * sin_lon, cos_lat]),
        torch.stack([cos_lat * cos_lon, cos_lat * sin_lon, sin_lat]),
    ]
    return (geocentric - geocentric[0]) @ torch.stack(axes).mT
