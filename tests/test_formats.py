"""Every further format gives back the world, read by the rules of who reads it."""

import itertools
import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import trimesh
from PIL import Image
from rendered import MARGIN, NARROW, SCALE, scene_of, truth
from scipy.spatial import cKDTree

from vggt_cli.formats import colmap, colmap_read, export, glb, transforms
from vggt_cli.geometry import unproject
from vggt_cli.learning.synthetic import Sample
from vggt_cli.scene import Scene

Array = npt.NDArray[Any]
FORMATS = ["colmap-txt", "depth", "nerfstudio", "glb", "mesh"]


@pytest.fixture(scope="module")
def true() -> Sample:
    return truth()


@pytest.fixture(scope="module")
def scene(true: Sample, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_of(true, tmp_path_factory.mktemp("rendered") / "photos")


@pytest.fixture(scope="module")
def folder(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = tmp_path_factory.mktemp("written") / "scene"
    export.write(scene, there, FORMATS)
    return there


@pytest.fixture(scope="module")
def points(true: Sample) -> list[Array]:
    """What each map's pixels show, [h, w, 3] in the world, without padding."""
    found = unproject(true.depth, true.cameras.intrinsics, true.cameras.extrinsics)
    cut = [slice(MARGIN, -MARGIN) if i == NARROW else slice(None) for i in range(len(found))]
    return [one[:, columns].numpy() for one, columns in zip(found, cut, strict=True)]


def centers(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """x and y [h, w] of the maps' pixel centres in pixels of the files."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return SCALE * x, SCALE * y


def png(path: Path) -> Array:
    with Image.open(path) as image:
        assert image.mode == "I;16"
        return np.asarray(image).astype(np.float64)


def opengl(values: dict[str, Any], matrix: Array, depth: Array) -> Array:
    """The world points of nerfstudio's rays: x right, y up, looking along -z."""
    x, y = centers(depth.shape)
    ray = [
        (x - values["cx"]) / values["fl_x"],
        -(y - values["cy"]) / values["fl_y"],
        -np.ones_like(x),
    ]
    camera = np.stack(ray, -1) * depth[..., None]
    return np.asarray(camera @ matrix[:3, :3].T + matrix[:3, 3])


def test_nerfstudio_s_rays_and_millimetres_meet_in_our_world(
    folder: Path, points: list[Array]
) -> None:
    meta = json.loads((folder / "transforms.json").read_text(encoding="utf-8"))
    assert "fl_x" not in meta  # else the frames' own are not read
    for i, frame in enumerate(meta["frames"]):
        with Image.open(folder / frame["file_path"]) as photo:
            assert photo.size == (frame["w"], frame["h"])
        depth = png(folder / frame["depth_file_path"]) * 0.001
        found = opengl(frame, np.array(frame["transform_matrix"]), depth)
        np.testing.assert_allclose(found, points[i], atol=2e-3)


def test_no_other_axes_would_fit(folder: Path, points: list[Array]) -> None:
    """The scene is lopsided: turned or mirrored, in the camera or in the world, it is another."""
    frame = json.loads((folder / "transforms.json").read_text(encoding="utf-8"))["frames"][1]
    depth, matrix = png(folder / frame["depth_file_path"]) * 0.001, np.eye(4)
    matrix[:3] = np.array(frame["transform_matrix"])[:3]
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            axes = np.eye(4)
            axes[:3, :3] = np.diag(signs)[list(order)]
            same = np.array_equal(axes, np.eye(4))
            for other in (matrix @ axes, axes @ matrix):
                found = opengl(frame, other, depth)
                error = np.median(np.linalg.norm(found - points[1], axis=-1))
                assert error < 1e-3 if same else error > 0.05


def test_nerfstudio_s_points_are_where_its_cameras_see_them(folder: Path, scene: Scene) -> None:
    """The parser moves points by its own transform after applied_transform, cameras by its own."""
    meta = json.loads((folder / "transforms.json").read_text(encoding="utf-8"))
    applied = np.array(meta["applied_transform"])
    cloud: Any = trimesh.load(folder / meta["ply_file_path"])
    found = np.asarray(cloud.vertices) @ applied[:, :3].T + applied[:, 3]
    assert scene.dense is not None
    np.testing.assert_allclose(found, scene.dense.xyz, atol=1e-5)


def test_one_lens_stands_at_the_top_of_transforms_json(scene: Scene, tmp_path: Path) -> None:
    model = export.as_colmap(scene, [photo.name for photo in scene.photos])
    kept = colmap.Model(model.names[:2], model.cameras[:2], (0, 0), model.tracks, model.rgb)
    found = transforms.content(kept, cloud=False, depths=False)
    assert (found["w"], found["h"]) == (256, 192)
    assert found["fl_x"] == pytest.approx(float(model.cameras.intrinsics[0, 0, 0]))
    assert set(found["frames"][0]) == {"file_path", "transform_matrix"}
    assert "ply_file_path" not in found


def read_model(folder: Path) -> tuple[list[str], Array, Array]:
    found = colmap_read.read(folder)
    cameras = found.cameras
    return list(found.names), cameras.extrinsics.numpy(), cameras.intrinsics.numpy()


def opencv(k: Array, extrinsics: Array, depth: Array) -> Array:
    x, y = centers(depth.shape)
    ray = [(x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1], np.ones_like(x)]
    camera = np.stack(ray, -1) * depth[..., None]
    return np.asarray((camera - extrinsics[:, 3]) @ extrinsics[:, :3])


def test_inverse_depth_is_what_3dgs_makes_of_it(folder: Path, points: list[Array]) -> None:
    """Pixels over 65536, times scale, plus offset; by the name without its last ending."""
    names, extrinsics, intrinsics = read_model(folder / "sparse/0")
    text = (folder / "sparse/0/depth_params.json").read_text(encoding="utf-8")
    parameters = json.loads(text)
    median = np.median([one["scale"] for one in parameters.values()])
    for i, name in enumerate(names):
        stem = name[: -len(name.split(".")[-1]) - 1]
        scale, offset = parameters[stem]["scale"], parameters[stem]["offset"]
        assert 0.2 * median < scale < 5 * median  # else it leaves the photo out
        inverse = png(folder / f"inverse_depths/{stem}.png") / 2**16 * scale + offset
        found = opencv(intrinsics[i], extrinsics[i], 1 / inverse)
        np.testing.assert_allclose(found, points[i], atol=2e-3)


def read_dense(path: Path) -> Array:
    """[h, w, C] of COLMAP's maps: width&height&channels&, then channel by channel, row by row."""
    data = path.read_bytes()
    header = re.match(rb"(\d+)&(\d+)&(\d+)&", data)
    assert header is not None
    w, h, channels = map(int, header.groups())
    values = np.frombuffer(data, "<f4", offset=header.end())
    return values.reshape(channels, h, w).transpose(1, 2, 0)


def test_colmap_s_maps_hold_depth_and_normals_of_the_camera(
    folder: Path, points: list[Array]
) -> None:
    names, extrinsics, intrinsics = read_model(folder / "colmap_dense/sparse")
    for i, name in enumerate(names):
        depth = read_dense(folder / f"colmap_dense/stereo/depth_maps/{name}.geometric.bin")[..., 0]
        found = opencv(intrinsics[i], extrinsics[i], depth)
        np.testing.assert_allclose(found, points[i], atol=1e-4)
        assert torch.equal(
            colmap_read.read_map(folder / f"colmap_dense/stereo/depth_maps/{name}.geometric.bin"),
            torch.from_numpy(depth.copy()),
        )
    for i, normals in enumerate(world_normals(folder)):
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
        across = points[i][1:-1, 2:] - points[i][1:-1, :-2]
        smooth = np.abs(across).max(-1) < 0.1
        dot = np.abs((normals[1:-1, 1:-1] * across).sum(-1)) / np.linalg.norm(across, axis=-1)
        assert np.median(dot[smooth]) < 1e-3
        center = -extrinsics[i][:, :3].T @ extrinsics[i][:, 3]
        assert ((normals * (center - points[i])).sum(-1) > 0).all()


def world_normals(folder: Path) -> list[Array]:
    """[h, w, 3] of each normal map."""
    names, extrinsics, _ = read_model(folder / "colmap_dense/sparse")
    place = folder / "colmap_dense/stereo/normal_maps"
    maps = [read_dense(place / f"{name}.geometric.bin") for name in names]
    return [one @ pose[:, :3] for one, pose in zip(maps, extrinsics, strict=True)]


def corrected(folder: Path, target: Path) -> Path:
    """The workspace in a model whose pixel corners lie where pixel centres are."""
    shutil.copytree(folder / "colmap_dense", target)
    model = colmap_read.read(target / "sparse")
    intrinsics = model.cameras.intrinsics.clone()
    intrinsics[:, :2, 2] -= SCALE / 2
    cameras = replace(model.cameras, intrinsics=intrinsics)
    colmap.write(replace(model, cameras=cameras), target / "sparse")
    return target


@pytest.mark.colmap
def test_colmap_fuses_the_maps_to_the_true_surface(
    folder: Path, points: list[Array], true: Sample, tmp_path: Path
) -> None:
    """COLMAP takes the corner of a pixel for its centre, which costs half a pixel of the map."""
    module = colmap.pycolmap()
    options = module.StereoFusionOptions()
    options.min_num_pixels, options.num_threads = 2, 1
    surface = np.concatenate([one.reshape(-1, 3) for one in points])
    normals = np.concatenate([one.reshape(-1, 3) for one in world_normals(folder)])
    cut = [slice(MARGIN, -MARGIN) if i == NARROW else slice(None) for i in range(len(points))]
    shown = [true.pixels[i, :, :, cut[i]].flatten(1).T for i in range(len(points))]
    spaces = folder / "colmap_dense", corrected(folder, tmp_path / "space")
    for workspace, most in zip(spaces, (0.02, 0.001), strict=True):
        module.stereo_fusion(tmp_path / "fused.ply", workspace, options=options, output_type="ply")
        cloud: Any = trimesh.load(tmp_path / "fused.ply")
        found = np.asarray(cloud.vertices)
        assert len(found) > 5000
        distance, nearest = cKDTree(surface).query(found)
        above = np.abs(((found - surface[nearest]) * normals[nearest]).sum(-1))
        assert np.median(above) < most
        assert np.quantile(distance, 0.95) < 0.06
        colours = np.asarray(cloud.colors)[:, :3]
        rgb = np.concatenate(shown)[nearest] * 255
        assert np.median(np.abs(colours - rgb).mean(-1)) < 12


def gltf(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON and the binary part of a GLB. Source: glTF 2.0, section 4.4."""
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON"
    return json.loads(data[20 : 20 + size]), data[28 + size :]


def accessor(tree: dict[str, Any], binary: bytes, number: int) -> Array:
    one = tree["accessors"][number]
    view = tree["bufferViews"][one["bufferView"]]
    kind = {5126: "<f4", 5121: "u1"}[one["componentType"]]
    width = {"VEC3": 3, "VEC4": 4}[one["type"]]
    offset = view.get("byteOffset", 0) + one.get("byteOffset", 0)
    values = np.frombuffer(binary, kind, one["count"] * width, offset)
    return values.reshape(-1, width)


def nodes(path: Path) -> dict[str, tuple[int, Array, Array | None]]:
    """By name: mode of the primitive, positions in the file's world, colours."""
    tree, binary = gltf(path)
    found = {}
    for node in tree["nodes"]:
        if "mesh" in node:
            assert not {"matrix", "rotation", "translation", "scale"} & set(node)
            (primitive,) = tree["meshes"][node["mesh"]]["primitives"]
            place = accessor(tree, binary, primitive["attributes"]["POSITION"])
            rgb = primitive["attributes"].get("COLOR_0")
            colours = None if rgb is None else accessor(tree, binary, rgb)
            found[node["name"]] = (primitive["mode"], place, colours)
    return found


def test_the_glb_holds_points_in_gltf_s_axes_and_linear_light(folder: Path, scene: Scene) -> None:
    mode, xyz, rgb = nodes(folder / "scene.glb")["points"]
    assert scene.dense is not None
    assert rgb is not None
    assert mode == 0
    np.testing.assert_allclose(xyz * [1, -1, -1], scene.dense.xyz, atol=1e-6)
    encoded = np.where(
        rgb[:, :3] / 255 <= 0.0031308,
        rgb[:, :3] / 255 * 12.92,
        1.055 * (rgb[:, :3] / 255) ** (1 / 2.4) - 0.055,
    )
    # A step of 8 bits of linear light is 13 of sRGB at black, and less than 3 above a quarter.
    error = np.abs(encoded * 255 - scene.dense.rgb.numpy())
    assert error.max() < 7
    assert error[scene.dense.rgb.numpy() > 64].max() < 2


def test_the_glb_shows_where_each_photo_was_taken(folder: Path, scene: Scene) -> None:
    found = nodes(folder / "scene.glb")
    assert set(found) == {"points", *(photo.name for photo in scene.photos)}
    for i, photo in enumerate(scene.photos):
        mode, lines, _ = found[photo.name]
        assert mode in (1, 3)  # lines, or a strip of them
        world = lines * [1, -1, -1]
        center = scene.prediction.cameras.centers[i].numpy()
        assert np.abs(world - center).max(-1).min() < 1e-5
        pose = scene.prediction.cameras.extrinsics[i].numpy()
        camera = world @ pose[:, :3].T + pose[:, 3]
        depth = camera[:, 2].max()
        k = scene.prediction.cameras.intrinsics[i].numpy()
        corners = camera[camera[:, 2] > depth / 2]
        pixels = corners[:, :2] / corners[:, 2:] * [k[0, 0], k[1, 1]] + k[:2, 2]
        left = MARGIN if i == NARROW else 0
        wanted = {(x, y) for x in (left, 128 - left) for y in (0, 96)}
        assert {(round(float(x)), round(float(y))) for x, y in pixels} == wanted


def test_a_glb_of_many_points_is_limited(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glb, "POINTS", 500)
    glb.write(scene, export.as_colmap(scene, [photo.name for photo in scene.photos]), tmp_path)
    _, xyz, _ = nodes(tmp_path / "scene.glb")["points"]
    assert len(xyz) == 500


def test_the_mesh_is_the_true_surface_to_a_camera_that_made_no_part_of_it(
    true: Sample, tmp_path: Path
) -> None:
    import open3d as module

    open3d: Any = module
    more = truth(frames=8)
    given = Sample(more.pixels[:7], more.cameras[:7], more.depth[:7], more.valid[:7])
    export.write(scene_of(given, tmp_path / "photos"), tmp_path / "scene", ["mesh"], html=False)
    mesh = open3d.t.io.read_triangle_mesh(str(tmp_path / "scene/mesh.ply"))
    assert mesh.vertex.colors.numpy().shape == mesh.vertex.positions.numpy().shape
    scene = open3d.t.geometry.RaycastingScene()
    scene.add_triangles(mesh)
    center = more.cameras.centers[7]
    seen = unproject(more.depth[7], more.cameras.intrinsics[7], more.cameras.extrinsics[7])
    rays = torch.cat([center.expand_as(seen), seen - center], -1).flatten(0, 1).numpy()
    cast = scene.cast_rays(open3d.core.Tensor(rays.astype(np.float32)))
    ratio = cast["t_hit"].numpy()  # 1: at the surface
    hit = np.isfinite(ratio)
    error = np.abs(ratio[hit] - 1)
    assert hit.mean() > 0.9
    assert np.median(error) < 0.002
    assert np.quantile(error, 0.9) < 0.02
    triangle = cast["primitive_ids"].numpy()[hit]
    corner = mesh.triangle.indices.numpy()[triangle, 0]
    rgb = mesh.vertex.colors.numpy()[corner]
    shown = more.pixels[7].flatten(1).T.numpy()[hit]
    assert np.median(np.abs(rgb - shown).mean(-1)) < 0.06
    normals = mesh.vertex.normals.numpy()[corner]
    assert ((normals * rays[hit, 3:]).sum(-1) < 0).mean() > 0.99  # towards the camera
