import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from vggt_cli.cli_weights import app
from vggt_cli.errors import InputError, OutputError, WeightsError
from vggt_cli.models import checkpoint, networks, store, weights
from vggt_cli.models.catalog import CATALOG, entry, require_commercial
from vggt_cli.models.layers import to_compute
from vggt_cli.models.vggt import VGGT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.install(monkeypatch, tmp_path)


def saved(path: Path, config: str = "omega-1b") -> Path:
    """A file with a small network, of the kind that its name says."""
    if path.suffix == ".safetensors":
        save_file(tiny.state(config), path)
    else:
        torch.save(tiny.state(config), path)
    return path


def bundle(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """A folder of weights that come with the tool, with `mini` inside."""
    folder.mkdir()
    file = saved(folder / "mini.safetensors", "mini")
    facts = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (folder / "MANIFEST.json").write_text(json.dumps({"mini": facts}))
    monkeypatch.setattr(store, "bundled", lambda: folder)
    return file


def flip_a_bit(path: Path) -> None:
    """Changes one value, not the size and not the time of change."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)


def nothing_kept() -> bool:
    return not [p for p in store.home().rglob("*") if p.is_file() and p.parent.name != "hashes"]


# The table


def test_sizes_in_the_catalog_are_those_of_the_published_keys(shared: Path) -> None:
    vggt = json.loads((shared / "golden/vggt/keys.json").read_text())["summary"]
    omega = json.loads((shared / "golden/vggt_omega/keys.json").read_text())["summary"]
    sizes = {known.config: known.size for known in CATALOG}
    assert sizes["vggt-1b"] == sizes["vggt-1b-tracker"] == vggt["bytes_float32"]
    assert sizes["omega-1b"] == omega["without_text_alignment"]["bytes_float32"]
    assert sizes["omega-1b-text"] == omega["with_text_alignment"]["bytes_float32"]


def test_the_preset_of_a_network_has_its_patch_size() -> None:
    for known in CATALOG:
        if known.config in networks.CONFIGS:
            assert known.shaping.patch_size == networks.CONFIGS[known.config].patch_size


def test_weights_without_commercial_use_are_refused_and_the_others_not() -> None:
    require_commercial(entry("mini"))
    require_commercial(entry("vggt-1b-commercial"))
    for name in ("vggt-1b", "vggt-1b-tracker", "omega-1b-512", "omega-1b-416"):
        with pytest.raises(WeightsError, match=f"commercial use: {name}"):
            require_commercial(entry(name))


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    for ask in (entry, weights.find, weights.identify, weights.fetch, weights.verify):
        with pytest.raises(WeightsError, match="unknown weights: vggt-2b") as caught:
            ask("vggt-2b")
        assert "omega-1b-512" in caught.value.hint


def test_finding_weights_does_not_import_torch() -> None:
    code = (
        "import sys; from vggt_cli.models import weights; weights.find('vggt-1b');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Full size: a file of 5 GB that is all hole


def hollow(path: Path, keys: dict[str, list[int]]) -> Path:
    """A whole safetensors file of float32 with these keys; its values take no room on disk."""
    header: dict[str, object] = {}
    end = 0
    for key, shape in keys.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_published_key_sets_are_told_apart_and_one_wrong_shape_is_named(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = networks.CONFIGS
    monkeypatch.setattr(checkpoint, "CONFIGS", {"mini": tiny.CONFIGS["mini"], **known})
    omega = json.loads((shared / "golden/vggt_omega/keys.json").read_text())
    vggt = json.loads((shared / "golden/vggt/keys.json").read_text())["keys"]
    text = omega["keys"] | omega["text_alignment_keys"]
    assert weights.identify(hollow(tmp_path / "a.safetensors", text))[0].name == "omega-1b-256-text"
    with pytest.raises(WeightsError, match="could be omega-1b-512 or omega-1b-416"):
        weights.identify(hollow(tmp_path / "b.safetensors", omega["keys"]))
    with pytest.raises(WeightsError, match="vggt-1b or vggt-1b-commercial or vggt-1b-tracker"):
        weights.identify(hollow(tmp_path / "c.safetensors", vggt))
    vggt["camera_head.token_norm.weight"] = [1024]
    wrong = r"camera_head.token_norm.weight is \[1024\] instead of \[2048\]"
    with pytest.raises(WeightsError, match=wrong):
        weights.identify(hollow(tmp_path / "d.safetensors", vggt))


# Loading


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth"])
def test_a_loaded_network_has_the_values_of_the_file(tmp_path: Path, ending: str) -> None:
    file = saved(tmp_path / f"x{ending}", "omega-1b-text")
    network, used = weights.load(file, CPU, torch.float32, ["text"])
    for key, value in tiny.state("omega-1b-text").items():
        torch.testing.assert_close(network.state_dict()[key], value, rtol=0, atol=0)
    assert used.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (used.name, used.shaping.resolution) == ("omega-1b-256-text", 256)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_loading_in_bfloat16_is_loading_in_float32_and_converting(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pt", "omega-1b-text")
    short, _ = weights.load(file, CPU, torch.bfloat16)
    whole, _ = weights.load(file, CPU, torch.float32)
    to_compute(whole.aggregator, torch.bfloat16)
    assert {v.dtype for v in short.state_dict().values()} == {torch.float32, torch.bfloat16}
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(short.state_dict()[key], value, rtol=0, atol=0)
    images = torch.rand(1, 2, 3, 32, 32)
    torch.testing.assert_close(short(images).depth, whole(images).depth)


def test_half_precision_files_become_float32_outside_the_matrices(tmp_path: Path) -> None:
    values = {key: value.half() for key, value in tiny.state("omega-1b-text").items()}
    save_file(values, tmp_path / "x.safetensors")
    network, _ = weights.load(tmp_path / "x.safetensors", CPU, torch.float32)
    assert {v.dtype for v in network.state_dict().values()} == {torch.float32}


def test_heads_that_are_not_wanted_are_neither_built_nor_read(tmp_path: Path) -> None:
    file = saved(tmp_path / "model_tracker_fixed_e20.pt", "vggt-1b-tracker")
    network, used = weights.load(file, CPU, torch.float32, ["track"])
    assert isinstance(network, VGGT)
    assert network.point_head is None
    assert network.track_head is not None
    assert network.config.track_position_embedding
    assert used.name == "vggt-1b-tracker"
    opened, asked = checkpoint.read(file), list[str]()

    def spy(key: str) -> torch.Tensor:
        asked.append(key)
        return opened.tensor(key)

    small = replace(tiny.VGGT, point_head=False, track_head=False)
    replace(opened, tensor=spy).network(small, CPU, torch.float32)
    assert asked
    assert not [key for key in asked if key.startswith(("point_head", "track_head"))]


def test_numbers_in_the_file_itself_go_before_those_of_the_table(tmp_path: Path) -> None:
    config = replace(tiny.CONFIGS["mini"], registers=5, cached_layers=(1, 1, 1, 1))
    values = networks.build(config).state_dict()
    numbers = json.dumps({"registers": 5, "cached_layers": [1, 1, 1, 1]})
    save_file(values, tmp_path / "mine.safetensors", metadata={"config": numbers})
    assert checkpoint.read(tmp_path / "mine.safetensors").config("mini") == config
    for strange in ("a small one", json.dumps({"layers": 3})):
        save_file(values, tmp_path / "other.safetensors", metadata={"config": strange})
        assert (
            checkpoint.read(tmp_path / "other.safetensors").config("mini") == tiny.CONFIGS["mini"]
        )


def test_a_training_checkpoint_is_unwrapped(tmp_path: Path) -> None:
    torch.save({"model": tiny.state("omega-1b-text"), "step": 7}, tmp_path / "x.pt")
    assert weights.identify(tmp_path / "x.pt")[0].name == "omega-1b-256-text"


# Files that are not what they should be


class Code:
    """What a pickle must not make when a file of weights is opened."""


def _torch(path: Path) -> Path:
    return saved(path.with_suffix(".pt"))


def _cut(share: float, ending: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        file = saved(path.with_suffix(ending))
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        return file

    return make


def _longer(path: Path) -> Path:
    file = saved(path.with_suffix(".safetensors"))
    file.write_bytes(file.read_bytes() + b"more")
    return file


def _wrote(content: object, ending: str = ".pt") -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        file = path.with_suffix(ending)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        return file

    return make


def _legacy(path: Path) -> Path:
    torch.save(tiny.state("omega-1b"), path, _use_new_zipfile_serialization=False)
    return path.rename(path.with_suffix(".pt"))


def _other(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        values = tiny.state("omega-1b")
        change(values)
        torch.save(values, path.with_suffix(".pt"))
        return path.with_suffix(".pt")

    return make


def _integers(values: dict[str, Any]) -> None:
    values["camera_head.token_norm.weight"] = values["camera_head.token_norm.weight"].int()


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    **{f"cut to {s}": (_cut(s, ".safetensors"), "damaged") for s in (0.01, 0.2, 0.5, 0.999)},
    **{f"pt cut to {s}": (_cut(s, ".pt"), "damaged") for s in (0.01, 0.2, 0.5, 0.999)},
    "longer": (_longer, "damaged"),
    "empty": (_wrote(b""), "not a file of weights"),
    "login page": (_wrote(b"<!doctype html><html>", ".safetensors"), "not a file of weights"),
    "pointer": (_wrote(b"version https://git-lfs.example/v1"), "not a file of weights"),
    "bare pickle": (_wrote(pickle.dumps({"a": 1})), "not a file of weights"),
    "code": (_wrote({"model": Code()}), "holds more than tensors"),
    "no dict": (_wrote([torch.zeros(2)]), "no state dict"),
    "not tensors": (_wrote({"a": 1}), "no state dict"),
    "legacy": (_legacy, "not a file of weights"),
    "pt as safetensors": (
        lambda p: _torch(p).rename(p.with_suffix(".safetensors")),
        "PyTorch file under another name",
    ),
    "safetensors as pt": (
        lambda p: saved(p.with_suffix(".safetensors")).rename(p.with_suffix(".pt")),
        "safetensors file under another name",
    ),
    "other ending": (lambda p: _torch(p).rename(p.with_suffix(".bin")), "under another name"),
    "other network": (_wrote({"a": torch.zeros(1)}), "does not fit .*, and [0-9]+ more"),
    "one missing": (_other(lambda v: v.pop("camera_head.token_norm.bias")), "bias is missing"),
    "one more": (_other(lambda v: v.update(x=torch.zeros(1))), "x is unknown"),
    "vggt": (lambda p: saved(p.with_suffix(".pt"), "vggt-1b"), "does not fit omega-1b-512"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_words_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    make, words = BROKEN[case]
    file = make(tmp_path / "file")
    with pytest.raises(WeightsError, match=words) as caught:
        weights.import_file(file, "omega-1b-512")
    assert str(file) in str(caught.value)
    assert caught.value.hint
    assert nothing_kept()
    if case != "vggt":
        with pytest.raises(WeightsError, match=words.replace(" omega-1b-512", "")):
            weights.load(file, CPU, torch.float32)


def test_quantised_values_are_refused(tmp_path: Path) -> None:
    _other(_integers)(tmp_path / "vggt_omega_1b_512")
    with pytest.raises(WeightsError, match=r"token_norm\.weight .* is torch\.int32"):
        weights.load(tmp_path / "vggt_omega_1b_512.pt", CPU, torch.float32)


def test_a_file_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    for model in (tmp_path / "no.pt", str(tmp_path / "no.pt"), tmp_path, str(tmp_path)):
        with pytest.raises(InputError, match="no such file of weights"):
            weights.identify(model)
    with pytest.raises(InputError, match="no such file of weights"):
        weights.import_file(tmp_path / "no.pt")


# Names, records, hashes


def test_published_file_names_and_records_tell_what_keys_do_not(tmp_path: Path) -> None:
    published = saved(tmp_path / "vggt_omega_1b_416_reproduce.pt")
    assert weights.identify(published)[0].name == "omega-1b-416"
    generic = saved(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="omega-1b-512 or omega-1b-416") as caught:
        weights.identify(generic)
    assert "--as omega-1b-512" in caught.value.hint
    copy = weights.import_file(generic, "omega-1b-416")
    assert weights.identify(copy) == (entry("omega-1b-416"), copy)
    assert weights.identify("omega-1b-416") == (entry("omega-1b-416"), copy)


def test_the_name_that_several_repositories_use_does_not_tell(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="vggt-1b or vggt-1b-commercial"):
        weights.identify(saved(tmp_path / "model.safetensors", "vggt-1b"))
    with pytest.raises(WeightsError, match="vggt-1b or vggt-1b-commercial"):
        weights.identify(saved(tmp_path / "model.pt", "vggt-1b"))


def test_an_imported_file_is_found_and_a_second_import_takes_its_place(tmp_path: Path) -> None:
    assert weights.find("omega-1b-512") is None
    first = weights.import_file(saved(tmp_path / "first.pt"), "omega-1b-512")
    second = weights.import_file(saved(tmp_path / "second.safetensors"), "omega-1b-512")
    assert weights.find("omega-1b-512") == second
    assert not first.exists()
    assert weights.verify("omega-1b-512") == hashlib.sha256(second.read_bytes()).hexdigest()


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    before = weights.import_file(saved(tmp_path / "before.pt"), "omega-1b-512")
    there = sorted(store.home().rglob("*"))
    other = saved(tmp_path / "other.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OutputError, match="cannot write") as caught:
            weights.import_file(other, "omega-1b-512")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "VGGT_HOME" in caught.value.hint
    assert sorted(store.home().rglob("*")) == there
    assert weights.find("omega-1b-512") == before


def test_a_changed_file_is_refused_and_a_hidden_change_is_found_by_verify(tmp_path: Path) -> None:
    copy = weights.import_file(saved(tmp_path / "x.safetensors"), "omega-1b-512")
    weights.load("omega-1b-512", CPU, torch.float32)
    flip_a_bit(copy)  # size and time as before: what verify is for
    with pytest.raises(WeightsError, match="changed since it was recorded"):
        weights.verify("omega-1b-512")
    copy.touch()
    with pytest.raises(WeightsError, match="changed since it was recorded"):
        weights.load("omega-1b-512", CPU, torch.float32)


def test_bundled_weights_are_hashed_at_every_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bundle(monkeypatch, tmp_path / "weights")
    assert weights.load("auto", CPU, torch.float32)[1].name == "mini"
    flip_a_bit(file)
    with pytest.raises(WeightsError, match="changed since it was recorded"):
        weights.load("mini", CPU, torch.float32)


def test_a_large_file_is_hashed_once(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(20_000_000))
    told: list[tuple[int, int]] = []
    for _ in range(2):
        digest = store.sha256(file, lambda done, total: told.append((done, total)))
        assert digest == hashlib.sha256(bytes(20_000_000)).hexdigest()
    assert [done for done, _ in told] == [1 << 23, 1 << 24, 20_000_000]
    file.write_bytes(bytes(19_999_999) + b"x")
    assert store.sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_cache_that_cannot_be_written_does_not_stop_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file where the cache should be")
    monkeypatch.setenv("VGGT_HOME", str(tmp_path / "taken"))
    file = saved(tmp_path / "vggt_omega_1b_512.pt")
    assert weights.load(file, CPU, torch.float32)[1].name == "omega-1b-512"


def test_auto_takes_the_best_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="no weights on this machine"):
        weights.best()
    bundle(monkeypatch, tmp_path / "weights")
    assert weights.best().name == "mini"
    weights.import_file(saved(tmp_path / "v.pt", "vggt-1b"), "vggt-1b-commercial")
    assert weights.best().name == "vggt-1b-commercial"
    weights.import_file(saved(tmp_path / "o.pt"), "omega-1b-512")
    assert weights.best().name == "omega-1b-512"
    assert weights.best(commercial=True).name == "vggt-1b-commercial"


# Commands


def test_list_tells_everything_as_json_and_names_in_a_table(tmp_path: Path) -> None:
    copy = weights.import_file(saved(tmp_path / "o.pt"), "omega-1b-512")
    rows = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    assert [row["name"] for row in rows] == [known.name for known in CATALOG]
    assert rows[0]["path"] == str(copy)
    assert rows[0]["sha256"] == hashlib.sha256(copy.read_bytes()).hexdigest()
    assert rows[1]["path"] is None
    assert "output" in rows[0]["forbids"]
    table = CliRunner().invoke(app, ["list"])
    assert all(known.name in table.stdout for known in CATALOG)


def test_import_path_and_verify_print_their_result_alone_on_stdout(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    imported = CliRunner().invoke(app, ["import", str(file), "--as", "omega-1b-512"])
    there = CliRunner().invoke(app, ["path", "omega-1b-512"])
    assert imported.stdout == there.stdout == f"{weights.find('omega-1b-512')}\n"
    verified = CliRunner().invoke(app, ["verify"])
    assert verified.stdout == f"{digest}  omega-1b-512\n"


def test_weights_that_are_not_here_exit_with_four_and_words_on_stderr(tmp_path: Path) -> None:
    away = {"VGGT_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "vggt_cli", "weights", "path", "omega-1b-512"],
        env=os.environ | away,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert "vggt weights fetch omega-1b-512" in done.stderr
