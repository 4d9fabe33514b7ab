"""A module imports only modules of lower layers, or beside it along the arrows of the design."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "vggt_cli"
LAYER = {
    "scene": 0,
    "errors": 0,
    "__init__": 0,
    "geometry": 1,
    "device": 1,
    "models": 2,
    "formats": 2,
    "reconstruction": 3,
    "learning": 4,  # may import reconstruction, never the reverse
    "terminal": 5,
    "cli_weights": 6,
    "cli_learning": 6,
    "cli_scenes": 6,
    "cli_check": 6,
    "cli_batch": 6,
    "doctor": 5,
    "cli_doctor": 6,
    "cli_reconstruct": 7,
    "cli": 8,
    "__main__": 9,
}
# Within a room: what each module may import of its neighbours.
BESIDE = {
    "models": {
        "catalog": set(),
        "attention": set(),
        "layers": {"attention"},
        "short": {"layers", "omega"},
        "tracker": {"layers"},
        "vggt": {"layers", "tracker"},
        "omega": {"layers"},
        "matching": set(),
        "solver": {"matching"},
        "sweep": {"matching", "solver"},
        "mini": {"layers", "omega", "matching", "solver", "sweep"},
        "networks": {"layers", "vggt", "omega", "mini"},
        "store": {"catalog"},
        "checkpoint": {"layers", "networks"},
        "weights": {"attention", "catalog", "store", "checkpoint", "networks", "short"},
    },
    "formats": {
        "files": set(),
        "headers": set(),
        "room": set(),
        "decode": {"files", "headers"},
        "images": {"decode", "files", "room"},
        "masks": {"files"},
        "motion": set(),
        "video": {"files", "headers", "motion"},
        "lenses": {"decode"},
        "copies": {"decode", "files", "headers"},
        "colmap": set(),
        "colmap_rows": set(),
        "colmap_read": {"colmap", "colmap_rows"},
        "points": set(),
        "page": {"colmap"},
        "transforms": {"colmap"},
        "depth_maps": {"colmap", "copies", "images"},
        "glb": {"colmap"},
        "mesh": {"colmap", "depth_maps", "points"},
        "writers": {"colmap", "depth_maps", "glb", "mesh", "transforms"},
        "export": {
            "depth_maps",
            "colmap",
            "copies",
            "files",
            "images",
            "page",
            "points",
            "writers",
        },
        "scene_read": {"colmap", "colmap_read", "images", "masks", "points", "writers"},
        "claims": set(),
        "names": {"export", "files"},
        "priors": {"colmap", "colmap_read"},
        "view_selection": {"colmap_rows"},
        "check_files": {"colmap_rows", "headers", "view_selection"},
        "check_faults": {"check_files", "colmap_rows", "headers"},
        "check_rules": {"check_faults", "check_files"},
        "check": {"check_files", "check_rules", "colmap_rows"},
        "features": {"colmap"},
        "adjust": {"colmap"},
    },
    "reconstruction": {
        "predict": set(),
        "trust": set(),
        "fuse": {"trust"},
        "straighten": set(),
        "improve": {"depth", "priors", "refine", "straighten", "tracks"},
        "given": {"improve", "priors", "scale"},
        "content": set(),
        "batch": {"content", "pipeline", "plan", "settings", "stages"},
        "pipeline": {
            *("content", "detect", "diagnose", "fuse", "given", "improve", "inputs", "pairs"),
            *("plan", "refine", "sequence", "settings", "stages", "tracks"),
        },
        "plan": {"detect", "fuse", "pairs", "windows"},
        "settings": {"inputs", "pairs", "plan"},
        "sequence": {"loops", "plan", "predict", "stages", "windows"},
        "matches": set(),
        "pairs": {"matches"},
        "detect": set(),
        "sources": {"matches"},
        "tracks": {"detect", "matches", "pairs", "sources"},
        "align": set(),
        "triangulate": set(),
        "depth": set(),
        "judge": {"triangulate"},
        "bundle": {"align", "triangulate", "judge"},
        "refine": {"triangulate", "judge", "bundle"},
        "looks": set(),
        "stages": set(),
        "inputs": {"stages"},
        "lenses": {"judge", "refine", "triangulate"},
        "diagnose": {"improve", "lenses", "looks", "pairs", "tracks"},
        "readings": {"judge"},
        "priors": {"align", "judge", "readings", "refine"},
        "scale": {"align"},
        "shelf": set(),
        "join": {"align", "trust"},
        "graph": {"join"},
        "loops": {"pairs"},
        "windows": {"graph", "join", "loops", "shelf"},
    },
    "learning": {
        "textures": set(),
        "world": set(),
        "rays": {"world"},
        "places": {"textures", "world"},
        "paths": {"places", "rays", "world"},
        "photographs": {"places"},
        "synthetic": {"textures", "world", "rays", "places", "paths", "photographs", "datasets"},
        "datasets": {"synthetic", "places"},
        "losses": set(),
        "labels": {"losses"},
        "losses_matching": {"losses"},
        "losses_vggt": {"losses", "labels"},
        "metrics": set(),
        "sift": set(),
        "sfm": set(),
        "compare": {"metrics"},
        "clouds": {"metrics"},
        "public": {"datasets", "clouds"},
        "objectives": {"losses", "losses_matching", "losses_vggt", "labels"},
        "stream": {"synthetic", "datasets", "losses", "labels", "objectives"},
        "journal": {"synthetic", "evaluate"},
        "resume": set(),
        "train": {"stream", "journal", "resume", "losses", "objectives"},
        "evaluate": {"synthetic", "datasets", "metrics", "clouds", "public", "sift", "sfm"},
    },
}
MODULES = sorted(p.relative_to(SRC).with_suffix("").as_posix() for p in SRC.rglob("*.py"))


def imported(module: str) -> set[str]:
    """Modules of this package that `module` imports, "" for the package itself."""
    found = set()
    for node in ast.walk(ast.parse((SRC / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vggt_cli"):
            base = (node.module or "").split(".")[1:]
            for alias in node.names:
                whole = [*base, alias.name]
                found.add(
                    "/".join(whole if (SRC / Path(*whole)).with_suffix(".py").exists() else base)
                )
        elif isinstance(node, ast.Import):
            found |= {
                "/".join(a.name.split(".")[1:]) for a in node.names if a.name.startswith("vggt_cli")
            }
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_or_along_the_arrows(module: str) -> None:
    room, _, name = module.partition("/")
    for other in imported(module):
        other_room, _, other_name = other.partition("/")
        if room == other_room and name:
            assert other_name in BESIDE[room][name], f"{module} imports {other}"
        else:
            assert LAYER[other_room or "__init__"] < LAYER[room], f"{module} imports {other}"


def test_only_device_names_an_accelerator() -> None:
    for module in MODULES:
        if module != "device":
            text = (SRC / f"{module}.py").read_text(encoding="utf-8")
            assert not re.search(r"""["'.]cuda""", text), module


@pytest.mark.parametrize(
    "arguments", [["--help"], ["reconstruct", "--help"], ["check", "--help"], ["weights", "list"]]
)
def test_help_and_the_list_of_weights_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "sys.argv[0] = 'vggt'\n"
        "from vggt_cli.cli import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False"


ORDER = """
import io
from vggt_cli.formats.colmap import pycolmap
pycolmap()
from PIL import Image
import numpy as np
noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
image = Image.fromarray(noise).resize((960, 720), Image.BICUBIC)
for k in range(20):
    image.crop((4 * k, 0, 4 * k + 640, 480)).save(io.BytesIO(), "PNG")
print("fine")
"""


@pytest.mark.colmap
def test_pngs_can_be_written_after_pycolmap_was_imported_through_its_door() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORDER], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_pycolmap_is_imported_in_one_place() -> None:
    wanted = re.compile(r"^\s*(import|from) pycolmap", re.MULTILINE)
    users = [m for m in MODULES if wanted.search((SRC / f"{m}.py").read_text("utf-8"))]
    assert users == ["formats/colmap"]


def test_pyav_and_pillows_decoders_have_one_door_each() -> None:
    texts = {module: (SRC / f"{module}.py").read_text("utf-8") for module in MODULES}
    assert [m for m in MODULES if re.search(r"^\s*import av$", texts[m], re.M)] == ["formats/video"]
    doors = [m for m in MODULES if "Image.open(" in texts[m] or "pillow_heif" in texts[m]]
    assert doors == ["doctor", "formats/headers"]  # the first reads what it wrote, in memory


def test_the_library_offers_these_names_and_no_others() -> None:
    import vggt_cli

    offered = {name: getattr(vggt_cli, name) for name in vggt_cli.__all__}
    assert sorted(offered) == [
        "Cameras", "ImageSet", "Options", "PointCloud", "Prediction", "Scene", "Tracks",
        "VggtError", "__version__", "reconstruct", "write",
    ]  # fmt: skip
    with pytest.raises(AttributeError):
        _ = vggt_cli.nothing
