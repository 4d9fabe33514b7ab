"""What can be wrong with a scene in the eyes of its readers, one function a fault.

Each takes the scene and the name of the reader, and gives the file and what is wrong with it, or
None. Why it matters, and to whom, stands in `check_rules`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from vggt_cli.formats.check_files import Files
from vggt_cli.formats.colmap_rows import MODELS, PARTS, Array, Camera, Image
from vggt_cli.formats.headers import Header, header

Size = tuple[int, int]  # (height, width)
Fault = tuple[str, str]  # the file, seen from the scene's folder, and what is wrong with it
_NAMES = [name for name, *_ in MODELS]
# Camera models that a reader takes as they are.
WORKSPACE = "colmap_dense/stereo/fusion.cfg"  # of `vggt export --format depth`
LENSES = {
    "3dgs": {"SIMPLE_PINHOLE", "PINHOLE"},
    "gsplat": set(_NAMES[:6]),
    "nerfstudio": set(_NAMES[:11]) - {"FULL_OPENCV", "FOV", "THIN_PRISM_FISHEYE"},
    "brush": set(_NAMES[:11]) - {"FOV"},
    "openmvs": {"SIMPLE_PINHOLE", "PINHOLE"},
    "instant-ngp": set(_NAMES[:6]) | {"SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE"},
}
# Where a reader looks for the model unless told otherwise.
PLACES = {
    "3dgs": ("sparse/0",),
    "gsplat": ("sparse/0", "sparse"),
    "nerfstudio": ("colmap/sparse/0",),
}


def _of(files: Files, images: Sequence[Image], words: str, photo: bool = True) -> Fault | None:
    """A fault of the first of `images`, or of the model's file; None if there are none."""
    if not images:
        return None
    name = images[0].name
    where = f"images/{name}" if photo else files.part("images")
    count = f" (as {len(images)} of {len(files.images)} images)" if len(images) > 1 else ""
    return where, words.format(name=name) + count


def unreadable(files: Files, consumer: str) -> Fault | None:
    needed = PARTS[:2] if consumer in ("brush", "instant-ngp") else PARTS
    parts = [part for part in needed if part in files.unreadable]
    return (files.part(parts[0]), files.unreadable[parts[0]]) if parts else None


def no_images(files: Files, consumer: str) -> Fault | None:
    missing = not files.images and "images" not in files.unreadable
    return (files.part("images"), "a model without images") if missing else None


def no_camera(files: Files, consumer: str) -> Fault | None:
    bad = [image for image in files.images if image.camera not in files.cameras]
    return None if "cameras" in files.unreadable else _of(files, bad, "{name} has no camera", False)


def _norms(files: Files) -> Array:
    """[S] length of the quaternions; NaN for poses that are no numbers."""
    poses = np.array([image.pose for image in files.images], float).reshape(-1, 7)
    return np.where(np.isfinite(poses).all(-1), np.linalg.norm(poses[:, :4], axis=-1), np.nan)


def no_pose(files: Files, consumer: str) -> Fault | None:
    bad = [image for image, n in zip(files.images, _norms(files), strict=True) if not n > 1e-6]
    return _of(files, bad, "the pose of {name} is no pose (NaN, infinite or zero)", False)


def not_unit(files: Files, consumer: str) -> Fault | None:
    bad = [im for im, n in zip(files.images, _norms(files), strict=True) if abs(n - 1) > 1e-3]
    return _of(files, bad, "the quaternion of {name} is not of length 1", False)


def one_place(files: Files, consumer: str) -> Fault | None:
    poses = np.array([image.pose for image in files.images], float).reshape(-1, 7)
    same = len(poses) and (poses == poses[0]).all() and np.isfinite(poses).all()
    return (files.part("images"), "all cameras are in one place") if same else None


def twice(files: Files, consumer: str) -> Fault | None:
    count = Counter(image.name for image in files.images)
    bad = [image for image in files.images if count[image.name] > 1]
    return _of(files, bad, "two images are called {name}", False)


def photos(files: Files, consumer: str) -> Fault | None:
    bad = [image for image in files.images if isinstance(files.photos[image.name], str)]
    return _of(files, bad, str(files.photos[bad[0].name])) if bad else None


def all_photos(files: Files, consumer: str) -> Fault | None:
    return None if files.opened else photos(files, consumer)


def base_names(files: Files, consumer: str) -> Fault | None:
    base = {image.name: PurePosixPath(image.name).name for image in files.images}
    count = Counter(base.values())

    def there(name: str) -> bool:
        return isinstance(header(files.folder / "images" / name), Header)

    deep = [image for image in files.images if base[image.name] != image.name]
    bad = [image for image in deep if count[base[image.name]] > 1 or not there(base[image.name])]
    return _of(files, bad, "in a subfolder")


def _ratio(camera: Camera, size: Size) -> float:
    """How many times the camera's size a photo is; NaN where its aspect is another."""
    (h, w), (H, W) = size, camera.size
    scale = w / W
    return scale if abs(h - scale * H) <= max(1.0, scale) else np.nan


def sizes(files: Files, consumer: str) -> Fault | None:
    """COLMAP since 4.0 and OpenCV turn photos by their EXIF, Pillow and Brush do not."""
    turns = consumer != "nerfstudio"
    bad = [
        image
        for image, camera, header in files.opened
        if (header.upright if turns else header.size) != camera.size
    ]
    return _of(files, bad, _size_words(files, bad[0])) if bad else None


def shapes(files: Files, consumer: str) -> Fault | None:
    bad = [im for im, cam, header in files.opened if np.isnan(_ratio(cam, header.size))]
    return _of(files, bad, _size_words(files, bad[0])) if bad else None


def scales(files: Files, consumer: str) -> Fault | None:
    opened = sorted(files.opened, key=lambda found: found[0].name)
    scales = [_ratio(camera, header.size) for _, camera, header in opened]
    bad = [im for (im, *_), s in zip(opened, scales, strict=True) if not abs(s - scales[0]) < 0.01]
    return _of(files, bad, _size_words(files, bad[0])) if bad else None


def _size_words(files: Files, image: Image) -> str:
    header, (H, W) = files.photos[image.name], files.cameras[image.camera].size
    assert isinstance(header, Header)
    turned = f", EXIF orientation {header.orientation}" if header.orientation != 1 else ""
    return f"{header.size[1]} x {header.size[0]}{turned}, its camera {W} x {H}"


def turned(files: Files, consumer: str) -> Fault | None:
    bad = [image for image, _, header in files.opened if header.orientation != 1]
    return _of(files, bad, "has an EXIF orientation")


def lens(files: Files, consumer: str) -> Fault | None:
    accepted = LENSES[consumer]
    bad = [cam.model for cam in files.used.values() if cam.model not in accepted]
    return (files.part("cameras"), f"a {bad[0]} camera") if bad else None


def stuck_lens(files: Files, consumer: str) -> Fault | None:
    """Cameras that are not taken and that image_undistorter leaves as they are.

    Measured with pycolmap 4.2: so are all without a coefficient of distortion above 1e-8.
    """
    accepted = LENSES[consumer]
    bad = [cam for cam in files.used.values() if cam.model not in accepted and _is_stuck(cam)]
    return (files.part("cameras"), f"a {bad[0].model} camera without distortion") if bad else None


def _is_stuck(camera: Camera) -> bool:
    distortion = camera.parameters[camera.focals() + 2 :]
    return camera.model not in _NAMES or not any(abs(value) > 1e-8 for value in distortion)


def no_plane(files: Files, consumer: str) -> Fault | None:
    curved = {"SIMPLE_FISHEYE", "FISHEYE", "EQUIRECTANGULAR"}
    bad = [
        cam.model for cam in files.used.values() if cam.model in curved or cam.model not in _NAMES
    ]
    return (files.part("cameras"), f"a {bad[0]} camera") if bad else None


def mixed_lenses(files: Files, consumer: str) -> Fault | None:
    kinds = {"FISHEYE" in camera.model for camera in files.used.values()}
    return (files.part("cameras"), "fisheye and other cameras") if len(kinds) > 1 else None


def simple_pinhole(files: Files, consumer: str) -> Fault | None:
    text = files.folder / "sparse/cameras.txt"
    if consumer == "openmvs" and text.is_file():  # which it reads, whatever is elsewhere
        simple = "SIMPLE_PINHOLE" in text.read_text(encoding="utf-8", errors="replace")
    else:
        reads_text = consumer == "openmvs" or files.kind == "txt"
        simple = reads_text and any(cam.model == "SIMPLE_PINHOLE" for cam in files.used.values())
    return (files.part("cameras"), "a SIMPLE_PINHOLE camera") if simple else None


def principal_point(files: Files, consumer: str) -> Fault | None:
    def off(camera: Camera) -> float:
        (x, y), (H, W) = camera.principal_point(), camera.size
        return max(abs(x - W / 2), abs(y - H / 2))

    pinholes = [cam for cam in files.used.values() if cam.model in LENSES[consumer]]
    most = max(map(off, pinholes), default=0.0)
    words = f"a principal point {most:.1f} pixels off the centre"
    return (files.part("cameras"), words) if most > 1 else None


def no_points(files: Files, consumer: str) -> Fault | None:
    return None if len(files.points.number) else (files.part("points3D"), "no points")


def infinite_points(files: Files, consumer: str) -> Fault | None:
    bad = int((~np.isfinite(files.points.xyz).all(-1)).sum())
    return (files.part("points3D"), f"{bad} points are NaN or infinite") if bad else None


def no_track(files: Files, consumer: str) -> Fault | None:
    bad = int((files.points.length == 0).sum())
    words = f"{bad} of {len(files.points.length)} points have no track"
    return (files.part("points3D"), words) if bad else None


def contradiction(files: Files, consumer: str) -> Fault | None:
    return files.contradiction


def short_tracks(files: Files, consumer: str) -> Fault | None:
    longest = int(files.points.length.max(initial=0))
    words = f"no point is seen by more than {longest} images"
    return (files.part("points3D"), words) if 0 < longest < 3 else None


def all_alone(files: Files, consumer: str) -> Fault | None:
    if not len(files.points.number) or len(files.lonely) < len(files.images):
        return None
    return files.part("points3D"), "no two images share points, or only at less than a degree"


def alone(files: Files, consumer: str) -> Fault | None:
    bad = [image for image in files.images if image.name in set(files.lonely)]
    some = len(bad) < len(files.images)
    return (
        _of(files, bad, "shares no points with others, or only at less than a degree")
        if some
        else None
    )


def fewer_than_3(files: Files, consumer: str) -> Fault | None:
    if consumer == "fusion" and files.exported(WORKSPACE):
        return None  # nothing is matched
    return (files.part("images"), "2 images") if len(files.images) == 2 else None


def fewer_than_5(files: Files, consumer: str) -> Fault | None:
    count = len(files.images)
    return (files.part("images"), f"{count} images") if 1 < count < 5 else None


def no_workspace(files: Files, consumer: str) -> Fault | None:
    if consumer == "fusion" and files.exported(WORKSPACE):
        return None
    plain = all("PINHOLE" in camera.model for camera in files.used.values())
    config = files.folder / "stereo" / "patch-match.cfg"
    there = config.is_file() and files.model == files.folder / "sparse"
    return None if there and plain else (files.inside(files.model), "no dense workspace")


def own_workspace(files: Files, consumer: str) -> Fault | None:
    return ("colmap_dense", "holds the depth maps") if files.exported(WORKSPACE) else None


def no_text(files: Files, consumer: str) -> Fault | None:
    folder = files.folder / "sparse" if consumer == "openmvs" else files.model
    there = all((folder / f"{part}.txt").is_file() for part in PARTS)
    return None if there else (files.inside(folder), "no text files")


def elsewhere(files: Files, consumer: str) -> Fault | None:
    if consumer == "nerfstudio" and files.exported("transforms.json"):
        return None
    there = files.inside(files.model)
    return None if there in PLACES[consumer] else (there, f"not in {PLACES[consumer][0]}")


def no_factor(files: Files, consumer: str) -> Fault | None:
    return None if (files.folder / "images_4").is_dir() else ("images_4", "there is none")


def large(files: Files, consumer: str) -> Fault | None:
    if files.exported("transforms.json"):
        return None  # whose reader does not ask
    bad = [image for image, _, header in files.opened if max(header.size) > 1600]
    return None if (files.folder / "images_2").is_dir() else _of(files, bad, "over 1600 pixels")


def ply(files: Files, consumer: str) -> Fault | None:
    path = files.folder / "sparse/0/points3D.ply"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        names = {line.split()[-1] for line in file.read(4096).split(b"\n") if line.split()}
    wanted = [b"nx", b"ny", b"nz", b"red", b"green", b"blue"]
    lacking = ", ".join(name.decode() for name in wanted if name not in names)
    return (files.inside(path), f"no {lacking}") if lacking else None


def spaces(files: Files, consumer: str) -> Fault | None:
    reads_text = files.kind == "txt" or consumer in ("openmvs", "instant-ngp")
    bad = [image for image in files.images if reads_text and len(image.name.split()) > 1]
    return _of(files, bad, "a name with a space")


def spaces_beside(files: Files, consumer: str) -> Fault | None:
    text = files.kind == "bin" and (files.model / "cameras.txt").is_file()
    bad = [image for image in files.images if text and len(image.name.split()) > 1]
    return _of(files, bad, "a name with a space")


def blank(files: Files, consumer: str) -> Fault | None:
    return _of(
        files, [im for im in files.images if not len(im.seen)], "{name} sees no points", False
    )


def models(files: Files, consumer: str) -> Fault | None:
    others = [
        path.name
        for path in (files.folder / "sparse").glob("*")
        if path != files.model and any(path.glob("cameras.*"))
    ]
    words = f"{len(others)} more models beside {files.inside(files.model)}"
    return (f"sparse/{min(others)}", words) if others else None
