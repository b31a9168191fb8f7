"""How models are called: their inputs, outputs, modes and names; what looks on meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restores each module's train or eval mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def eval_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Every tensor that a model returns in eval mode, as copies, without gradients; modes are restored."""
    with kept_modes(model), torch.no_grad():
        model.eval()
        return [out.clone() for out in tensors(call(model, inputs))]


def call(model: nn.Module, inputs: Any) -> Any:
    """Calls a model with a tensor, a sequence of tensors or a dict of them."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)


def one_sample(inputs: Any) -> Any:
    """The first sample of a tensor, or of each tensor in a sequence or dict."""
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, dict):
        return {key: one_sample(value) for key, value in inputs.items()}
    return type(inputs)(one_sample(value) for value in inputs) if isinstance(inputs, list | tuple) else inputs


def batch_inputs(batch: Any) -> Any:
    """The model's inputs of a batch: the batch itself, or the first element of an (input, target) pair."""
    return batch[0] if isinstance(batch, Sequence) and not isinstance(batch, str) else batch


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a model's output, in order, through sequences, named tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


# Where a DataParallel, DistributedDataParallel or compiled model keeps the network it wraps.
_WRAPPED = ("module", "_orig_mod")


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Name of each module below a model's wrappers, so that a wrapped model and the bare one agree on names."""
    while [name for name, _ in model.named_children()] in [[name] for name in _WRAPPED]:
        (_, model), *_ = model.named_children()
    return {module: name for name, module in model.named_modules()}


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a consumer is called on: its first argument, by position or name; None where that is no float tensor."""
    a = args[0] if args else kwargs.get("input", kwargs.get("query"))
    return a if isinstance(a, Tensor) and a.is_floating_point() else None


class Pausable:
    """What looks on while a model is called, and can look away."""

    _paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Lets things be called without being noticed."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


def output_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Largest difference of outputs.

    Args:
        before, after: tensors of a model's output, in order, of the same shapes.

    Returns:
        The largest absolute difference, and the same relative to the largest absolute output before; both >= 0.
    """
    absolute = max(float((a.double() - b.double()).abs().max()) for a, b in zip(before, after, strict=True))
    largest = max(float(a.double().abs().max()) for a in before)
    return absolute, absolute / largest if largest > 0 else absolute
