"""The machine that a run or a benchmark uses, and how to name it."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from pathlib import Path

import torch
from torch import nn

from dnr_plugin.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        InputError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: expected auto or cpu, since torch finds no CUDA device, found cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def fast_layout(device: torch.device) -> torch.memory_format:
    """The memory layout that convolutions are fast in: channels last on a GPU, and on a CPU that has AVX-512.

    Without it channels last gains little, and oneDNN (of torch 2.14) writes beyond its memory there: the backward pass
    of a strided 1x1 convolution in float32 ends the process.
    """
    wide = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.channels_last if wide else torch.contiguous_format


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device, on a GPU in the memory layout its convolutions are fast in."""
    if device.type == "cuda":
        return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    return model.to(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a CPU with instructions that multiply bfloat16, as torch (from 2.6 on) tells."""
    supported = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return device.type == "cpu" and any(ask() for ask in supported if ask is not None)


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory() -> int:
    """Bytes of main memory; 2^63 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 2**63


_memory_kept = False


def keep_memory() -> bool:
    """Lets the C library keep what tensors free for the next ones, for the rest of this process.

    By default glibc gives results of more than 32 MB back to the system, and what lies at the end of its heap; new
    memory is cleared first, which may take longer than the layer that writes to it, or not, as the heap happens to lie.

    Returns:
        Whether it does now: not where it is not glibc, or where the environment says how memory is handled.
    """
    global _memory_kept
    if not _memory_kept and not _allocator_settings():
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError, TypeError):  # another C library
            return False
        # M_MMAP_MAX, M_TRIM_THRESHOLD (never), M_TOP_PAD
        _memory_kept = all([mallopt(-4, 0), mallopt(-1, -1), mallopt(-2, 2**26)])
    return _memory_kept


def _allocator_settings() -> str:
    """What the environment has to say about how memory is handled."""
    own = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"}
    libraries = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()  # perhaps another allocator
    if libraries:
        own["LD_PRELOAD"] = " ".join(Path(library).name for library in libraries)
    return ", ".join(f"{name}={own[name]}" for name in sorted(own))


def check_memory(needed: float, field: str, what: str) -> None:
    """Refuses what does not fit into main memory, before it is made.

    Args:
        needed: bytes.
        field: of the recipe.
        what: needs them, in words.
    """
    if needed > memory():
        raise InputError(
            f"{field}: expected what fits into the memory of {memory() / 2**30:.0f} GiB, found {what}, which take "
            f"{needed / 2**30:.0f} GiB"
        )


def device_name(device: torch.device) -> str:
    """The device in words, for reports: of a CPU also its vector units, since rounding differs between them, and
    what its speed depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    units = torch.backends.cpu.get_cpu_capability()
    kept = "memory kept" if _memory_kept else _allocator_settings()
    parts = [_processor(), units, f"{torch.get_num_threads()} threads", *([kept] if kept else [])]
    return f"CPU ({', '.join(parts)})"


def _processor() -> str:
    """The processor's name, or its kind where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Of Python and the packages that decide a run's figures."""
    from importlib.metadata import version

    names = ("dnr_plugin", "torch", "torchvision", "torch-pruning", "fvcore", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def ranks() -> int:
    """How many processes train together; 1 where there is no process group."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
