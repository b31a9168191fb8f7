"""What models are called with and what they return: tensors, sequences or dicts of them, and batches of a loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


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
