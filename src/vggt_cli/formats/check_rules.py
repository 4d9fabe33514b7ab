"""What each program that reads COLMAP scenes demands: one rule a demand, all of them data.

A rule states what the program's own reader does; `source` names that file, as of 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vggt_cli.formats import check_faults as faults
from vggt_cli.formats.check_faults import Fault
from vggt_cli.formats.check_files import Files

BROKEN, MENDABLE, NOTE = "broken", "ok with", "note"  # a note leaves the verdict as it is
DENSE = ("patch-match", "fusion")
COLMAP = ("colmap", *DENSE)
SPLATS = ("3dgs", "gsplat", "nerfstudio", "brush")
ALL = (*COLMAP, *SPLATS, "openmvs", "instant-ngp")

READER_3DGS = "graphdeco gaussian-splatting: scene/dataset_readers.py, colmap_loader.py"
READER_GSPLAT = "gsplat: examples/datasets/colmap.py"
READER_NERFSTUDIO = "nerfstudio: data/dataparsers/colmap_dataparser.py"
READER_BRUSH = "Brush: brush-dataset/src/formats/colmap.rs"
READER_OPENMVS = "OpenMVS: apps/InterfaceCOLMAP/InterfaceCOLMAP.cpp"
READER_NGP = "instant-ngp: scripts/colmap2nerf.py"
READER_MVS = "COLMAP: mvs/model.cc, mvs/patch_match.cc"
READER_FUSION = "COLMAP: mvs/fusion.cc"
READERS = "all of them"


@dataclass(frozen=True)
class Rule:
    """One demand: what a scene that fails it is to whom, and why."""

    name: str
    find: Callable[[Files, str], Fault | None]  # of a scene and the name of a reader
    verdicts: Mapping[str, str]  # by reader
    why: str  # what the reader does then
    source: str


def _to(verdict: str, *consumers: str) -> dict[str, str]:
    return dict.fromkeys(consumers, verdict)


def _without(*consumers: str) -> tuple[str, ...]:
    return tuple(name for name in ALL if name not in consumers)


MODEL = (
    Rule("readable", faults.unreadable, _to(BROKEN, *ALL),
         "the model cannot be read", READERS),
    Rule("images", faults.no_images, _to(BROKEN, *ALL),
         "there is nothing to look at", READERS),
    Rule("cameras", faults.no_camera, _to(BROKEN, *ALL),
         "the camera of every image is looked up", READERS),
    Rule("twice", faults.twice, _to(BROKEN, *ALL),
         "names tell images apart", READERS),
    Rule("poses", faults.no_pose, _to(BROKEN, *_without("brush")),
         "nothing comes of it but NaN", READERS),
    Rule("left-out", faults.no_pose, _to(NOTE, "brush"),
         "Brush goes on without", READER_BRUSH),
    Rule("quaternions", faults.not_unit, _to(BROKEN, "3dgs", "nerfstudio", "instant-ngp"),
         "it is not normalised, so that the rotation is none",
         f"{READER_3DGS}; {READER_NERFSTUDIO}; {READER_NGP}"),
    Rule("one-place", faults.one_place,
         _to(BROKEN, "nerfstudio") | _to(NOTE, "3dgs", "gsplat"),
         "the extent of the cameras, which scales the scene or the steps, is 0",
         f"{READER_NERFSTUDIO}; {READER_3DGS}; {READER_GSPLAT}"),
    Rule("tracks", faults.contradiction, _to(BROKEN, *COLMAP, "gsplat", "openmvs"),
         "observations are looked up both ways", "COLMAP: scene/reconstruction.cc"),
    Rule("models", faults.models, _to(NOTE, *_without("brush", "colmap")),
         "they are left out", READERS),
)  # fmt: skip
PHOTOS = (
    Rule("photos", faults.photos, _to(BROKEN, *_without("colmap", "brush")),
         "every photo of the model is opened", READERS),
    Rule("some-photos", faults.photos, _to(NOTE, "colmap", "brush"),
         "it goes on without", f"COLMAP: ui/; {READER_BRUSH}"),
    Rule("all-photos", faults.all_photos, _to(BROKEN, "brush"),
         "without photos there is nothing to train on", READER_BRUSH),
    Rule("base-names", faults.base_names, _to(BROKEN, "3dgs"),
         "3DGS opens images/ and the last part of the name", READER_3DGS),
    Rule("sizes", faults.sizes, _to(BROKEN, *DENSE, "nerfstudio", "instant-ngp"),
         "sizes of photo and camera must be equal",
         f"COLMAP: image/undistortion.cc, mvs/image.cc; {READER_NERFSTUDIO}; {READER_NGP}"),
    Rule("shapes", faults.shapes, _to(BROKEN, "3dgs", "brush", "openmvs"),
         "the aspect of photo and camera must be equal",
         f"{READER_3DGS}; {READER_BRUSH}; {READER_OPENMVS}"),
    Rule("scales", faults.scales, _to(BROKEN, "gsplat"),
         "gsplat scales all cameras as the first photo is scaled", READER_GSPLAT),
    Rule("turned", faults.turned, _to(NOTE, *ALL),
         "COLMAP since 4.0 and OpenCV turn photos by it, Pillow and older COLMAP do not",
         "COLMAP 4.0's release notes; Pillow's Image.open"),
    Rule("spaces", faults.spaces, _to(BROKEN, *_without("brush")),
         "readers of text files split lines at spaces",
         f"COLMAP 4.2, as run; {READER_3DGS}; {READER_NERFSTUDIO}; {READER_OPENMVS}; {READER_NGP}"),
    Rule("spaces-beside", faults.spaces_beside, _to(MENDABLE, "nerfstudio"),
         "it takes text before binary files and splits lines at spaces", READER_NERFSTUDIO),
)  # fmt: skip
LENSES = (
    Rule("lens", faults.lens, _to(MENDABLE, *SPLATS, "openmvs", "instant-ngp"),
         "it takes no such model, but undistorted photos",
         f"{READER_3DGS}; {READER_GSPLAT}; {READER_NERFSTUDIO}; {READER_BRUSH}; "
         f"{READER_OPENMVS}; {READER_NGP}"),
    Rule("stuck-lens", faults.stuck_lens, _to(BROKEN, *SPLATS, "openmvs", "instant-ngp"),
         "it takes no such model, and image_undistorter leaves it as it is",
         "COLMAP: image/undistortion.cc"),
    Rule("no-plane", faults.no_plane, _to(BROKEN, *DENSE),
         "image_undistorter leaves it as it is, and dense stereo takes it for a pinhole",
         f"COLMAP: image/undistortion.cc; {READER_MVS}"),
    Rule("mixed-lenses", faults.mixed_lenses, _to(MENDABLE, "nerfstudio"),
         "nerfstudio takes one camera model a scene", READER_NERFSTUDIO),
    Rule("simple-pinhole", faults.simple_pinhole, _to(MENDABLE, "3dgs", "openmvs"),
         "readers of text files take PINHOLE alone", f"{READER_3DGS}; {READER_OPENMVS}"),
    Rule("principal-point", faults.principal_point, _to(NOTE, "3dgs"),
         "3DGS takes the centre of the photo for it", READER_3DGS),
)  # fmt: skip
POINTS = (
    Rule("points", faults.no_points,
         _to(BROKEN, *DENSE, "3dgs", "gsplat", "nerfstudio", "openmvs"),
         "they are what it starts from",
         f"{READER_3DGS}; {READER_GSPLAT}; {READER_NERFSTUDIO}; {READER_MVS}"),
    Rule("no-start", faults.no_points, _to(NOTE, "colmap", "brush"),
         "it goes on without", READER_BRUSH),
    Rule("finite", faults.infinite_points, _to(BROKEN, *_without("colmap", "instant-ngp")),
         "they spread to everything that is computed from the points", READERS),
    Rule("no-track", faults.no_track, _to(BROKEN, "openmvs"),
         "OpenMVS stops reading at the first point without a track", READER_OPENMVS),
    Rule("short-tracks", faults.short_tracks, _to(MENDABLE, "colmap"),
         "the GUI hides points seen by fewer than 3", "COLMAP: ui/render_options.h"),
    Rule("no-neighbours", faults.all_alone, _to(BROKEN, *DENSE),
         "patch_match_stereo matches images that share points", READER_MVS),
    Rule("neighbours", faults.alone, _to(NOTE, *DENSE),
         "patch_match_stereo leaves it out", READER_MVS),
    Rule("few", faults.fewer_than_3, _to(MENDABLE, *DENSE),
         "patch_match_stereo keeps what 2 others confirm", "COLMAP: mvs/patch_match_options.h"),
    Rule("few-to-fuse", faults.fewer_than_5, _to(MENDABLE, "fusion"),
         "stereo_fusion keeps what 5 images see", "COLMAP: mvs/fusion.h"),
    Rule("blank", faults.blank, _to(BROKEN, "instant-ngp"),
         "colmap2nerf.py stops at the empty line that stands for none", READER_NGP),
)  # fmt: skip
PLACE = (
    Rule("workspace", faults.no_workspace, _to(MENDABLE, *DENSE),
         "image_undistorter makes one", READER_MVS),
    Rule("own-workspace", faults.own_workspace, _to(MENDABLE, "fusion"),
         "stereo_fusion takes the depth maps of vggt export", READER_FUSION),
    Rule("text", faults.no_text, _to(MENDABLE, "openmvs", "instant-ngp"),
         "it reads no others", f"{READER_OPENMVS}; {READER_NGP}"),
    Rule("place", faults.elsewhere, _to(MENDABLE, "3dgs", "gsplat", "nerfstudio"),
         "where it looks for the model",
         f"{READER_3DGS}; {READER_GSPLAT}; {READER_NERFSTUDIO}"),
    Rule("factor", faults.no_factor, _to(MENDABLE, "gsplat"),
         "its trainer takes photos at a quarter of their size unless told",
         "gsplat: examples/simple_trainer.py"),
    Rule("large", faults.large, _to(MENDABLE, "nerfstudio"),
         "it asks whether to shrink large photos unless told", READER_NERFSTUDIO),
    Rule("ply", faults.ply, _to(MENDABLE, "3dgs"),
         "it is read instead of the points, in vain", READER_3DGS),
)  # fmt: skip
RULES = (*MODEL, *PHOTOS, *LENSES, *POINTS, *PLACE)
