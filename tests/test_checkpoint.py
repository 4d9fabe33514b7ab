import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny import saved

from vggt_cli.errors import InputError, WeightsError
from vggt_cli.models import checkpoint, networks, store, weights
from vggt_cli.models.layers import to_compute
from vggt_cli.models.vggt import VGGT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.install(monkeypatch, tmp_path)


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


def nothing_kept() -> bool:
    return not [p for p in store.home().rglob("*") if p.is_file() and p.parent.name != "hashes"]


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
