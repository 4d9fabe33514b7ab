"""Poses, pixels and rays: the one place for geometry.

Extrinsics are world-to-camera [R | t] with OpenCV axes; pixel centres lie at +0.5; sizes are
(height, width). Tensors have any leading axes `...` unless said.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.errors import GeometryError
from vggt_cli.scene import Cameras, Prediction, Similarity, Tracks

STRAIGHT = 1e-6  # spread across a line, of that along it, below which points lie on it
LENS_END = 0.95  # of the field where `distort` ends: nearer to it pixels are stretched over tenfold


def rotation_from_quaternion(quaternion_xyzw: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4] of any length but zero.

    Source: spec vggt section 6, vggt_omega section 8 (factor 2 / |q|^2).
    """
    x, y, z, w = quaternion_xyzw.unbind(-1)
    s = 2 / quaternion_xyzw.square().sum(-1)
    rows = [
        [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
        [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
        [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def quaternion_from_rotation(rotation: Tensor) -> Tensor:
    """Quaternions xyzw [..., 4] with w >= 0 of rotation matrices [..., 3, 3].

    The best conditioned of four candidates, so that no half turn divides by zero.
    Source: spec vggt_omega section 8.
    """
    m = rotation
    diagonal = torch.diagonal(m, dim1=-2, dim2=-1)
    x, y, z = diagonal.unbind(-1)
    squares = torch.stack([1 + x - y - z, 1 - x + y - z, 1 - x - y + z, 1 + x + y + z], -1)
    roots = squares.clamp(min=0).sqrt()
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    d, e, f = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    rx, ry, rz, rw = roots.square().unbind(-1)
    candidates = (
        torch.stack(
            [
                torch.stack([rx, d, e, a], -1),
                torch.stack([d, ry, f, b], -1),
                torch.stack([e, f, rz, c], -1),
                torch.stack([a, b, c, rw], -1),
            ],
            -2,
        )
        / (2 * roots.clamp(min=0.1))[..., None]
    )
    best = roots.argmax(-1)[..., None, None].expand(*roots.shape[:-1], 1, 4)
    quaternion = candidates.gather(-2, best)[..., 0, :]
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def decode_pose(encoding: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Extrinsics [..., 3, 4] and intrinsics [..., 3, 3] of pose encodings [..., 9].

    encoding: translation, quaternion xyzw, vertical and horizontal field of view in radians.
    size: of the network's input; the principal point is its centre.
    Source: spec vggt section 6, vggt_omega section 8.
    """
    H, W = size
    translation, quaternion, fov = encoding[..., :3], encoding[..., 3:7], encoding[..., 7:]
    extrinsics = torch.cat([rotation_from_quaternion(quaternion), translation[..., None]], -1)
    half = torch.tensor([W / 2, H / 2]).to(encoding)
    focal = half / torch.tan(fov.flip(-1) / 2)  # (f_x, f_y)
    top = torch.cat([torch.diag_embed(focal), half[:, None].expand(*focal.shape, 1)], -1)
    bottom = torch.tensor([0.0, 0.0, 1.0]).to(encoding).expand(*top.shape[:-2], 1, 3)
    return extrinsics, torch.cat([top, bottom], -2)


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """Pose encodings [..., 9] of extrinsics [..., 3, 4] and intrinsics [..., 3, 3].

    The principal point is not encoded. Source: spec vggt_omega section 8.
    """
    half = torch.tensor([size[1] / 2, size[0] / 2]).to(intrinsics)
    focal = torch.diagonal(intrinsics, dim1=-2, dim2=-1)[..., :2]
    fov = 2 * torch.atan(half / focal)
    quaternion = quaternion_from_rotation(extrinsics[..., :3])
    return torch.cat([extrinsics[..., 3], quaternion, fov.flip(-1)], -1)


def pixel_centers(size: tuple[int, int], like: Tensor) -> Tensor:
    """[H, W, 2] coordinates (x, y) of every pixel's centre, dtype and device of `like`."""
    rows, columns = (torch.arange(n).to(like) + 0.5 for n in size)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)


def unproject(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> Tensor:
    """World points [..., H, W, 3] of the z-depth maps `depth` [..., H, W]."""
    # Plane by plane, x y and z each in one piece: several times as fast as pixel by pixel.
    columns, rows = (torch.arange(n).to(depth) + 0.5 for n in (depth.shape[-1], depth.shape[-2]))
    x = (columns - intrinsics[..., 0, 2, None]) / intrinsics[..., 0, 0, None]  # [..., W], z = 1
    y = (rows - intrinsics[..., 1, 2, None]) / intrinsics[..., 1, 1, None]
    camera = torch.stack([x[..., None, :] * depth, y[..., None] * depth, depth], -3).flatten(-2)
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3:]
    world = rotation.mT @ (camera - translation)  # [..., 3, H W]
    points: Tensor = world.mT.unflatten(-2, depth.shape[-2:]).contiguous()
    return points


def surface_normals(points: Tensor, center: Tensor) -> Tensor:
    """[H, W, 3] unit normals of a point map [H, W, 3], towards the camera at `center` [3]."""
    points = points.permute(2, 0, 1).contiguous()  # planes: several times as fast
    (a, b, c), (d, e, f) = (
        torch.gradient(points, dim=axis)[0] if points.shape[axis] > 1 else torch.ones_like(points)
        for axis in (2, 1)  # across, down
    )
    normals = torch.stack([b * f - c * e, c * d - a * f, a * e - b * d])
    to_camera = center[:, None, None] - points
    normals = torch.where((normals * to_camera).sum(0) < 0, -normals, normals)
    flat = ~(normals.square().sum(0) >= 1e-40)  # beside unknown depth: no number
    normals = torch.where(flat, to_camera, normals)
    length = normals.square().sum(0).sqrt_().clamp_(min=1e-30)
    return (normals / length).permute(1, 2, 0).contiguous()


def project(points: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [..., H, W, 2] and z-depth [..., H, W] of world points [..., H, W, 3].

    Points at or behind the camera have z <= 0 and pixels without meaning.
    """
    size = points.shape[-3:-1]
    camera = extrinsics[..., :3] @ points.flatten(-3, -2).mT + extrinsics[..., 3:]  # [..., 3, H W]
    x, y, z = camera.unbind(-2)
    safe = torch.where(z == 0, torch.finfo(z.dtype).tiny, z)
    k = intrinsics[..., None]
    pixels = [
        x / safe * k[..., 0, 0, :] + k[..., 0, 2, :],
        y / safe * k[..., 1, 1, :] + k[..., 1, 2, :],
    ]
    return torch.stack(pixels, -1).unflatten(-2, size), z.unflatten(-1, size)


def project_tracks(tracks: Tracks, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Pixels [K, 2] and z-depth [K] of each observation's point in its frame, float64."""
    frame = tracks.frame.long()
    extrinsics, intrinsics = cameras.extrinsics.double()[frame], cameras.intrinsics.double()[frame]
    points = tracks.xyz.double()[tracks.point, None, None]  # [K, 1, 1, 3]
    xy, z = project(points, intrinsics, extrinsics)
    return xy[:, 0, 0], z[:, 0, 0]


def keep_points(tracks: Tracks, kept: Tensor) -> Tracks:
    """The tracks of the points `kept` [N] bool, renumbered."""
    number = kept.cumsum(0) - 1
    rows = kept[tracks.point]
    return Tracks(tracks.xyz[kept], number[tracks.point[rows]], tracks.frame[rows], tracks.xy[rows])


def distort(xy: Tensor, intrinsics: Tensor, radial: Tensor) -> Tensor:
    """Pixels [..., 2] of the photo of pinhole pixels `xy` [..., 2]; NaN where the lens ends.

    radial: [...] the coefficient k of COLMAP's SIMPLE_RADIAL, x (1 + k r^2) with x and r in
    units of the focal length. It cannot hold where pixels no longer move outwards with the ray.
    """
    focal, center = torch.diagonal(intrinsics, dim1=-2, dim2=-1)[..., :2], intrinsics[..., :2, 2]
    x = (xy - center) / focal
    bent = radial * x.square().sum(-1)
    x = torch.where((1 + 3 * bent > 0)[..., None], x * (1 + bent[..., None]), torch.nan)
    return x * focal + center


def undistort(xy: Tensor, intrinsics: Tensor, radial: Tensor) -> Tensor:
    """Pinhole pixels [..., 2] of pixels `xy` [..., 2] of the photo; the inverse of `distort`."""
    focal, center = torch.diagonal(intrinsics, dim1=-2, dim2=-1)[..., :2], intrinsics[..., :2, 2]
    x = (xy - center) / focal
    seen = x.norm(dim=-1)
    r = seen.clone()
    for _ in range(20):  # Newton's steps from here stay on one side of the root
        r = r - (r * (1 + radial * r * r) - seen) / (1 + 3 * radial * r * r).clamp(min=1e-9)
    found = (r * (1 + radial * r * r) - seen).abs() <= 1e-9 * (1 + seen)
    x = torch.where(found[..., None], x / (1 + radial * r * r)[..., None], torch.nan)
    return x * focal + center


def straight_intrinsics(intrinsics: Tensor, radial: Tensor, image_size: Tensor) -> Tensor:
    """Intrinsics [S, 3, 3] of photos through a straight lens, of the same size and dtype.

    The principal point stays, and the focal length shows as much as it can without a pixel from
    outside the photo: where the lens draws in (radial < 0) the nearest border stays where it is,
    where it spreads (radial > 0) the farthest corner. A lens of radial 0 stays as it is.
    intrinsics: [S, 3, 3] of the photos, their lens without `radial` [S] (see `distort`).
    Source: COLMAP's UndistortCamera with blank_pixels 0, but for the size.
    """
    k, K = radial.double(), intrinsics.double()
    focal, center = torch.diagonal(K, dim1=-2, dim2=-1)[:, :2], K[:, :2, 2]
    sides = torch.stack([center, image_size.flip(-1) - center], -1) / focal[..., None]  # [S, 2, 2]
    corner = sides.amax(-1).norm(dim=-1)
    border = sides.flatten(1).amin(-1).clamp(min=1e-9)  # a principal point outside: as it is
    stays = torch.where(k > 0, corner, border)
    ray = undistort(torch.stack([stays, 0 * stays], -1), torch.eye(3).to(K), k)[:, 0]
    ends = corner * (-3 * k).clamp(min=0).sqrt() / LENS_END
    zoom = torch.fmax(stays / ray, ends)  # fmax: no ray reaches a border beyond the lens's end
    straight = K.clone()
    straight[:, 0, 0], straight[:, 1, 1] = (focal * zoom[:, None]).unbind(-1)
    return torch.where((radial == 0)[:, None, None], intrinsics, straight.to(intrinsics))


def reframe(xy: Tensor, intrinsics: Tensor, target: Tensor) -> Tensor:
    """Pixels [..., 2] of the same rays for a pinhole camera of the intrinsics `target`."""
    focal, center = torch.diagonal(intrinsics, dim1=-2, dim2=-1)[..., :2], intrinsics[..., :2, 2]
    wanted = torch.diagonal(target, dim1=-2, dim2=-1)[..., :2]
    return (xy - center) / focal * wanted + target[..., :2, 2]


def sample(image: Tensor, xy: Tensor) -> Tensor:
    """Values [C, h, w] of `image` [C, H, W] at `xy` [h, w, 2], bicubic; its border goes on."""
    size = torch.tensor([image.shape[-1], image.shape[-2]]).to(xy)
    grid = (xy / size * 2 - 1).to(image)
    return F.grid_sample(image[None], grid[None], "bicubic", "border", align_corners=False)[0]


def share_intrinsics(cameras: Cameras, group: list[int]) -> Cameras:
    """The cameras with the median intrinsics of their group; frame i belongs to group[i]."""
    shared = cameras.intrinsics.clone()
    number = torch.tensor(group)
    for n in set(group):
        of_group = number == n
        shared[of_group] = cameras.intrinsics[of_group].quantile(0.5, dim=0)
    return Cameras(cameras.extrinsics, shared, cameras.image_size)


def invert(extrinsics: Tensor) -> Tensor:
    """World-from-camera [..., 3, 4] of world-to-camera [..., 3, 4] and the reverse."""
    rotation = extrinsics[..., :3].mT
    return torch.cat([rotation, -rotation @ extrinsics[..., 3:]], -1)


def compose(a_from_b: Tensor, b_from_c: Tensor) -> Tensor:
    """a_from_c [..., 3, 4] of two rigid maps [..., 3, 4]."""
    rotation = a_from_b[..., :3] @ b_from_c[..., :3]
    return torch.cat([rotation, a_from_b[..., :3] @ b_from_c[..., 3:] + a_from_b[..., 3:]], -1)


def from_first_camera(prediction: Prediction) -> Prediction:
    """The same prediction in a world whose origin is camera 0: its extrinsics are [I | 0].

    The networks only tend to that; depth does not change under a rigid motion.
    """
    cameras = prediction.cameras
    double = cameras.extrinsics.double()
    moved = compose(double, invert(double[:1]).expand_as(double))
    moved[0] = torch.eye(3, 4, dtype=torch.float64)
    return Prediction(
        Cameras(moved.to(cameras.extrinsics), cameras.intrinsics, cameras.image_size),
        prediction.depth,
        prediction.confidence,
        prediction.tokens,
        prediction.text,
    )


def resize(cameras: Cameras, target_from_pixel: Tensor, size: Tensor) -> Cameras:
    """The cameras in other pixels of the same images.

    target_from_pixel: [S, 3, 3] scale and shift, from the cameras' pixels to the new ones.
    size: [S, 2] (height, width) of the new images.
    """
    intrinsics = (target_from_pixel @ cameras.intrinsics.double()).to(cameras.intrinsics)
    return Cameras(cameras.extrinsics, intrinsics, size)


def fit_similarity(source: Tensor, target: Tensor, weight: Tensor) -> Similarity:
    """The similarity that maps `source` onto `target` with least weighted squared error.

    source, target: [N, 3] corresponding points, each in its own scene units.
    weight: [N], >= 0. The result is float64, on the CPU: MPS has no float64.
    Raises GeometryError if fewer than three points have weight, or they lie on a line, so that
    the rotation about it is anyone's guess.
    Source: Umeyama 1991, equations 40 to 42.
    """
    assert source.shape == target.shape == (*weight.shape, 3), (source.shape, weight.shape)
    x, y, w = (values.detach().cpu().double() for values in (source, target, weight))
    if (w > 0).sum() < 3:
        raise GeometryError(f"{int((w > 0).sum())} points for a similarity, which needs three")
    w = w / w.sum()
    mean_x, mean_y = w @ x, w @ y
    x, y = x - mean_x, y - mean_y
    for points in (x, y):
        spread = torch.linalg.svdvals(w.sqrt()[:, None] * points)
        if spread[1] <= STRAIGHT * spread[0]:
            raise GeometryError("points on a line do not fix a similarity")
    u, d, vt = torch.linalg.svd(y.mT @ (w[:, None] * x))
    sign = torch.ones(3, dtype=torch.float64)
    sign[2] = torch.sign(torch.det(u) * torch.det(vt))  # a mirror image would fit better
    rotation = (u * sign) @ vt
    scale = float((d * sign).sum() / (w @ x.square().sum(-1)))
    return Similarity(scale, rotation, mean_y - scale * rotation @ mean_x)


def align_cameras(source: Cameras, target: Cameras) -> Similarity:
    """The similarity of `fit_similarity` between optical centres; where they lie on a line, or
    are two, its rotation is the mean of what the cameras' axes say.

    Raises GeometryError if all centres of either coincide: nothing fixes the scale.
    """
    x, y = source.centers.double(), target.centers.double()
    try:
        return fit_similarity(x, y, torch.ones(len(x)))
    except GeometryError:
        turns = target.extrinsics[..., :3].mT.double() @ source.extrinsics[..., :3].double()
        u, _, vt = torch.linalg.svd(turns.sum(0))
        rotation = u @ torch.diag(torch.tensor([1, 1, torch.det(u @ vt)], dtype=u.dtype)) @ vt
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = (x - mean_x) @ rotation.mT, y - mean_y
    if min(x.norm(), y.norm()) == 0 or (scale := float((x * y).sum() / x.square().sum())) <= 0:
        raise GeometryError("cameras at one place, or in opposite order, fix no scale") from None
    return Similarity(scale, rotation, mean_y - scale * rotation @ mean_x)


def move(cameras: Cameras, similarity: Similarity) -> Cameras:
    """The cameras in the world that `similarity` leads to; what they see stays the same."""
    double = cameras.extrinsics.double()
    rotation = double[..., :3] @ similarity.rotation.mT.double()
    translation = similarity.scale * double[..., 3] - rotation @ similarity.translation.double()
    moved = torch.cat([rotation, translation[..., None]], -1)
    return Cameras(moved.to(cameras.extrinsics), cameras.intrinsics, cameras.image_size)


def move_prediction(prediction: Prediction, similarity: Similarity) -> Prediction:
    """The prediction in the world that `similarity` leads to: depth takes its scale."""
    cameras = move(prediction.cameras, similarity)
    return replace(prediction, cameras=cameras, depth=prediction.depth * similarity.scale)
