"""Which mask belongs to which photo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from vggt_cli.errors import InputError
from vggt_cli.formats.files import below

NAMES = "a.jpg has its mask in a.jpg.png, a.png, a.jpg.mask.png or a.mask.png"


def matching(folder: Path, names: Sequence[str]) -> list[Path | None]:
    """The mask in `folder` of each photo called `names`; None: it has none, and all of it counts.

    A mask lies in the photo's own subfolder, or in `folder` itself where no other photo has that
    name. Raises InputError where `folder` holds no mask of any photo.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder of masks: {folder}", hint=NAMES)
    there = {path.relative_to(folder).as_posix(): path for path in below(folder)}
    base = Counter(PurePosixPath(name).name for name in names)
    found: list[Path | None] = []
    for name in names:
        spellings = list(_spellings(name))
        if base[PurePosixPath(name).name] == 1:
            spellings += _spellings(PurePosixPath(name).name)
        found.append(next((there[mask] for mask in spellings if mask in there), None))
    if not any(found):
        raise InputError(f"no mask of any photo, e.g. {names[0]}: {folder}", hint=NAMES)
    return found


def _spellings(name: str) -> Iterator[str]:
    stem = PurePosixPath(name).with_suffix("").as_posix()
    yield from (f"{name}.png", f"{name}.mask.png", f"{stem}.mask.png", f"{stem}.png")
