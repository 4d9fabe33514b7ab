"""Which photos of two lists are the same, by what they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath

from vggt_cli.formats.export import output_names
from vggt_cli.formats.files import OTHER_KINDS, SUFFIXES


def pair(first: Sequence[str], second: Sequence[str]) -> dict[int, int]:
    """Places in `second` by the places in `first` of the photos that both name, in their order.

    By name; what is left by the name that our scenes give it; then by ever fewer folders; then
    without the ending of the file. A spelling counts only where it is unique in both.
    """
    partner: dict[int, int] = {}
    lists = [
        [str(PurePosixPath(name.replace("\\", "/"))) for name in names] for names in (first, second)
    ]
    for spelling in _spellings(1 + max(name.count("/") for name in ["", *lists[0], *lists[1]])):
        ours, theirs = ([spelling(name) for name in names] for names in lists)
        taken = set(partner.values())
        place = {name: i for i, name in enumerate(theirs) if i not in taken}
        count, count_ours = Counter(theirs), Counter(ours)
        for i, name in enumerate(ours):
            if i not in partner and name in place and count[name] == count_ours[name] == 1:
                partner[i] = place[name]
    return {i: partner[i] for i in sorted(partner)}


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _spellings(depth: int) -> Iterator[Callable[[str], str]]:
    yield str
    yield lambda name: output_names([name])[0]
    for ending in (True, False):
        for parts in range(depth, 0, -1):
            yield partial(_tail, parts=parts, ending=ending)


def _tail(name: str, parts: int, ending: bool) -> str:
    return "/".join((name if ending else _without_ending(name)).split("/")[-parts:])


def _without_ending(name: str) -> str:
    """A name like frame.0001, which has no ending, keeps its number."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES + OTHER_KINDS else name
