"""Weights by name or file: choose, load, verify, import, fetch. Imports torch when a file opens."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggt_cli.errors import InputError, OutputError, WeightsError
from vggt_cli.models import store
from vggt_cli.models.catalog import CATALOG, Entry, entry
from vggt_cli.models.catalog import require_commercial as require_commercial
from vggt_cli.models.store import Progress, silent
from vggt_cli.models.store import find as find
from vggt_cli.scene import Shaping

if TYPE_CHECKING:
    import torch

    from vggt_cli.models.checkpoint import Checkpoint
    from vggt_cli.models.networks import Config, Network

NAMED = 5  # differences that an error spells out


@dataclass(frozen=True)
class Weights:
    """What was loaded, for the report of the run."""

    name: str
    path: Path
    sha256: str
    licence: str
    commercial: bool
    shaping: Shaping


def best(commercial: bool = False) -> Entry:
    """The best weights on this machine, by the order of the catalog.

    With `commercial` only those licensed for commercial use. Raises WeightsError if none is here.
    """
    for known in CATALOG:
        if (known.licence.commercial or not commercial) and find(known.name):
            return known
    raise WeightsError("no weights on this machine", hint="vggt weights list says what to fetch")


def identify(model: str | Path) -> tuple[Entry, Path]:
    """What `model` means, be it "auto", a name or a file, and where that is.

    Raises WeightsError if the weights are not here or a file's keys fit nothing or too much,
    InputError if there is no such file.
    """
    if model == "auto":
        model = best().name
    if model in {known.name for known in CATALOG}:
        return entry(str(model)), _located(str(model))
    path = Path(model)
    if isinstance(model, str) and not path.suffix and not path.exists():
        return entry(model), path  # raises, naming the known ones
    for known in CATALOG:
        there = find(known.name)
        if there and path.exists() and there.samefile(path):
            return known, path
    return _recognise(path, None), path


def load(
    model: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    heads: Collection[str] = (),
    progress: Progress = silent,
) -> tuple[Network, Weights]:
    """The network of `model` ("auto", a name or a file) on `device`, ready to predict.

    dtype: of the aggregator's matrices; everything else is float32. int8: see `short.to_int8`.
    heads: those wanted beside camera and depth, of "point", "track" and "text"; the weights of
    the others are not read. progress: told while a file is hashed, the first time it is used.
    Raises WeightsError if the weights are not here, their hash is not the recorded one, or keys
    and shapes are not exactly those of the network; InputError if there is no such file.
    """
    import torch

    from vggt_cli.device import compute_dtype
    from vggt_cli.models.short import to_int8

    known, path = identify(model)
    file = _opened(path, known)
    digest = _checked(known, path, progress, fresh=not known.source)
    config, short = _with_heads(file.config(known.config), heads), dtype == torch.int8
    network = file.network(config, device, compute_dtype(device) if short else dtype)
    if short:
        to_int8(network.aggregator)
    licence = known.licence
    return network, Weights(
        known.name, path, digest, licence.name, licence.commercial, known.shaping
    )


@dataclass(frozen=True)
class Wanted:
    """What `load` is asked for."""

    model: str
    device: torch.device
    dtype: torch.dtype
    heads: tuple[str, ...] = ()
    fewer_keys: bool = False  # see `attention.Thinned`


Networks = dict[Wanted, tuple["Network", Weights]]


def kept(
    wanted: Wanted, networks: Networks | None, progress: Progress = silent
) -> tuple[Network, Weights]:
    """What `load` gives, kept in `networks` for the next time: one, since memory is for one."""
    networks = {} if networks is None else networks
    if wanted not in networks:
        networks.clear()
        asked = wanted.model, wanted.device, wanted.dtype, wanted.heads
        network, used = load(*asked, progress)
        if wanted.fewer_keys:
            from vggt_cli.models.attention import Thinned

            network.aggregator.thinned = Thinned.of(network.aggregator.config.depth)
        networks[wanted] = network, used
    return networks[wanted]


def verify(name: str, progress: Progress = silent) -> str:
    """The sha256 of the weights called `name`, hashed now, after a look at keys and shapes.

    Raises WeightsError if they are not here or not what was recorded.
    """
    path = _located(name)
    _opened(path, entry(name))
    return _checked(entry(name), path, progress, fresh=True)


def import_file(path: Path, name: str | None = None, progress: Progress = silent) -> Path:
    """The copy of a file of weights that was put into the user's cache, its sha256 recorded.

    name: which entry it is, needed where the keys fit several.
    Raises InputError if there is no such file, WeightsError if it is damaged or fits nothing,
    OutputError if it cannot be written; then nothing is left behind.
    """
    known = _recognise(path, name)
    _refuse_bundled(known)
    try:
        return store.keep(known, path, progress)
    except OSError as error:
        raise OutputError(
            f"cannot write {store.home() / known.name}: {error.strerror}",
            hint="free space there, or set VGGT_HOME to a folder on another disk",
        ) from error


def fetch(name: str, offline: bool = False, progress: Progress = silent) -> Path:
    """The weights called `name`, downloaded into the hub's cache unless they are here already.

    HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and HF_HOME are honoured.
    Raises WeightsError, saying what to do, if they cannot be had or are not what they should be.
    """
    known, there = entry(name), find(name)
    if there:
        return there
    _refuse_bundled(known)
    path = _download(known, offline)
    try:
        _opened(path, known)
        digest = _checked(known, path, progress, fresh=True)
    except WeightsError:
        path.resolve().unlink()  # the hub's cache would take it for whole for ever
        raise
    with suppress(OSError):
        store.record(known, path, digest)
    return path


def _located(name: str) -> Path:
    path = find(name)
    if path:
        return path
    get = f"vggt weights fetch {name}, or vggt weights import FILE --as {name}"
    raise WeightsError(
        f"weights not on this machine: {name}",
        hint=get if entry(name).source else "they come with the tool: install it anew",
    )


def _refuse_bundled(known: Entry) -> None:
    if not known.source:
        raise WeightsError(
            f"comes with the tool: {known.name}", hint="use a file of your own by its path"
        )


def _opened(path: Path, known: Entry) -> Checkpoint:
    from vggt_cli.models import checkpoint

    file = checkpoint.read(path)
    wrong = file.differences(file.config(known.config))
    if wrong:
        raise _misfit(path, known.name, wrong)
    return file


def _recognise(path: Path, name: str | None) -> Entry:
    from vggt_cli.models import checkpoint

    if not path.is_file():
        raise InputError(f"no such file of weights: {path}")
    if name:
        _opened(path, entry(name))
        return entry(name)
    file = checkpoint.read(path)
    configs = sorted({known.config for known in CATALOG})
    wrong = {config: file.differences(file.config(config)) for config in configs}
    nearest = min(configs, key=lambda config: len(wrong[config]))
    if wrong[nearest]:
        raise _misfit(path, nearest, wrong[nearest])
    fitting = [known for known in CATALOG if not wrong[known.config]]
    written = [known for known in fitting if known.name == file.metadata.get("weights")]
    return written[0] if written else _only(path, fitting)  # ours say what they were made of


def _only(path: Path, fitting: list[Entry]) -> Entry:
    """The one of `fitting` that `path` is, by its published name if there are several."""
    # Several repositories have a model.pt or model.safetensors: that name tells nothing.
    told = path.stem != "model"
    named = [known for known in fitting if told and path.name in known.files]
    if len(fitting) == 1 or len(named) == 1:
        return (named or fitting)[0]
    names = [known.name for known in named or fitting]
    raise WeightsError(
        f"could be {' or '.join(names)}: {path}",
        hint="they differ in image size or licence; say which it is: "
        f"vggt weights import {path} --as {names[0]}",
    )


def _misfit(path: Path, name: str, wrong: list[str]) -> WeightsError:
    rest = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    return WeightsError(
        f"does not fit {name}: {path}: {', '.join(wrong[:NAMED])}{rest}",
        hint="vggt weights list names the weights that are known; files are taken as published",
    )


def _checked(known: Entry, path: Path, progress: Progress, fresh: bool) -> str:
    """The sha256 of `path`, recorded if `known` has none yet; WeightsError if it differs."""
    digest = store.sha256(path, progress, fresh)
    found = store.locate(known)
    if not found or not found.path.samefile(path):
        return digest  # a file of the user's own, which no record speaks of
    if found.sha256 not in {None, digest}:
        raise WeightsError(
            f"changed since it was recorded: {path}",
            hint=f"sha256 is {digest}, should be {found.sha256}; fetch or import it again",
        )
    if found.sha256 is None:
        with suppress(OSError):
            store.record(known, found.path, digest)
    return digest


def _with_heads(config: Config, heads: Collection[str]) -> Config:
    optional = {"point_head", "track_head", "text_head"} & {field.name for field in fields(config)}
    off: dict[str, Any] = {
        name: False for name in optional if name.removesuffix("_head") not in heads
    }
    return replace(config, **off)


def _download(known: Entry, offline: bool) -> Path:
    from huggingface_hub import constants, errors, hf_hub_download

    file = known.files[0]
    page = f"{constants.ENDPOINT}/{known.source}"
    elsewhere = f"vggt weights import FILE --as {known.name} takes a file from elsewhere"
    try:
        return Path(hf_hub_download(known.source, file, local_files_only=offline))
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"no access to {known.name}: {known.source} is gated",
            hint=f"ask for access at {page}, then log in (hf auth login) or set HF_TOKEN",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise WeightsError(
            f"not on the hub: {known.source}/{file}",
            hint=f"look at {page} (HF_ENDPOINT and HF_TOKEN are honoured); {elsewhere}",
        ) from error
    # The hub's HTTP library changed its name between releases; what escapes is this class.
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        if offline or constants.HF_HUB_OFFLINE:
            raise WeightsError(
                f"offline, and not on this machine: {known.name}",
                hint=f"leave out --offline and HF_HUB_OFFLINE; {elsewhere}",
            ) from error
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise WeightsError(
            f"cannot download {known.name}: {reason}",
            hint=f"is {constants.ENDPOINT} reachable? HF_ENDPOINT sets a mirror; {elsewhere}",
        ) from error
