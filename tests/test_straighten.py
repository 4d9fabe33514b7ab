"""After one undistortion photos, maps and observations are those of pinhole cameras."""

import dataclasses

import pytest
import torch
from posed import SIZE, arc
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from wall import wall

from vggt_cli.formats import colmap
from vggt_cli.formats.images import frame_of
from vggt_cli.geometry import (
    distort,
    invert,
    keep_points,
    pixel_centers,
    project_tracks,
    reframe,
    resize,
    straight_intrinsics,
    undistort,
    unproject,
)
from vggt_cli.reconstruction.straighten import straightened
from vggt_cli.scene import Cameras, ImageSet, Prediction, Setup, Tracks

LENSES = [-0.1, 0.05]
FAR = 8.0  # depth of the wall behind the ball
Straight = tuple[ImageSet, Prediction, Tracks, Cameras]


def setup_of(cameras: Cameras, radial: float) -> Setup:
    S = len(cameras)
    return Setup(cameras, torch.full((S,), radial, dtype=torch.float64), (0,) * S)


def border(size: tuple[int, int]) -> Tensor:
    """Points all around an image, corners too, [K, 2] float64."""
    H, W = size
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    x, y = t * W, t * H
    sides = [(x, 0 * y), (x, 0 * y + H), (0 * x, y), (0 * x + W, y)]
    return torch.cat([torch.stack(side, -1) for side in sides])


# The new camera.


@pytest.mark.parametrize("radial", [-0.3, -0.1, -1e-4, 1e-4, 0.05, 0.4])
@pytest.mark.parametrize("center", [(320.0, 240.0), (250.0, 290.0)])
@pytest.mark.parametrize("focal", [(560.0, 560.0), (500.0, 530.0)])
def test_the_new_image_shows_as_much_as_it_can_without_a_pixel_from_outside_the_photo(
    radial: float, center: tuple[float, float], focal: tuple[float, float]
) -> None:
    rows = [[focal[0], 0, center[0]], [0, focal[1], center[1]], [0, 0, 1]]
    before, k = torch.tensor(rows).double(), torch.tensor(radial).double()
    after = straight_intrinsics(before[None], k[None], torch.tensor([SIZE]))[0]
    assert torch.equal(after[:2, 2], before[:2, 2])
    assert_close(after[0, 0] / after[1, 1], before[0, 0] / before[1, 1])
    end = torch.tensor([SIZE[1], SIZE[0]])

    def least_margin(intrinsics: Tensor) -> float:
        seen = distort(reframe(border(SIZE), intrinsics, before), before, k)
        return float(torch.minimum(seen, end - seen).min())

    assert -1e-6 < least_margin(after) < 1e-3  # the foot of a border lies between two points
    shorter = after * torch.tensor([[0.9999], [0.9999], [1]])
    shorter[:2, 2] = after[:2, 2]
    assert least_margin(shorter) < -1e-3  # it would show what is not in the photo


@pytest.mark.parametrize("radial", [-0.6, -2.0, -50.0])
def test_where_the_lens_ends_within_the_photo_the_new_image_ends_before_it(radial: float) -> None:
    before, k = arc(1).intrinsics, torch.tensor([radial]).double()
    after = straight_intrinsics(before, k, torch.tensor([SIZE]))
    seen = distort(reframe(border(SIZE), after, before), before, k)
    assert ((seen >= 0) & (seen <= torch.tensor([SIZE[1], SIZE[0]]))).all()  # NaN is not
    inwards = border(SIZE) * 0.998 + 0.001 * torch.tensor([SIZE[1], SIZE[0]])
    steps = seen - distort(reframe(inwards, after, before), before, k)
    stretched = (border(SIZE) - inwards).norm(dim=-1) / steps.norm(dim=-1)
    assert (stretched / (after[0, 0, 0] / before[0, 0, 0])).max() < 11


@pytest.mark.colmap
@pytest.mark.parametrize("radial", LENSES)
def test_colmap_undistorts_to_the_same_rays_and_keeps_as_much_of_one_side(radial: float) -> None:
    module = colmap.pycolmap()
    before, k = arc(1).intrinsics, torch.tensor([radial]).double()
    H, W = SIZE
    f = float(before[0, 0, 0])
    photo = module.Camera(
        model="SIMPLE_RADIAL", width=W, height=H, params=[f, W / 2, H / 2, radial]
    )
    options = module.UndistortCameraOptions()
    options.blank_pixels = 0
    theirs = module.undistort_camera(options, photo)
    after = straight_intrinsics(before, k, torch.tensor([SIZE]))[0]
    fields = [theirs.width / theirs.focal_length_x, theirs.height / theirs.focal_length_y]
    ours = [W / float(after[0, 0]), H / float(after[1, 1])]
    worst = min(theirs / mine for theirs, mine in zip(fields, ours, strict=True))
    assert worst == pytest.approx(1, abs=4 / H), "they cut each side for itself, to whole pixels"
    xy = pixel_centers(SIZE, before)[::40, ::40].flatten(0, 1)
    rays = reframe(xy, after, torch.eye(3).double())
    expected = photo.img_from_cam(torch.cat([rays, torch.ones(len(rays), 1)], -1).numpy())
    seen = distort(reframe(xy, after, before[0]), before[0], k)
    assert_close(seen, torch.from_numpy(expected), atol=1e-6, rtol=0)


# Observations.


def on_the_photo(setup: Setup, points: int) -> Tracks:
    """Exact tracks of points that are anywhere in the first photo, at depths 4 to 8."""
    g = torch.Generator().manual_seed(0)
    S, size = len(setup.cameras), setup.cameras.image_size
    xy = torch.rand(points, 2, generator=g).double() * size[0].flip(0)
    lens = setup.cameras.intrinsics[0]
    ray = reframe(undistort(xy, lens, setup.radial[0]), lens, torch.eye(3).to(lens))
    depth = 4 + 4 * torch.rand(points, 1, generator=g).double()
    xyz = torch.cat([ray * depth, depth], -1)  # the first camera is the world's origin
    frame = torch.arange(S, dtype=torch.int32).repeat(points)
    whole = Tracks(
        xyz, torch.arange(points).repeat_interleave(S), frame, torch.zeros(S * points, 2)
    )
    pinhole, z = project_tracks(whole, setup.cameras)
    seen = distort(pinhole, setup.cameras.intrinsics[frame.long()], setup.radial[frame.long()])
    rows = (z > 0) & ((seen > 0) & (seen < size.flip(-1)[frame.long()])).all(-1)
    enough = torch.bincount(whole.point[rows], minlength=points) >= 2
    shown = Tracks(xyz.float(), whole.point[rows], frame[rows], seen[rows].float())
    return keep_points(shown, enough)


@pytest.mark.parametrize("radial", LENSES)
def test_an_observation_lies_where_the_new_camera_projects_its_point(radial: float) -> None:
    images, prediction, setup = ball(radial)
    tracks = on_the_photo(setup, 2000)
    _, _, after, cameras = straightened(images, prediction, tracks, setup)
    assert 0.85 * len(tracks.xy) < len(after.xy) < len(tracks.xy)
    assert len(after.xyz) == len(after.point.unique())
    assert (torch.bincount(after.point) >= 2).all()
    xy, _ = project_tracks(after, cameras)
    assert (xy - after.xy).abs().max() < 1e-3
    assert ((after.xy > 0) & (after.xy < cameras.image_size.flip(-1)[after.frame.long()])).all()


@pytest.mark.parametrize("radial", LENSES)
def test_only_observations_that_the_new_image_does_not_show_are_left_out(radial: float) -> None:
    images, prediction, setup = ball(radial)
    tracks = on_the_photo(setup, 2000)
    _, _, after, cameras = straightened(images, prediction, tracks, setup)
    xy, _ = project_tracks(tracks, cameras)
    size = cameras.image_size.flip(-1)[tracks.frame.long()]
    shown = ((xy > 0.01) & (xy < size - 0.01)).all(-1)
    often = torch.bincount(tracks.point[shown], minlength=len(tracks.xyz))
    expected = int(often[often >= 2].sum())
    assert expected <= len(after.xy) <= expected + 4  # points on the very border


# Maps. A ball in front of a wall whose colour is a function of the place.


def surface(origin: Tensor, ray: Tensor) -> Tensor:
    """Distance in units of `ray` [..., 3] to a ball about (0, 0, 5), or to the wall behind it."""
    to_ball = origin - torch.tensor([0.0, 0.0, 5.0]).to(ray)
    a, b = ray.square().sum(-1), (ray * to_ball).sum(-1)
    under = b.square() - a * (to_ball.square().sum(-1) - 1)
    ball = (-b - under.clamp(min=0).sqrt()) / a
    return torch.where(under > 0, ball, (FAR - origin[..., 2]) / ray[..., 2])


def colour(xyz: Tensor) -> Tensor:
    """[3, ...] in [0, 1]."""
    turned = xyz @ torch.tensor([[1.0, 0.3, 0.2], [-0.2, 1.1, 0.4], [0.5, 0.2, 0.9]]).to(xyz)
    return (0.5 + 0.4 * torch.sin(2 * turned)).movedim(-1, 0)


def rendered(cameras: Cameras, frame: int, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Depth and colour at pinhole pixels `xy` [..., 2] of a frame."""
    lens = cameras.intrinsics[frame].double()
    ray = torch.cat([reframe(xy, lens, torch.eye(3).to(xy)), torch.ones_like(xy[..., :1])], -1)
    back = invert(cameras.extrinsics[frame].double())
    origin, ray = back[:, 3], ray @ back[:, :3].mT
    depth = surface(origin, ray)
    return depth, colour(origin + depth[..., None] * ray)


def ball(radial: float) -> tuple[ImageSet, Prediction, Setup]:
    """Three photos through a lens; the last portrait, so that all are padded."""
    cameras = arc(3, degrees=25)
    size = torch.tensor([SIZE, SIZE, SIZE[::-1]])
    cameras.intrinsics[2, :2, 2] = torch.tensor([SIZE[0] / 2, SIZE[1] / 2])
    setup = setup_of(Cameras(cameras.extrinsics, cameras.intrinsics, size), radial)
    H, W = 208, 224
    pixels, valid = torch.ones(3, 3, H, W), torch.zeros(3, H, W, dtype=torch.bool)
    depth, maps = torch.ones(3, H, W), torch.eye(3).double().repeat(3, 1, 1)
    for i, (h, w) in enumerate([(168, 224), (168, 224), (208, 154)]):
        scale = size[i].flip(0) / torch.tensor([w, h]).double()
        top, left = (H - h) // 2, (W - w) // 2
        maps[i, :2] = torch.cat([scale.diag(), -scale[:, None] * torch.tensor([[left], [top]])], 1)
        photo = pixel_centers((h, w), scale) * scale
        pinhole = undistort(photo, cameras.intrinsics[i], setup.radial[i])
        z, rgb = rendered(setup.cameras, i, pinhole)
        inner = slice(top, top + h), slice(left, left + w)
        depth[i, inner[0], inner[1]], pixels[i, :, inner[0], inner[1]] = z.float(), rgb.float()
        valid[i, inner[0], inner[1]] = True
    images = ImageSet(("a", "b", "c"), pixels, valid, maps, size)
    network = resize(setup.cameras, torch.linalg.inv(maps), torch.tensor([[H, W]] * 3))
    return images, Prediction(network, depth, 1 + depth), setup


@pytest.mark.parametrize("radial", LENSES)
def test_depth_and_colour_are_those_that_the_new_camera_sees(radial: float) -> None:
    images, prediction, setup = ball(radial)
    found, maps, _, cameras = straightened(images, prediction, on_the_photo(setup, 5), setup)
    assert torch.equal(found.source_from_network, images.source_from_network)
    assert torch.equal(found.valid, images.valid), "padding stays, and nothing becomes blank"
    xyz = unproject(maps.depth, maps.cameras.intrinsics.float(), maps.cameras.extrinsics.float())
    for i in range(3):
        inner = frame_of(images, i)
        to_source = images.source_from_network[i]
        centers = pixel_centers(found.size, to_source) @ to_source[:2, :2] + to_source[:2, 2]
        z, rgb = (x[..., inner[0], inner[1]] for x in rendered(cameras, i, centers))
        off = (maps.depth[i][inner] - z).abs() / z
        near = -F.max_pool2d(-z[None], 5, 1, 2)[0]  # a silhouette is a pixel wide
        smooth = F.max_pool2d(z[None], 5, 1, 2)[0] < 1.03 * near
        assert smooth.float().mean() > 0.75
        assert off[smooth].max() < 1e-3
        error = (found.pixels[i, :, inner[0], inner[1]] - rgb).abs()
        assert error[:, smooth].max() < 0.02
        assert_close(colour(xyz[i])[:, inner[0], inner[1]][:, smooth], rgb[:, smooth].float(),
                     atol=0.02, rtol=0)  # fmt: skip
        assert torch.equal(maps.depth[i][~images.valid[i]], prediction.depth[i][~images.valid[i]])
        assert (found.pixels[i, :, ~images.valid[i]] == 1).all()
    before = (images.pixels - found.pixels).abs()[:, :, images.valid[0] & images.valid[2]]
    assert before.max() > 0.1, "the lens made a difference"


@pytest.mark.parametrize("radial", LENSES)
def test_no_depth_appears_between_near_and_far(radial: float) -> None:
    images, prediction, setup = ball(radial)
    plain = dataclasses.replace(prediction, depth=torch.where(prediction.depth < 6.3, 2.0, 8.0))
    _, maps, _, _ = straightened(images, plain, on_the_photo(setup, 5), setup)
    assert set(maps.depth.unique().tolist()) <= {2.0, 8.0}
    assert 0.02 < (maps.depth == 2).float().mean() < 0.9
    assert set(maps.confidence.unique().tolist()) <= set(prediction.confidence.unique().tolist())


@pytest.mark.parametrize("radial", LENSES)
def test_a_mask_moves_with_what_it_hides_and_what_is_masked_spoils_no_depth(radial: float) -> None:
    images, prediction, setup = ball(radial)
    seen = images.valid & (images.pixels[:, 0] < 0.5)
    spoiled = torch.where(seen, 1.0, 1.02)  # would pass for one surface
    masked, plain = (
        dataclasses.replace(images, valid=seen),
        dataclasses.replace(prediction, depth=spoiled),
    )
    found, maps, _, _ = straightened(masked, plain, on_the_photo(setup, 5), setup)
    assert (maps.depth[found.valid] == 1).all()
    agree = found.valid == (images.valid & (found.pixels[:, 0] < 0.5))
    assert agree.float().mean() > 0.98
    assert not found.valid[~images.valid].any()


def test_lenses_without_a_term_change_nothing() -> None:
    images, prediction, setup = ball(0.0)
    tracks = on_the_photo(setup, 50)
    found = straightened(images, prediction, tracks, setup)
    assert found[0] is images
    assert found[1] is prediction
    assert found[2] is tracks
    assert found[3] is setup.cameras


def test_frames_without_a_term_stay_bit_for_bit_beside_one_that_has_it() -> None:
    prediction, images = wall()
    cameras = resize(prediction.cameras, images.source_from_network, images.source_size)
    radial = torch.tensor([0, -0.1, 0, 0]).double()
    setup = Setup(cameras, radial, (0, 1, 0, 0))
    xyz = unproject(prediction.depth, prediction.cameras.intrinsics, prediction.cameras.extrinsics)
    point = torch.arange(40).repeat_interleave(3)
    tracks = Tracks(xyz[0].flatten(0, 1)[:40], point, torch.tensor([0, 2, 3]).repeat(40).int(),
                    torch.rand(120, 2))  # fmt: skip
    found, maps, after, moved = straightened(images, prediction, tracks, setup)
    for new, old in [
        (found.pixels, images.pixels), (maps.depth, prediction.depth),
        (maps.confidence, prediction.confidence), (found.valid, images.valid),
        (maps.cameras.intrinsics, prediction.cameras.intrinsics),
        (moved.intrinsics, cameras.intrinsics),
    ]:  # fmt: skip
        assert torch.equal(new[[0, 2, 3]], old[[0, 2, 3]])
    assert torch.equal(after.xy, tracks.xy)
    assert not torch.equal(found.pixels[1], images.pixels[1])
    assert moved.intrinsics[1, 0, 0] < cameras.intrinsics[1, 0, 0]
