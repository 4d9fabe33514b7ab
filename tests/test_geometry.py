"""Laws of poses and pixels, and the golden pose encodings."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from vggt_cli import geometry
from vggt_cli.scene import Cameras, Prediction


def random_rotations(*leading: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    quaternion = torch.randn(*leading, 4, generator=generator, dtype=torch.float64)
    return geometry.rotation_from_quaternion(quaternion)


def random_cameras(*leading: int, size: tuple[int, int] = (4, 6)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    encoding = torch.randn(*leading, 9, generator=generator, dtype=torch.float64)
    encoding[..., 7:] = 0.6 + 0.5 * torch.rand(
        *leading, 2, generator=generator, dtype=torch.float64
    )
    extrinsics, intrinsics = geometry.decode_pose(encoding, size)
    return intrinsics, extrinsics


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_projecting_unprojected_pixels_gives_their_centres_and_depth(
    leading: tuple[int, ...], device: torch.device
) -> None:
    intrinsics, extrinsics = (x.float().to(device) for x in random_cameras(*leading))
    depth = torch.rand(*leading, 4, 6, device=device) + 0.5
    xy, z = geometry.project(
        geometry.unproject(depth, intrinsics, extrinsics), intrinsics, extrinsics
    )
    assert_close(z, depth, atol=1e-5, rtol=1e-5)
    centers = geometry.pixel_centers((4, 6), depth).expand(*leading, 4, 6, 2)
    assert_close(xy, centers, atol=1e-4, rtol=1e-5)
    assert centers[..., 0, 0, :].flatten()[0] == 0.5


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: math.hypot(*q) > 0.1))
@settings(max_examples=200, deadline=None)
def test_decoding_an_encoded_rotation_is_the_identity(quaternion: list[float]) -> None:
    rotation = geometry.rotation_from_quaternion(torch.tensor(quaternion, dtype=torch.float64))
    back = geometry.quaternion_from_rotation(rotation)
    assert back[3] >= 0
    assert_close(geometry.rotation_from_quaternion(back), rotation, atol=1e-12, rtol=0)
    assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("axis", range(3))
def test_half_turns_encode_exactly(axis: int) -> None:
    rotation = -torch.eye(3, dtype=torch.float64)
    rotation[axis, axis] = 1
    expected = torch.zeros(4, dtype=torch.float64)
    expected[axis] = 1
    assert_close(geometry.quaternion_from_rotation(rotation), expected)


def test_decoding_an_encoded_camera_is_the_identity() -> None:
    intrinsics, extrinsics = random_cameras(3, size=(40, 60))
    encoding = geometry.encode_pose(extrinsics, intrinsics, (40, 60))
    decoded = geometry.decode_pose(encoding, (40, 60))
    assert_close(decoded[0], extrinsics)
    assert_close(decoded[1], intrinsics)


def test_composing_with_the_inverse_is_the_identity() -> None:
    _, extrinsics = random_cameras(5)
    identity = torch.eye(3, 4, dtype=torch.float64).expand(5, 3, 4)
    assert_close(geometry.compose(extrinsics, geometry.invert(extrinsics)), identity)
    assert_close(geometry.compose(geometry.invert(extrinsics), extrinsics), identity)


def test_moving_to_the_first_camera_makes_it_the_origin_and_keeps_relative_poses() -> None:
    intrinsics, extrinsics = (x.float() for x in random_cameras(4))
    cameras = Cameras(extrinsics, intrinsics, torch.tensor([[4, 6]] * 4))
    depth = torch.ones(4, 4, 6)
    moved = geometry.from_first_camera(Prediction(cameras, depth, depth)).cameras
    assert torch.equal(moved.extrinsics[0], torch.eye(3, 4))

    def relative(e: Tensor) -> Tensor:
        return geometry.compose(e[2:3].double(), geometry.invert(e[3:4].double()))

    assert_close(relative(moved.extrinsics), relative(extrinsics), atol=1e-5, rtol=1e-5)


def test_a_camera_in_other_pixels_sees_the_same_point_at_the_mapped_place() -> None:
    intrinsics, extrinsics = (x.float() for x in random_cameras(2))
    cameras = Cameras(extrinsics, intrinsics, torch.tensor([[4, 6]] * 2))
    move = torch.tensor([[3.0, 0, 2], [0, 5.0, -1], [0, 0, 1]], dtype=torch.float64).expand(2, 3, 3)
    resized = geometry.resize(cameras, move, torch.tensor([[20, 18]] * 2))
    points = geometry.unproject(torch.ones(2, 4, 6), intrinsics, extrinsics)
    before, _ = geometry.project(points, intrinsics, extrinsics)
    after, _ = geometry.project(points, resized.intrinsics, extrinsics)
    assert_close(
        after, before * torch.tensor([3.0, 5.0]) + torch.tensor([2.0, -1.0]), atol=1e-4, rtol=1e-5
    )


def test_the_centre_of_a_camera_projects_to_its_origin() -> None:
    intrinsics, extrinsics = (x.float() for x in random_cameras(3))
    cameras = Cameras(extrinsics, intrinsics, torch.tensor([[4, 6]] * 3))
    at = (extrinsics[..., :3] @ cameras.centers[..., None])[..., 0] + extrinsics[..., 3]
    assert_close(at, torch.zeros(3, 3), atol=1e-5, rtol=0)


def test_golden_pose_encodings_of_omega(shared: Path) -> None:
    golden = load_file(shared / "golden/vggt_omega/small.safetensors")
    extrinsics, intrinsics = geometry.decode_pose(golden["P.pose_enc"], (336, 512))
    assert_close(extrinsics, golden["P.extrinsics"], atol=1e-12, rtol=0)
    assert_close(intrinsics, golden["P.intrinsics"], atol=1e-9, rtol=0)
    encoding = geometry.encode_pose(extrinsics, intrinsics, (336, 512))
    assert_close(encoding, golden["P.pose_enc_roundtrip"], atol=1e-12, rtol=0)
    quaternion = geometry.quaternion_from_rotation(golden["P.rotations"])
    assert_close(quaternion, golden["P.quaternions"], atol=1e-12, rtol=0)
    points = geometry.unproject(
        golden["P.depth"][0], golden["P.depth_intrinsics"][0], golden["P.extrinsics"][0]
    )
    assert_close(points, golden["P.points_half_grid"], atol=1e-9, rtol=0)


def test_golden_pose_encodings_of_vggt(shared: Path) -> None:
    golden = load_file(shared / "golden/vggt/small.safetensors")
    extrinsics, intrinsics = geometry.decode_pose(golden["P.pose"], (70, 98))
    assert_close(extrinsics, golden["P.extrinsics"], atol=1e-12, rtol=0)
    assert_close(intrinsics, golden["P.intrinsics"], atol=1e-9, rtol=0)
    encoding = geometry.encode_pose(extrinsics, intrinsics, (70, 98))
    assert_close(encoding, golden["P.reencoded"], atol=1e-12, rtol=0)
    # VGGT's own code counts pixels from integers: half a pixel, moved into the principal point.
    shifted = golden["P.unproject_intrinsics"].clone()
    shifted[:, :2, 2] += 0.5
    points = geometry.unproject(golden["P.depth"], shifted, golden["P.extrinsics"][0, :2])
    assert_close(points, golden["P.world_points"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("radial", [-0.2, 0.0, 0.3])
def test_undistorting_distorted_pixels_gives_them_back(radial: float) -> None:
    intrinsics, _ = random_cameras(3, size=(40, 60))
    xy = geometry.pixel_centers((40, 60), intrinsics).expand(3, 40, 60, 2)
    k, term = intrinsics[:, None, None], torch.full((3, 1, 1), radial).to(intrinsics)
    bent = geometry.distort(xy, k, term)
    inside = bent.isfinite().all(-1)
    assert float(inside.double().mean()) > 0.5
    assert_close(geometry.undistort(bent, k, term)[inside], xy[inside], atol=1e-5, rtol=0)


def test_a_pixel_is_distorted_by_the_square_of_its_radius() -> None:
    intrinsics = torch.tensor([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]]).double()
    xy = torch.tensor([150.0, 40.0]).double()  # r = 1: a tenth outwards
    moved = geometry.distort(xy, intrinsics, torch.tensor(0.1).double())
    assert_close(moved, torch.tensor([160.0, 40.0]).double())


def test_pixels_beyond_the_turning_point_of_the_lens_are_no_numbers() -> None:
    """r - 0.5 r^3 grows no more from r = 0.82 on, and never reaches 0.6."""
    intrinsics = torch.eye(3, dtype=torch.float64)
    term = torch.tensor(-0.5).double()
    assert geometry.distort(torch.tensor([0.9, 0.0]).double(), intrinsics, term).isnan().all()
    assert geometry.undistort(torch.tensor([0.6, 0.0]).double(), intrinsics, term).isnan().all()
    assert geometry.undistort(torch.tensor([0.5, 0.0]).double(), intrinsics, term).isfinite().all()
