"""Which device and dtype; the words that mean out of memory."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vggt_cli import device as devices
from vggt_cli.errors import InputError


def test_auto_is_the_best_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in (
        ((True, True), "cuda"),
        ((False, True), "mps"),
        ((False, False), "cpu"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there[0])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there[1])
        assert devices.choose("auto").type == expected


def test_a_device_is_taken_by_name_if_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.choose("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.choose("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="on this machine: cuda:2"):
        devices.choose("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="on this machine: cuda"):
        devices.choose("cuda")


@pytest.mark.parametrize("name", ["tpu", "cpu:0", "cuda:x", "mps:0", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no such device"):
        devices.choose(name)


def test_the_dtype_is_short_only_where_hardware_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert devices.compute_dtype(torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert devices.compute_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _: False)
    assert devices.compute_dtype(torch.device("cuda")) == torch.float16
    assert devices.compute_dtype(torch.device("mps")) == torch.float32


def test_products_of_int8_are_taken_where_they_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda there=there: there)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        assert devices.multiplies_int8() == there
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not devices.multiplies_int8()


def test_threads_of_a_pool_use_one_thread_each_and_the_others_what_they_used() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with devices.one_thread_each() as pool:
            counts = list(pool.map(lambda _: torch.get_num_threads(), range(20)))
            assert pool._max_workers == 3
        assert set(counts) == {1}
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 50)
    assert devices.is_out_of_memory(found.value)
    assert devices.is_out_of_memory(MemoryError())
    assert not devices.is_out_of_memory(RuntimeError("shapes differ"))
    assert not devices.is_out_of_memory(ValueError("out of memory"))


def test_the_peak_of_memory_only_grows() -> None:
    before = devices.peak_memory(torch.device("cpu"))
    held = torch.ones(1 << 24)
    assert devices.peak_memory(torch.device("cpu")) >= before > 1 << 20
    assert held.sum() > 0
