"""Scenes on disk, in both layouts, give back the scene that was rendered."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch import Tensor

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap, export
from vggt_cli.formats.colmap_read import locate
from vggt_cli.geometry import project, resize, unproject
from vggt_cli.learning import synthetic
from vggt_cli.learning.datasets import PhotoScene, open_scene
from vggt_cli.learning.synthetic import Sample
from vggt_cli.scene import (
    Cameras,
    ImageSet,
    Photo,
    PointCloud,
    Prediction,
    Provenance,
    Scene,
    Tracks,
)

S, SIZE = 4, (72, 96)


@pytest.fixture(scope="module")
def rendered() -> Sample:
    """A scene in 8 bits, with the sky's depth unknown."""
    found = synthetic.sample(3, synthetic.Path(S, SIZE, spread=0.3))
    return Sample((found.pixels * 255).round() / 255, found.cameras, found.depth, found.valid)


def names(scene: Sample) -> tuple[str, ...]:
    return tuple(f"{i}.png" for i in range(len(scene.pixels)))


def write_photos(scene: Sample, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, pixels in zip(names(scene), scene.pixels, strict=True):
        values = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(values).save(folder / name)


def tracks(scene: Sample, step: int = 6) -> Tracks:
    """Every step-th pixel of every frame as a point, with the frames whose depth agrees."""
    world = unproject(scene.depth, scene.cameras.intrinsics, scene.cameras.extrinsics)
    points = world[:, ::step, ::step][scene.valid[:, ::step, ::step]]  # [N, 3]
    to_all = points.expand(len(scene.depth), 1, -1, 3)
    xy, z = (x[:, 0] for x in project(to_all, scene.cameras.intrinsics, scene.cameras.extrinsics))
    H, W = scene.depth.shape[-2:]
    inside = (z > 0) & (xy >= 0).all(-1) & (xy < torch.tensor([W, H])).all(-1)
    column, row = xy.long().unbind(-1)
    rows, columns = row.clamp(0, H - 1), column.clamp(0, W - 1)
    there = scene.depth[torch.arange(len(z))[:, None], rows, columns]
    point, frame = (inside & ((there / z - 1).abs() < 0.02)).T.nonzero().unbind(-1)
    return Tracks(points, point, frame.int(), xy[frame, point])


def write_dense_workspace(scene: Sample, folder: Path) -> None:
    """What COLMAP's patch_match_stereo works in."""
    write_photos(scene, folder / "images")
    seen = tracks(scene)
    rgb = np.zeros((len(seen.xyz), 3), np.uint8)
    model = colmap.Model(names(scene), scene.cameras, (0,) * len(scene.pixels), seen, rgb)
    colmap.write(model, folder / "sparse")
    maps = folder / "stereo" / "depth_maps"
    maps.mkdir(parents=True)
    for name, depth in zip(names(scene), torch.where(scene.valid, scene.depth, 0), strict=True):
        h, w = depth.shape
        content = f"{w}&{h}&1&".encode() + struct.pack(f"<{w * h}f", *depth.flatten().tolist())
        (maps / f"{name}.geometric.bin").write_bytes(content)


def write_scene(scene: Sample, folder: Path, confidence: Tensor) -> None:
    """What `vggt reconstruct` writes."""
    photos = folder.with_name("photos")
    write_photos(scene, photos)
    seen = tracks(scene)
    n = len(seen.xyz)
    cloud = PointCloud(
        seen.xyz, torch.zeros(n, 3), torch.zeros(n, 3, dtype=torch.uint8), torch.ones(n)
    )
    images = ImageSet(
        names(scene),
        scene.pixels,
        torch.ones_like(scene.valid),
        torch.eye(3, dtype=torch.float64).repeat(S, 1, 1),
        scene.cameras.image_size,
    )
    made = Scene(
        tuple(Photo(photos / name, name, SIZE) for name in names(scene)),
        images,
        Prediction(scene.cameras, scene.depth, confidence),
        (0,) * S,
        seen,
        cloud.rgb,
        cloud,
        Provenance("test", "0" * 64, "none", True, "cpu", "float32", {}),
    )
    export.write(made, folder)


def assert_same(found: Sample, true: Sample, tolerance: float) -> None:
    assert_allclose(found.pixels, true.pixels, atol=1e-6)
    assert_allclose(found.cameras.intrinsics, true.cameras.intrinsics, rtol=1e-6)
    assert_allclose(found.cameras.extrinsics, true.cameras.extrinsics, atol=1e-6)
    assert (found.valid == true.valid).all()
    assert_allclose(found.depth, true.depth, rtol=tolerance)


@pytest.fixture(scope="module")
def dense(rendered: Sample, tmp_path_factory: pytest.TempPathFactory) -> PhotoScene:
    folder = tmp_path_factory.mktemp("dense") / "0"
    write_dense_workspace(rendered, folder)
    return open_scene(folder)


def test_colmaps_dense_workspace_gives_back_the_rendered_scene(
    rendered: Sample, dense: PhotoScene
) -> None:
    assert dense.names == names(rendered)
    assert len(dense) == S
    assert_same(dense.sample(range(S), SIZE), rendered, 1e-6)
    second = dense.sample([2, 0], SIZE)
    assert_allclose(second.pixels, rendered.pixels[[2, 0]], atol=1e-6)


def test_a_scene_of_this_tool_gives_back_all_but_the_least_sure_depth(
    rendered: Sample, tmp_path: Path
) -> None:
    confidence = torch.full_like(rendered.depth, 4.0)
    confidence[:, :, :10] = 1.5  # a tenth of the columns, of which a fifth would be left out
    confidence[1] = 1.0 + torch.arange(SIZE[0])[:, None]
    write_scene(rendered, tmp_path / "scene", confidence)
    found = open_scene(tmp_path / "scene").sample(range(S), SIZE)
    sure = confidence >= 4
    sure[1] = confidence[1] >= 1.0 + int(0.2 * SIZE[0])
    whole = Sample(rendered.pixels, rendered.cameras, rendered.depth, sure)
    wanted = torch.where(sure, rendered.depth.clamp(max=65504), 1)
    assert_same(found, Sample(whole.pixels, whole.cameras, wanted, sure), 1e-3)


def points(scene: Sample) -> Tensor:
    k, extrinsics = scene.cameras.intrinsics.double(), scene.cameras.extrinsics.double()
    return unproject(scene.depth.double(), k, extrinsics)


def test_at_a_third_of_the_size_the_points_are_every_third_of_the_photos(
    rendered: Sample, dense: PhotoScene
) -> None:
    small = dense.sample(range(S), (SIZE[0] // 3, SIZE[1] // 3))
    assert (small.valid == rendered.valid[:, 1::3, 1::3]).all()
    there = small.valid
    assert_allclose(points(small)[there], points(rendered)[:, 1::3, 1::3][there], atol=1e-5)


@pytest.mark.parametrize("size", [(40, 40), (50, 30), (24, 100)])
def test_at_any_size_and_zoom_each_point_lies_in_the_pixel_whose_depth_it_has(
    rendered: Sample, tmp_path: Path, size: tuple[int, int]
) -> None:
    # A principal point off the middle: rays stay, pixels are cut from the left and the bottom.
    cut = Sample(
        rendered.pixels[:, :, :60, 16:],
        resize(
            rendered.cameras,
            torch.tensor([[1.0, 0, -16], [0, 1, 0], [0, 0, 1]], dtype=torch.float64),
            torch.tensor([[60, 80]]).repeat(S, 1),
        ),
        rendered.depth[:, :60, 16:],
        rendered.valid[:, :60, 16:],
    )
    write_dense_workspace(cut, tmp_path / "cut")
    scene = open_scene(tmp_path / "cut")
    fields = []
    for seed in (None, 0, 1):
        random = None if seed is None else torch.Generator().manual_seed(seed)
        found = scene.sample(range(S), size, random)
        H, W = size
        assert found.pixels.shape == (S, 3, H, W)
        middle = torch.tensor([W / 2, H / 2]).expand(S, 2)
        assert_allclose(found.cameras.intrinsics[:, :2, 2], middle, atol=1e-4)
        k, extrinsics = cut.cameras.intrinsics.double(), cut.cameras.extrinsics.double()
        xy, z = project(points(found), k, extrinsics)
        assert ((xy > -1e-4) & (xy < torch.tensor([80, 60]) + 1e-4))[found.valid].all()
        frame = torch.arange(S)[:, None, None]
        near = [  # on the edge of two pixels either may be meant
            cut.depth[frame, y, x]
            for dx in (-1e-3, 1e-3)
            for dy in (-1e-3, 1e-3)
            for x, y in [(xy + torch.tensor([dx, dy])).floor().long().clamp(min=0).unbind(-1)]
            for x, y in [(x.clamp(max=79), y.clamp(max=59))]
        ]
        off = torch.stack([(z / depth - 1).abs() for depth in near]).amin(0)
        assert off[found.valid].max() < 1e-5
        assert found.valid.double().mean() > 0.3
        fields.append(float(found.cameras.intrinsics[0, 0, 0]))
    assert fields[0] < min(fields[1:])  # zooming makes focal lengths longer
    assert max(fields) <= fields[0] * 1.25


def test_colours_move_with_the_points(rendered: Sample, dense: PhotoScene) -> None:
    """A photo cut and made smaller shows what the renderer sees through the new camera."""
    small = dense.sample(range(S), (36, 36))
    random = torch.Generator().manual_seed(3)
    world = synthetic.world(random)
    again = synthetic.render(world, small.cameras)
    assert (small.pixels - again.pixels).abs().mean() < 0.04
    shifted = (small.pixels[..., 1:] - again.pixels[..., :-1]).abs().mean()
    assert (small.pixels - again.pixels).abs().mean() < 0.8 * shifted


def test_depth_of_another_size_than_the_photo(rendered: Sample, tmp_path: Path) -> None:
    write_dense_workspace(rendered, tmp_path / "0")
    (tmp_path / "0/depth").mkdir()
    for name, depth in zip(names(rendered), rendered.depth, strict=True):
        np.save(tmp_path / f"0/depth/{name}.npy", depth[1::3, 1::3].numpy())
    found = open_scene(tmp_path / "0").sample(range(S), (SIZE[0] // 3, SIZE[1] // 3))
    assert_allclose(found.depth, rendered.depth[:, 1::3, 1::3])


def test_frames_that_are_drawn_share_points(rendered: Sample, tmp_path: Path) -> None:
    """Two groups that see nothing of each other; one frame has no depth."""
    twice = Sample(
        torch.cat([rendered.pixels] * 2),
        Cameras(
            torch.cat([rendered.cameras.extrinsics] * 2),
            torch.cat([rendered.cameras.intrinsics] * 2),
            torch.cat([rendered.cameras.image_size] * 2),
        ),
        torch.cat([rendered.depth] * 2),
        torch.cat([rendered.valid] * 2),
    )
    far = torch.tensor([1000.0, 0, 0])
    twice.cameras.extrinsics[S:, :, 3] -= rendered.cameras.extrinsics[:, :, :3] @ far
    write_dense_workspace(twice, tmp_path / "0")
    (tmp_path / "0/stereo/depth_maps/6.png.geometric.bin").unlink()
    scene = open_scene(tmp_path / "0")
    random = torch.Generator().manual_seed(0)
    drawn = [scene.draw(random, 3) for _ in range(40)]
    assert all(len(set(frames)) == 3 for frames in drawn)
    assert {len({frame // S for frame in frames}) for frames in drawn} == {1}
    assert {frame for frames in drawn for frame in frames} == {0, 1, 2, 3, 4, 5, 7}
    assert {frames[0] // S for frames in (scene.draw(random, 4) for _ in range(10))} == {0}
    with pytest.raises(InputError, match="no 5 frames with depth that overlap"):
        scene.draw(random, 5)
    assert not scene.sample([6], SIZE).valid.any()


def test_a_reference_is_the_truth_beside_another_model_which_else_goes_first(
    rendered: Sample, tmp_path: Path
) -> None:
    write_dense_workspace(rendered, tmp_path)
    (tmp_path / "reference").mkdir()
    (tmp_path / "sparse/0").mkdir()
    assert locate(tmp_path) == tmp_path / "sparse"  # an empty folder is no model
    for part in ("cameras.bin", "images.bin", "points3D.bin"):
        (tmp_path / "sparse" / part).rename(tmp_path / "reference" / part)
        (tmp_path / "sparse/0" / part).write_bytes(b"another")
    assert locate(tmp_path) == tmp_path / "sparse/0"
    assert len(open_scene(tmp_path)) == S


def test_what_is_wrong_is_named(rendered: Sample, tmp_path: Path) -> None:
    folder = tmp_path / "0"
    with pytest.raises(InputError, match="no COLMAP model"):
        open_scene(folder)
    write_dense_workspace(rendered, folder)
    (folder / "stereo/depth_maps/1.png.geometric.bin").write_bytes(b"5&5&1&")
    scene = open_scene(folder)
    with pytest.raises(InputError, match=r"1\.png\.geometric\.bin"):
        scene.sample([0, 1], SIZE)
    (folder / "images/2.png").write_bytes(b"no photo")
    with pytest.raises(InputError, match=r"cannot be read.*2\.png"):
        scene.sample([2], SIZE)
    Image.new("RGB", (30, 30)).save(folder / "images/3.png")
    with pytest.raises(InputError, match=r"the photo is 30 x 30, its camera 96 x 72.*3\.png"):
        scene.sample([3], SIZE)
    (folder / "images/3.png").unlink()
    with pytest.raises(InputError, match=r"no such photo.*3\.png"):
        open_scene(folder)


def test_a_photo_with_distortion_is_refused_with_the_remedy(
    rendered: Sample, tmp_path: Path
) -> None:
    folder = tmp_path / "0"
    write_dense_workspace(rendered, folder)
    colmap.write_text(open_scene(folder).model, folder / "sparse")
    cameras = (folder / "sparse/cameras.txt").read_text()
    (folder / "sparse/cameras.bin").unlink()
    distorted = cameras.replace("PINHOLE", "OPENCV").rstrip() + " 0.1 0 0 0\n"
    (folder / "sparse/cameras.txt").write_text(distorted)
    with pytest.raises(InputError, match=r"distortion \(OPENCV\).*1\.png") as raised:
        open_scene(folder).sample([1], SIZE)
    assert "image_undistorter" in raised.value.hint


def test_a_real_photo_with_measured_depth(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "motorcycle_stereo"
    for part in ("images", "reference"):
        (tmp_path / part).symlink_to(source / part)
    with Image.open(source / "reference" / "left_depth_0.1mm.png") as image:
        metres = np.asarray(image).astype(np.float32) / 10_000
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth" / "left.png.npy", metres)
    scene = open_scene(tmp_path)
    found = scene.sample([0, 1], (120, 160))
    assert not found.valid[1].any()
    depth = found.depth[0][found.valid[0]]
    assert 2.1 < depth.min() < depth.max() < 5.1
    assert found.valid[0].double().mean() > 0.85
    # Left pixels land in the right photo on the same colours: the cameras, the cut and the depth.
    k, extrinsics = found.cameras.intrinsics, found.cameras.extrinsics
    world = unproject(found.depth[:1], k[:1], extrinsics[:1])
    xy, _ = project(world, k[1:], extrinsics[1:])
    grid = 2 * xy / torch.tensor([160, 120]) - 1
    seen = torch.nn.functional.grid_sample(found.pixels[1:], grid, align_corners=False)
    inside = found.valid[0] & (grid[0].abs() < 1).all(-1)
    off = (seen[0] - found.pixels[0]).abs().mean(0)[inside]
    unmoved = (found.pixels[1] - found.pixels[0]).abs().mean(0)[inside]
    assert off.median() < 0.02
    assert off.mean() < 0.4 * unmoved.mean()
