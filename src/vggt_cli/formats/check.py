"""What other programs would do with a scene: a verdict for each, and the commands it needs.

Nothing is written and nothing is run.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vggt_cli.formats.check_files import Files, examine
from vggt_cli.formats.check_rules import BROKEN, MENDABLE, NOTE, RULES
from vggt_cli.formats.colmap_rows import PARTS

LABELS = {
    "colmap": "COLMAP GUI",
    "patch-match": "patch_match_stereo",
    "fusion": "stereo_fusion",
    "3dgs": "3DGS",
    "gsplat": "gsplat",
    "nerfstudio": "nerfstudio",
    "brush": "Brush",
    "openmvs": "OpenMVS",
    "instant-ngp": "instant-ngp",
}
UNDISTORT = {"lens", "mixed-lenses", "workspace"}  # rules that image_undistorter mends


@dataclass(frozen=True)
class Finding:
    """A rule that the scene fails."""

    rule: str
    level: str  # BROKEN, MENDABLE or NOTE
    file: str  # seen from the scene's folder
    words: str  # what is wrong with it
    why: str  # and what the program does then

    def __str__(self) -> str:
        return f"{self.file}: {self.words}; {self.why}"


@dataclass(frozen=True)
class Verdict:
    """What one program would do with a scene."""

    consumer: str
    verdict: str  # "ok", MENDABLE ("ok with") or BROKEN
    commands: tuple[str, ...]  # with which it is ok, in this order
    findings: tuple[Finding, ...]


def check(files: Files, consumers: Sequence[str] = tuple(LABELS)) -> list[Verdict]:
    """The verdicts of `consumers`, names of LABELS, in the order of LABELS."""
    return [_verdict(files, name) for name in LABELS if name in consumers]


def check_folder(folder: Path, consumers: Sequence[str] = tuple(LABELS)) -> list[Verdict]:
    """The same of the scene or COLMAP project in `folder`; raises InputError if it is none."""
    return check(examine(folder), consumers)


def _verdict(files: Files, consumer: str) -> Verdict:
    findings = _findings(files, consumer)
    broken = [finding for finding in findings if finding.level == BROKEN]
    mends = {finding.rule for finding in findings if finding.level == MENDABLE}
    commands = tuple(COMMANDS[consumer](_Way(files, mends))) if mends and not broken else ()
    if any("colmap " in line for line in commands):  # what COLMAP cannot read either
        broken = [found for found in _findings(files, "colmap") if found.level == BROKEN]
    if broken:
        findings = [*broken, *(found for found in findings if found.level == NOTE)]
        return Verdict(consumer, BROKEN, (), tuple(findings))
    return Verdict(consumer, MENDABLE if mends else "ok", commands, tuple(findings))


def _findings(files: Files, consumer: str) -> list[Finding]:
    found = []
    for rule in RULES:
        level = rule.verdicts.get(consumer)
        fault = rule.find(files, consumer) if level else None
        if level and fault:
            found.append(Finding(rule.name, level, *fault, rule.why))
            if level == BROKEN and rule.name in ("readable", "images"):
                break  # the rest would only repeat it
    return found


class _Way:
    """From the scene as it is to what a program takes, command by command."""

    def __init__(self, files: Files, mends: set[str]) -> None:
        self.root, self.model, self.kind = files.folder, files.model, files.kind
        self.count, self.mends, self.ours = len(files.images), mends, files.ours
        self.commands: list[str] = []
        if mends & UNDISTORT:
            there = self.root / "undistorted"
            self.run(
                f"colmap image_undistorter --image_path {_q(self.root / 'images')} "
                f"--input_path {_q(self.model)} --output_path {_q(there)}"
            )
            self.root, self.model, self.kind = there, there / "sparse", "bin"

    def run(self, command: str) -> list[str]:
        self.commands.append(command)
        return self.commands

    def place(self, there: Path) -> None:
        """The model in the folder `there`."""
        if self.model != there:
            self.run(f"mkdir -p {_q(there)} && cp {_q(self.model)}/*.{self.kind} {_q(there)}")
        self.model = there

    def convert(self, there: Path, kind: str) -> None:
        """The model in the folder `there` as files of `kind`, "BIN" or "TXT"."""
        make = f"mkdir -p {_q(there)} && " if self.model != there else ""
        self.run(
            f"{make}colmap model_converter --input_path {_q(self.model)} "
            f"--output_path {_q(there)} --output_type {kind}"
        )
        self.model, self.kind = there, kind.lower()

    def as_text(self, there: Path) -> None:
        """The model as text files: in the folder `there`, or where `vggt export` puts them."""
        texts = all((self.model / f"{part}.txt").is_file() for part in PARTS)
        if self.ours and not texts:
            self.run(f"vggt export {_q(self.root)} --format colmap-txt")
        if texts or self.ours:
            self.kind = "txt"
        else:
            self.convert(there, "TXT")


def _q(path: Path) -> str:
    return shlex.quote(str(path))


def _colmap(way: _Way) -> list[str]:
    way.run(f"colmap gui --import_path {_q(way.model)} --image_path {_q(way.root / 'images')}")
    return way.run("# then Render > Render options > Points > Min. track length: 1")


def _patch_match(way: _Way) -> list[str]:
    few = " --PatchMatchStereo.filter_min_num_consistent 1" if way.count < 3 else ""
    return way.run(f"colmap patch_match_stereo --workspace_path {_q(way.root)}{few}")


def _fusion(way: _Way) -> list[str]:
    if "own-workspace" in way.mends:  # patch_match_stereo would leave its maps as they are
        there = way.root / "colmap_dense"
    else:
        _patch_match(way)
        there = way.root
    few = f" --StereoFusion.min_num_pixels {way.count}" if way.count < 5 else ""
    out = _q(way.root / "fused.ply")
    return way.run(f"colmap stereo_fusion --workspace_path {_q(there)} --output_path {out}{few}")


def _3dgs(way: _Way) -> list[str]:
    there = way.root / "sparse/0"
    if way.kind == "txt" and "simple-pinhole" in way.mends:
        way.convert(there, "BIN")
    way.place(there)
    if "ply" in way.mends and not way.mends & UNDISTORT:
        way.run(f"rm {_q(there / 'points3D.ply')}")
    return way.run(f"python train.py -s {_q(way.root)}")


def _gsplat(way: _Way) -> list[str]:
    if way.model not in (way.root / "sparse/0", way.root / "sparse"):
        way.place(way.root / "sparse/0")
    trainer = "python examples/simple_trainer.py default"
    return way.run(f"{trainer} --data_dir {_q(way.root)} --data_factor 1")


def _nerfstudio(way: _Way) -> list[str]:
    if "spaces-beside" in way.mends and not way.mends & UNDISTORT:
        way.place(way.root / "colmap/sparse/0")
    place = shlex.quote(way.model.relative_to(way.root).as_posix())
    options = f"--data {_q(way.root)} --colmap-path {place} --downscale-factor 1"
    return way.run(f"ns-train splatfacto colmap {options}")


def _brush(way: _Way) -> list[str]:
    return way.run(f"brush {_q(way.root)}")


def _openmvs(way: _Way) -> list[str]:
    there = way.root / "sparse"
    way.as_text(there)
    way.place(there)
    if "simple-pinhole" in way.mends:  # image_undistorter leaves it as it is
        pattern = r"s/SIMPLE_PINHOLE ([0-9]+ [0-9]+) ([^ ]+)/PINHOLE \1 \2 \2/"
        way.run(f"sed -E -i '{pattern}' {_q(there / 'cameras.txt')}")
    return way.run(f"InterfaceCOLMAP -i {_q(way.root)} -o {_q(way.root / 'scene.mvs')}")


def _instant_ngp(way: _Way) -> list[str]:
    if way.mends & {"text", *UNDISTORT}:
        way.as_text(way.root / "text")
    text = shlex.quote(way.model.relative_to(way.root).as_posix())
    # Its paths to photos are relative to where it runs.
    return way.run(f"cd {_q(way.root)} && python colmap2nerf.py --text {text} --images images")


COMMANDS: dict[str, Callable[[_Way], list[str]]] = {
    "colmap": _colmap,
    "patch-match": _patch_match,
    "fusion": _fusion,
    "3dgs": _3dgs,
    "gsplat": _gsplat,
    "nerfstudio": _nerfstudio,
    "brush": _brush,
    "openmvs": _openmvs,
    "instant-ngp": _instant_ngp,
}
