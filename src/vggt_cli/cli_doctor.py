"""`vggt doctor`: facts in words."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from vggt_cli.terminal import Json

if TYPE_CHECKING:
    from vggt_cli.doctor import Fact

COLOURS = {"ok": "green", "note": "yellow", "broken": "red"}


def doctor(as_json: Json = False) -> None:
    """What this machine has for vggt, what would fail, and how to mend it.

    Looks at versions, devices, memory, codecs, weights and disks, and makes a scene of two made-up
    photos with the bundled network. Uses no network. Exit code 1 if that cannot be done.
    """
    from vggt_cli.doctor import BROKEN, examine

    facts: list[Fact] = []
    for fact in examine():
        facts.append(fact)
        if not as_json:
            _say(fact)
    broken = any(fact.state == BROKEN for fact in facts)
    if as_json:
        typer.echo(json.dumps({"ok": not broken, "facts": list(map(asdict, facts))}, indent=1))
    else:
        notes = sum(fact.state == "note" for fact in facts)
        verdict = "something is broken" if broken else "vggt can do its work here"
        typer.echo(f"\n{verdict}; notes: {notes}")
    if broken:
        raise typer.Exit(1)


def _say(fact: Fact) -> None:
    typer.secho(fact.state.ljust(8), fg=COLOURS[fact.state], nl=False)
    typer.echo(f"{fact.part:9} {fact.name:17} {fact.words}")
    if fact.mend:
        typer.echo(f"{'':8}{'':9} {'':17}  -> {fact.mend}")
