import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny import saved
from typer.testing import CliRunner

from vggt_cli.cli_weights import app
from vggt_cli.errors import OutputError, WeightsError
from vggt_cli.models import checkpoint, networks, store, weights
from vggt_cli.models.catalog import CATALOG, entry, require_commercial
from vggt_cli.models.store import bundled

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.install(monkeypatch, tmp_path)


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
    file.unlink()
    with pytest.raises(WeightsError, match="not on this machine: mini") as caught:
        weights.load("mini", CPU, torch.float32)
    assert "fetch" not in caught.value.hint


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


def test_weights_in_the_package_go_before_those_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "vggt_cli"
    monkeypatch.setattr(store, "__file__", str(package / "models" / "store.py"))
    assert bundled() is None
    for folder in (tmp_path / "weights", package / "_weights"):
        folder.mkdir(parents=True)
        assert bundled() != folder  # a folder of that name without a manifest is not ours
        (folder / "MANIFEST.json").write_text("{}")
        assert bundled() == folder


def test_the_cache_is_where_the_variables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.home() == tmp_path / "home"
    monkeypatch.delenv("VGGT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.home() == tmp_path / "xdg" / "vggt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.home() == tmp_path / ".cache" / "vggt"


def test_a_download_whose_hash_nobody_announced_is_recorded_at_its_first_use(
    tmp_path: Path,
) -> None:
    commit = tmp_path / "hub" / "models--facebook--VGGT-1B" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text(commit.name)
    file = saved(commit / "model.pt", "vggt-1b")
    assert store.locate(entry("vggt-1b")) == store.Found(file, None)
    _, used = weights.load("vggt-1b", CPU, torch.float32)
    assert store.locate(entry("vggt-1b")) == store.Found(file, used.sha256)
    flip_a_bit(file)
    with pytest.raises(WeightsError, match="changed since it was recorded"):
        weights.verify("vggt-1b")


def test_the_mini_that_comes_with_the_tool_is_whole_and_predicts() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "bundled", bundled)
        patch.setattr(checkpoint, "CONFIGS", networks.CONFIGS)
        network, used = weights.load("mini", CPU, torch.float32)
        facts = json.loads((used.path.parent / "MANIFEST.json").read_text())["mini"]
    assert (used.sha256, used.path.stat().st_size) == (facts["sha256"], facts["bytes"])
    assert used.commercial
    with torch.inference_mode():
        outputs = network(torch.rand(1, 2, 3, 96, 128))
    assert outputs.depth.isfinite().all()
    assert (outputs.confidence >= 1).all()


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
