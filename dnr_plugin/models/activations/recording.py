"""Finds the activations of a network, modules and function calls, by running it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dnr_plugin.errors import InputError, first_line
from dnr_plugin.models.activations.choice import (
    ATTENTION,
    HIDDEN,
    HIDDEN_TYPES,
    OTHER,
    OTHER_TYPES,
    Activation,
    is_clamp_from_zero,
)
from dnr_plugin.network.calling import call, kept_modes, tensors


def left_activations(
    model: nn.Module, example: Any, activation: str | None = None, negative_slope: float = 0.01
) -> list[str]:
    """Every activation of a network but the chosen one, such as ``features.1.block.1.fc1 (Sigmoid)``, each place once.

    Modules of PyTorch by their type, called or not; calls of functions by the function's name and the module that makes
    them, as far as the model makes them on the example in eval mode. Attention counts as softmax, ``clamp`` from 0 on
    as an activation. What a scripted module computes cannot be seen, and the line says so.

    Args:
        model: any network; its modes and the random state stay.
        example: a tensor, a sequence of tensors or a dict of them.
        activation: the one that is not listed; None lists all.
        negative_slope: of leaky_relu; one of another slope is listed.

    Raises:
        InputError: the model fails on the example.
    """
    chosen = None if activation is None else Activation(activation, negative_slope)
    return _left(model, record(model, example), chosen)


def _left(model: nn.Module, recorded: list[ActivationCall], chosen: Activation | None) -> list[str]:
    left: dict[str, None] = {}
    calls: dict[str, list[ActivationCall]] = {}
    for seen in recorded:
        calls.setdefault(seen.name, []).append(seen)
    for name, module in model.named_modules():
        shown = name or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            left[f"{shown} (scripted, cannot be seen)"] = None
        elif isinstance(module, (*HIDDEN_TYPES, *OTHER_TYPES)):
            if chosen is None or not chosen.is_module(module):
                left[f"{shown} ({type(module).__name__})"] = None
        else:
            for seen in calls.get(name, []):
                if chosen is None or not seen.computes(chosen):
                    left[f"{shown} ({seen.function})"] = None
    return list(left)


def activation_summary(model: nn.Module, example: Any) -> dict[str, Any]:
    """The activations of a model that `build.build_model` or `rebuild` made, for a run's report.

    Returns:
        ``name``: the chosen activation, or None where none was chosen; ``negative_slope`` of leaky_relu; ``places``:
        how many modules are it or call it; ``left``: see `left_activations`, all of them where none was chosen.
    """
    builder = getattr(model, "dnr_builder", {"name": ":", "kwargs": {}})
    spec = builder.get("activation")
    if spec is None and not any(mark in builder["name"] for mark in ".:"):  # a network of this package
        kwargs = builder["kwargs"]
        spec = {"name": kwargs.get("activation", "relu"), "negative_slope": kwargs.get("negative_slope", 0.01)}
    calls = record(model, example)
    if spec is None:
        return {"name": None, "places": 0, "left": _left(model, calls, None)}
    chosen = Activation(spec["name"], spec.get("negative_slope", 0.01))
    names = {name for name, module in model.named_modules() if chosen.is_module(module)}
    names |= {seen.name for seen in calls if seen.computes(chosen)}
    return {**chosen.spec(), "places": len(names), "left": _left(model, calls, chosen)}


class ActivationMode(TorchFunctionMode):
    """Hands each call of an activation function to `activation`, and runs every other function as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._shifted: Callable[[], Tensor | None] = lambda: None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        full = getattr(func, "__name__", "").partition(".")[0]  # "relu.default" of the aten operators
        name = full.removesuffix("_")
        if name == "hardtanh" and kwargs.get("min_val") == 0:
            name = "relu6"  # what nn.ReLU6 calls
        if name in HIDDEN or name in OTHER or name in ATTENTION or is_clamp_from_zero(name, args, kwargs):
            x = args[0] if args else kwargs.get("input")
            gate = name == "relu6" and x is self._shifted()
            in_place = full.endswith("_") or bool(kwargs.get("inplace"))
            return self.activation(func, name, args, kwargs, gate, in_place)
        out = func(*args, **kwargs)
        if name == "add" and isinstance(out, Tensor) and any(type(a) in (int, float) and a == 3 for a in args):
            self._shifted = weakref.ref(out)
        return out

    def activation(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], gate: bool, in_place: bool
    ) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class ActivationCall:
    """A call of an activation function: by which module, and whether it computes the gate of a hard sigmoid."""

    name: str
    module: nn.Module
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gate: bool

    @property
    def hidden(self) -> bool:
        return self.function in HIDDEN and not self.gate

    def computes(self, chosen: Activation) -> bool:
        return not self.gate and chosen.is_call(self.function, self.args, self.kwargs)


class _Recorder(ActivationMode):
    def __init__(self, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.stack, self.calls = stack, list[ActivationCall]()

    def activation(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], gate: bool, in_place: bool
    ) -> Any:
        plain = tuple(value for value in args[1:] if not isinstance(value, Tensor))
        shown = "softmax" if name in ATTENTION else name
        numbers = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
        self.calls.append(ActivationCall(*self.stack[-1], shown, (None, *plain), numbers, gate))
        return func(*args, **kwargs)


def record(model: nn.Module, example: Any, train: bool = False) -> list[ActivationCall]:
    """The calls of activation functions in a forward pass in eval mode, and in training mode where that is asked for.

    Raises:
        InputError: the model fails in eval mode.
    """
    stack: list[tuple[str, nn.Module]] = [("", model)]
    recorder = _Recorder(stack)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            stack.append((name, module))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with untouched(model):
            with recorder:
                run_outputs(model, example)
            if train:
                # two images, since BatchNorm does not train on one; a network that fails here was seen in eval mode
                with contextlib.suppress(Exception), recorder:
                    call(model.train(), _copied(example, 2))
    finally:
        for handle in handles:
            handle.remove()
    return recorder.calls


def run_outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """The outputs in eval mode."""
    try:
        return list(tensors(call(model.eval(), _copied(example))))
    except Exception as error:  # whatever the network raises on the example
        raise InputError(
            f"model.activation: expected a network that runs on the example, found {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """No gradients; modes, buffers and random states are as before afterwards."""
    buffers = [
        (module, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with kept_modes(model), torch.no_grad(), torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, key, buffer, before in buffers:
                module._buffers[key] = buffer.copy_(before)


def _copied(value: Any, times: int = 1) -> Any:
    """Copies of the inputs, side by side along the first dimension: what works in place may write to them."""
    if isinstance(value, Tensor):
        return torch.cat([value] * times) if value.dim() else value.clone()
    if isinstance(value, dict):
        return {key: _copied(item, times) for key, item in value.items()}
    return [_copied(item, times) for item in value] if isinstance(value, list | tuple) else value
