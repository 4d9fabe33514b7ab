"""Which device, which dtype, how much memory: the only file that names an accelerator."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vggt_cli.errors import InputError

CGROUP = Path("/sys/fs/cgroup")  # of the container, as it sees itself
# A second, in bfloat16, roughly: for plans where nothing was measured.
OPERATIONS = {"cuda": 2e14, "mps": 5e12, "cpu": 1e11}


def choose(name: str) -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU.

    Raises InputError for a device that this machine or this torch does not have.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind in there if there[kind]))
    kind, _, index = name.partition(":")
    if kind not in there or (index and not (kind == "cuda" and index.isdecimal())):
        raise InputError(
            f"no such device: {name}", hint="auto, cpu, cuda, cuda:1 and mps are known"
        )
    if not there[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise InputError(f"no such device on this machine: {name}", hint="try --device cpu")
    return torch.device(name)


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the aggregator's matrix products on `device`.

    bfloat16 where the hardware multiplies it, as the published networks run; float16 on CUDA
    devices before it. Elsewhere float32, which is slower and exact.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    # Private in torch, present since 2.5; without the instructions bfloat16 is emulated and slow.
    return bool(torch.cpu._is_avx512_bf16_supported())


def multiplies_int8() -> bool:
    """Whether the CPU's products of int8 are exact and faster than those of float32.

    Without these instructions sums are cut at 16 bits, or the products are a plain loop.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_vnni_supported())


@contextlib.contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Threads, as many as torch uses, in each of which torch uses one.

    Many small products are quicker so than one after the other in all threads, which wait for each
    other after every step, and long where the processor is shared.
    """
    count = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)  # the others' number is what new threads would take


def describe() -> list[tuple[str, str]]:
    """Each device by the name that --device takes, the one of "auto" first, and what it is."""
    chosen = choose("auto")
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GB free"
        found.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, {memory}"))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple's GPU, memory shared with the CPU"))
    found.append(("cpu", f"{torch.get_num_threads()} threads of torch"))
    dtype = str(compute_dtype(chosen)).removeprefix("torch.")
    first, words = found[0]
    return [(first, f"{words}; --device auto takes it, in {dtype}"), *found[1:]]


def unused() -> tuple[str, str] | None:
    """What keeps an NVIDIA GPU of this machine, or this torch's CUDA, from use; how to mend it."""
    if torch.cuda.is_available():
        return None
    if Path("/proc/driver/nvidia/version").exists() and torch.version.cuda is None:
        return "there is an NVIDIA GPU, and this torch is without CUDA", "pip install torch anew"
    if torch.version.cuda is not None:
        return "this torch has CUDA, and sees no GPU", "if there is one: does nvidia-smi see it?"
    return None


def exact_convolutions() -> contextlib.AbstractContextManager[None]:
    """The context in which float32 convolutions are float32, and the same on every run.

    CUDA devices otherwise round their factors to ten bits, which the heads do not bear.
    """
    context: contextlib.AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False
    )
    return context


def attention_kernels() -> contextlib.AbstractContextManager[None]:
    """The context in which attention takes the kernels that it takes here and now, later too."""
    allowed = {
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
    }
    context: contextlib.AbstractContextManager[None] = sdpa_kernel(
        [k for k in allowed if allowed[k]]
    )
    return context


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[tuple[torch.device, int, int]]:
    """This process's device, its rank and how many processes torchrun started; else `device, 0, 1`.

    Inside they may speak to each other. Of several CUDA devices each process takes its own.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield device, 0, 1
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, int(os.environ["RANK"]), count
    finally:
        torch.distributed.destroy_process_group()


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any of the processes; all of them have to ask."""
    if not torch.distributed.is_initialized():
        return flag
    told = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told)


def synchronize(device: torch.device) -> None:
    """Wait until the work queued on `device` is done, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes held so far: on the accelerator, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory() -> tuple[int, int]:
    """Bytes of this machine: all, and those that a program may still have; a container's if less.

    Where the system does not say what is free, it is all.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    total = free = page * os.sysconf("SC_PHYS_PAGES")
    if (known := Path("/proc/meminfo")).is_file():
        fields = dict(line.split(":") for line in known.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = CGROUP / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()).isdecimal():
        fields = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # What files left in memory counts as used, and is given up when a program asks.
        used = int((CGROUP / "memory.current").read_text()) - int(fields["inactive_file"])
        total = min(total, int(most))
        free = min(free, total - used)
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY:
        free = min(free, allowed)
    return total, free


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`: its part, see `share`."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        free = memory()[1]
    return free // Sharing.processes


def share(processes: int) -> None:
    """So many processes work beside each other on this machine, this one among them."""
    Sharing.processes = processes


class Sharing:
    """How many processes have to get by with the memory that is free."""

    processes = 1


def give_back(device: torch.device) -> None:
    """Let go of what `device` keeps for later, after it ran out of memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the machine has run out of memory."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "DefaultCPUAllocator")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
