"""Which neurons each input channel of a consumer carries, read off a forward pass: a check of Torch-Pruning's mapping.

Every unit of removal has a code of constant weight: it is marked with NaN, in the output of each layer that makes it,
in half of the samples of a batch, in those that its code names. A consumer whose input carries NaN in just these
samples reads this unit and no other; the sum of two has more of them than either. Consumers pass finite values on, so
that marks end where neurons do. About ``2 log2(units)`` samples tell the whole network.

What is not transparent to NaN (comparisons, rounding) leaves no mark, which says nothing; so does a layer whose input
is not laid out by samples, as a second pass with one marked sample shows.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.network.calling import call, copied, input_of, mapped, without_hooks
from dnr_plugin.network.kinds import kind_of
from dnr_plugin.network.layer_kind import Consumer
from dnr_plugin.network.looking import transparent_norms


@dataclass(frozen=True)
class Mark:
    """Channels of a layer's output that make certain units.

    Attributes:
        channels: shape [K].
        units: numbers of the units that they make, shape [K].
    """

    channels: Tensor
    units: Tensor


def codes(count: int) -> Tensor:
    """``count`` codes of half of their length each, of which none holds another; bool, shape [count, length]."""
    length = 2
    while math.comb(length, length // 2) < count:
        length += 1
    table = torch.zeros(count, length, dtype=torch.bool)
    for row, chosen in zip(table, itertools.combinations(range(length), length // 2), strict=False):
        row[list(chosen)] = True
    return table


def read_marks(
    model: nn.Module, example_inputs: Any, marks: Mapping[str, Mark], table: Tensor, *, training: bool = False
) -> dict[str, Tensor | None] | None:
    """Marks the units of a network and reads which of the marks arrive where.

    Args:
        model: stays as it is; a copy of it runs, without hooks.
        example_inputs: of at least one sample, as Torch-Pruning takes them.
        marks: layer -> the units that its output channels make, numbered from 0.
        table: of `codes`, one for each unit at least.
        training: run in train mode, with norms and dropout handing on what they get.

    Returns:
        Consumer -> the samples of `codes` in which each of its input channels carries a mark; bool, shape
        [channels, length], or None where the input is not laid out by samples; without those that were not called.
        None altogether where the model fails on such inputs.
    """
    try:
        trial = copied(model)
    except Exception:  # a model that cannot be copied cannot be probed
        return None
    modules = dict(trial.named_modules())
    one_of_two = torch.tensor([[True, False]]).expand(len(table), 2)
    try:
        with without_hooks(trial), transparent_norms(trial, batch=training), torch.no_grad():
            trial.train(training)
            layout = _run(trial, modules, example_inputs, marks, one_of_two)
            read = _run(trial, modules, example_inputs, marks, table)
    except Exception:  # whatever NaN, or another number of samples, leads to in a model of someone's
        return None
    mixed = {name for name, seen in layout.items() if seen is None or bool(seen[:, 1].any())}
    return {name: None if name in mixed else seen for name, seen in read.items()}


def _run(
    model: nn.Module, modules: Mapping[str, nn.Module], example: Any, marks: Mapping[str, Mark], table: Tensor
) -> dict[str, Tensor | None]:
    samples, seen = table.shape[1], dict[str, Tensor | None]()

    def read(name: str, kind: Consumer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            a = input_of(args, kwargs)
            if a is not None:
                a = kind.batched(a)
                marked = kind.by_channel(a).isnan().any(2) if a.shape[0] % samples == 0 else None
                if marked is not None and len(marked) % samples == 0:
                    arrived = marked.view(samples, -1, marked.shape[1]).any(1).T
                    before = seen.get(name, torch.zeros_like(arrived))
                    seen[name] = None if before is None or before.shape != arrived.shape else before | arrived
                else:
                    seen[name] = None
            return _finite(args), {key: _finite(value) for key, value in kwargs.items()}

        return hook

    def mark(name: str) -> Any:
        channels, code = marks[name].channels, table[marks[name].units].T  # [samples, K]

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape[0] % samples:
                return output
            output = output.clone()
            by_channel = output.movedim(-1 if isinstance(module, nn.Linear) else 1, 1)
            mask = torch.zeros(samples, by_channel.shape[1], dtype=torch.bool)
            mask[:, channels] = code
            mask = mask.repeat_interleave(len(output) // samples, 0).to(output.device)
            by_channel.masked_fill_(mask.view(*mask.shape, *[1] * (by_channel.dim() - 2)), torch.nan)
            return output

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            kind = kind_of(module)
            if isinstance(kind, Consumer) and kind.consumes:
                handle = module.register_forward_pre_hook(read(name, kind), with_kwargs=True)
                hooks.callback(handle.remove)
            if name in marks:
                hooks.callback(module.register_forward_hook(mark(name)).remove)
        call(model, _samples(example, samples))
    return seen


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_finite, value))
    return value.nan_to_num(0.0) if isinstance(value, Tensor) and value.is_floating_point() else value


def _samples(inputs: Any, count: int) -> Any:
    """So many times the first sample of each tensor."""
    return mapped(lambda a: a[:1].expand(count, *a.shape[1:]).clone() if a.dim() else a, inputs)


def carriers(table: Tensor, marked: Tensor) -> Iterator[int | None]:
    """For each channel the unit whose code it carries, or None where it carries none, or several.

    Args:
        table: of `codes`.
        marked: bool, shape [channels, length].
    """
    known = {tuple(code): unit for unit, code in enumerate(table.tolist())} if len(marked) else {}
    for samples in marked.tolist():
        yield known.get(tuple(samples))
