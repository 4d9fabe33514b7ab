"""Metres from two photos, from poses and from GPS; a prediction in another world."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from posed import arc
from test_similarity import drawn
from torch import Tensor

from vggt_cli.errors import GeometryError, InputError
from vggt_cli.formats.headers import gps
from vggt_cli.geometry import move, move_prediction, project, unproject
from vggt_cli.reconstruction.scale import (
    Distance,
    east_north_up,
    from_distance,
    from_gps,
    from_poses,
    known_distance,
)
from vggt_cli.scene import Cameras, Photo, Prediction, Similarity

NAMES = ["a-1.jpg", "a-2.jpg", "sub/b=3.jpg"]
DEGREE = math.radians(1)


def test_a_similarity_moves_a_prediction_without_moving_what_it_sees() -> None:
    cameras = arc(3)
    random = torch.Generator().manual_seed(0)
    depth = torch.rand(3, 6, 8, generator=random) + 1
    prediction = Prediction(cameras, depth, torch.ones(3, 6, 8))
    similarity = drawn(2)
    moved = move_prediction(prediction, similarity)
    points = unproject(depth.double(), cameras.intrinsics, cameras.extrinsics)
    there = unproject(moved.depth.double(), moved.cameras.intrinsics, moved.cameras.extrinsics)
    torch.testing.assert_close(there, similarity(points), atol=1e-5, rtol=1e-5)
    for k in range(3):
        xy = [
            project(xyz[k], c.intrinsics[k], c.extrinsics[k])[0]
            for xyz, c in ((points, cameras), (there, moved.cameras))
        ]
        torch.testing.assert_close(*xy, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("text", "metres"),
    [("1.5m", 1.5), ("150 cm", 1.5), (" 1500mm", 1.5), ("1e-3km", 1.0), ("10ft", 3.048)],
)
def test_the_scale_of_two_photos_is_exact(text: str, metres: float) -> None:
    distance = known_distance(f"a-1.jpg-b=3={text}", NAMES)
    assert (distance.first, distance.second) == (0, 2)
    assert distance.metres == pytest.approx(metres)
    cameras = arc(3)
    found = from_distance(cameras, distance)
    centers = move(cameras, found.similarity).centers
    assert float((centers[0] - centers[2]).norm()) == pytest.approx(metres, rel=1e-9)
    assert centers[0].tolist() == [0, 0, 0]
    assert found.warning == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a-1.jpg-a-2.jpg", "no distance with a unit"),
        ("a-1.jpg-a-2.jpg=2", "no distance with a unit"),
        ("a-1.jpg-a-2.jpg=2 miles", "no distance with a unit"),
        ("a-1.jpg-a-2.jpg=0m", "must be positive"),
        ("a-1.jpg-a-2.jpg=1.2.3m", "must be positive"),
        ("a-1.jpg-c.jpg=2m", "two photos are needed"),
        ("a-1.jpg-a-1.jpg=2m", "two photos are needed"),
        ("poses", "no distance"),
    ],
)
def test_what_is_no_distance_between_two_photos_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        known_distance(text, NAMES)
    assert "A-B=1.5m" in error.value.hint


def test_two_photos_at_one_place_have_no_scale() -> None:
    cameras = arc(2)
    with pytest.raises(GeometryError, match="at one place"):
        from_distance(cameras[[0, 0]], Distance(0, 1, 1.0))


def test_the_unit_of_given_poses_becomes_the_metre() -> None:
    cameras = arc(6)
    similarity = Similarity(7.5, drawn(1).rotation, drawn(1).translation)
    original = move(cameras, similarity).extrinsics
    original[3] = torch.nan  # no pose is given
    found = from_poses(cameras, original)
    assert found.factor == pytest.approx(7.5)
    assert found.photos == 5
    assert found.residual < 1e-6
    assert found.warning == ""


def test_a_square_kilometre_on_the_equator_is_one_in_metres() -> None:
    # WGS 84 at the equator: a degree of longitude is that of the circle of the semi-major axis, one
    # of latitude that of the meridian's radius of curvature a (1 - e^2).
    axis, squared = 6378137.0, 0.00669437999014
    east, north = 1000 / axis / DEGREE, 1000 / (axis * (1 - squared)) / DEGREE
    places = torch.tensor([[0, 0, 0], [0, east, 0], [north, east, 0], [north, 0, 50]]).double()
    metres = east_north_up(places)
    truth = torch.tensor([[0.0, 0, 0], [1000, 0, 0], [1000, 1000, 0], [0, 1000, 50]]).double()
    torch.testing.assert_close(metres, truth, atol=0.2, rtol=0)  # the curvature, over a kilometre
    assert float(metres[1, 2]) == pytest.approx(-(1000**2) / axis / 2, rel=1e-3)


def test_distances_of_places_hold_at_any_latitude() -> None:
    random = torch.Generator().manual_seed(0)
    for latitude in (-77.0, -10.0, 48.5, 89.0):
        offsets = torch.randn(5, 3, generator=random).double() * torch.tensor([1e-3, 1e-3, 30.0])
        places = torch.tensor([latitude, 179.9, 100.0]).double() + offsets
        one, other = east_north_up(places), east_north_up(places.flip(0)).flip(0)
        torch.testing.assert_close(
            torch.cdist(one, one), torch.cdist(other, other), atol=1e-6, rtol=0
        )


def at(path: Path, latitude: float, longitude: float, altitude: float | None) -> Photo:
    """A photo with these places in EXIF."""
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = image.getexif()
    said: dict[int, Any] = {
        1: "N" if latitude >= 0 else "S",
        2: (int(abs(latitude)), 0.0, abs(latitude) % 1 * 3600),
        3: "E" if longitude >= 0 else "W",
        4: (int(abs(longitude)), 0.0, abs(longitude) % 1 * 3600),
    }
    if altitude is not None:
        said |= {5: b"\1" if altitude < 0 else b"\0", 6: abs(altitude)}
    exif[0x8825] = said
    image.save(path, exif=exif)
    return Photo(path, path.name, (4, 6))


def test_the_place_of_a_photo_is_read_from_exif(tmp_path: Path) -> None:
    photo = at(tmp_path / "a.jpg", -33.856784, -70.5, -12.25)
    place = gps(photo.path)
    assert place == pytest.approx((-33.856784, -70.5, -12.25), abs=1e-6)
    flat = gps(at(tmp_path / "b.jpg", 48.5, 2.25, None).path)
    assert flat is not None
    assert flat[:2] == pytest.approx((48.5, 2.25))
    assert math.isnan(flat[2])
    assert gps(at(tmp_path / "c.jpg", 0, 0, 0).path) is None  # a receiver without a fix
    Image.new("RGB", (4, 4)).save(tmp_path / "d.jpg")
    assert gps(tmp_path / "d.jpg") is None
    assert gps(tmp_path / "none.jpg") is None


def photographed(folder: Path, metres: Tensor, altitude: bool = True) -> list[Photo]:
    """Photos taken `metres` [S, 3] east, north and up of a place, as GPS says."""
    axis, squared, latitude = 6378137.0, 0.00669437999014, math.radians(48.5)
    root = 1 - squared * math.sin(latitude) ** 2
    north, east = axis * (1 - squared) / root**1.5, axis / root**0.5 * math.cos(latitude)
    return [
        at(
            folder / f"{i}.jpg",
            48.5 + math.degrees(y / north),
            2.25 + math.degrees(x / east),
            100 + z if altitude else None,
        )
        for i, (x, y, z) in enumerate(metres.tolist())
    ]


def walked(unit: float) -> tuple[Cameras, Tensor]:
    """Cameras of a scene whose unit is so many metres, and where they were in metres."""
    cameras = arc(8)
    eastward = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64)
    return cameras, unit * cameras.centers @ eastward.mT


def test_gps_gives_metres_though_one_photo_has_a_wrong_place(tmp_path: Path) -> None:
    cameras, metres = walked(20.0)
    assert from_gps(cameras, photographed(tmp_path, metres)).factor == pytest.approx(20, rel=1e-3)
    metres[5] += torch.tensor([400.0, -300, 0])
    found = from_gps(cameras, photographed(tmp_path, metres))
    assert found.factor == pytest.approx(20, rel=0.02)
    assert found.photos == 8
    assert found.residual < 1


def test_altitudes_that_are_wrong_or_missing_leave_the_scale(tmp_path: Path) -> None:
    cameras, metres = walked(20.0)
    random = torch.Generator().manual_seed(0)
    spoiled = metres.clone()
    spoiled[:, 2] = 60 * torch.randn(8, generator=random).double()
    for photos in (
        photographed(tmp_path, spoiled),
        photographed(tmp_path, metres, altitude=False),
    ):
        assert from_gps(cameras, photos).factor == pytest.approx(20, rel=0.05)


def test_places_that_say_little_warn_with_figures(tmp_path: Path) -> None:
    cameras, metres = walked(0.5)
    random = torch.Generator().manual_seed(1)
    found = from_gps(
        cameras, photographed(tmp_path, metres + 3 * torch.randn(8, 3, generator=random))
    )
    assert found.unsure > 0.1
    assert "standard error" in found.warning
    assert "median residual" in found.warning


def test_the_standard_error_is_that_of_many_draws(tmp_path: Path) -> None:
    cameras, metres = walked(20.0)
    random = torch.Generator().manual_seed(2)
    found = [
        from_gps(cameras, photographed(tmp_path, metres + 3 * torch.randn(8, 3, generator=random)))
        for _ in range(20)
    ]
    factors, said = torch.tensor([(f.factor, f.unsure) for f in found]).unbind(-1)
    assert 0.4 < float(factors.std() / 20 / said.mean()) < 2.5


def test_too_few_places_are_refused(tmp_path: Path) -> None:
    cameras, metres = walked(20.0)
    photos = photographed(tmp_path, metres)
    for i in range(6):
        Image.new("RGB", (4, 4)).save(photos[i].path)
    with pytest.raises(InputError, match="2 of 8 photos have a GPS position"):
        from_gps(cameras, photos)
    with pytest.raises(InputError, match="fix no scale"):
        from_gps(cameras, photographed(tmp_path, torch.zeros(8, 3)))
