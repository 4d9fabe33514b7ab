"""Which device, which dtype, how much memory: the only file that names an accelerator."""

import contextlib
import resource
import sys

import torch

from vggt_cli.errors import InputError


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


def exact_convolutions() -> contextlib.AbstractContextManager[None]:
    """The context in which float32 convolutions are float32, and the same on every run.

    CUDA devices otherwise round their factors to ten bits, which the heads do not bear.
    """
    context: contextlib.AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False
    )
    return context


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the machine has run out of memory."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "DefaultCPUAllocator")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
