"""The machine that a run or a benchmark uses, and how to name it."""

from __future__ import annotations

import platform

import torch
from torch import nn

from .errors import InputError


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


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device, on a GPU in the memory layout its convolutions are fast in."""
    if device.type == "cuda":
        return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    return model.to(device)


def device_name(device: torch.device) -> str:
    """The device in words, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """Of Python and the packages that decide a run's figures."""
    from importlib.metadata import version

    names = ("dnr_plugin", "torch", "torchvision", "torch-pruning", "fvcore", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
