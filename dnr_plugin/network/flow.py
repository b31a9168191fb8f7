"""What becomes of a layer's outputs on their way: a BatchNorm, a sum with something else, a ReLU.

Read off a run of the model, so that modules, functions and operators count alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dnr_plugin.network.calling import Pausable, call, in_eval, module_names, tensors
from dnr_plugin.network.kinds import has_weights, is_batchnorm

_ADD = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_RELU = {"relu", "relu_"}


@dataclass(frozen=True)
class Site:
    """Where a consumer's outputs first matter.

    Attributes:
        norm: name of the BatchNorm behind it, or None.
        sum: number of the call (`Calls`) that adds them to what was computed before; None where none does.
        other: number of the call that computed what they are added to; None like ``sum``.
        rectified: whether a ReLU follows, and nothing else reads them.
        reader: name of the consumer that alone reads what the ReLU gives; None where others do, or a sum comes first.
        size: values that the layer gives for one sample.
    """

    norm: str | None = None
    sum: int | None = None
    other: int | None = None
    rectified: bool = False
    reader: str | None = None
    size: int = 0


class Calls(Pausable, TorchFunctionMode):
    """Numbers the calls of torch's functions while it is open, and hands on the results of some.

    A model numbers its calls alike in every run, also once it is narrower. Calls while this is `paused`, as by hooks,
    have no number.

    Args:
        wanted: number of a call -> what to do with its result.
    """

    def __init__(self, wanted: Mapping[int, Callable[[Tensor], None]]) -> None:
        super().__init__()
        self.wanted = wanted
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            self.seen(func, args, kwargs or {}, result)
            self.count += 1
        return result

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Called for each call, which has the number ``count``."""
        if self.count in self.wanted:
            with self.paused():
                self.wanted[self.count](result)


class _Value:
    """A tensor that still is some consumer's output, perhaps behind a BatchNorm or a sum.

    Attributes:
        readers: functions that read it, and "return" where the model returns it.
        norm: name of a BatchNorm that reads it, with its result; None where none does.
        sum: a call that adds to it what another call gave before, with its result; None where none does.
        rectified: what the ReLU that reads it gives; None where none does.
        layer: name of the last consumer that read it, or None.
    """

    def __init__(self, tensor: Tensor, consumer: str, passed: bool = False) -> None:
        self.tensor = weakref.ref(tensor)
        self.consumer, self.passed = consumer, passed
        self.readers: list[str] = []
        self.norm: tuple[str, _Value] | None = None
        self.sum: tuple[int, int, _Value] | None = None
        self.rectified: _Value | None = None
        self.layer: str | None = None

    def site(self, size: int) -> Site:
        """Of the consumer whose outputs these are: what alone reads them, step by step."""
        value, norm, total, other = self, None, None, None
        if value.norm is not None and len(value.readers) == 1:
            norm, value = value.norm
        if value.sum is not None and len(value.readers) == 1:
            total, other, value = value.sum
        rectified = len(value.readers) == 1 and value.readers[0] in _RELU
        after = value.rectified if rectified and total is None else None
        reader = after.layer if after is not None and len(after.readers) == 1 else None
        return Site(norm, total, other, rectified, reader, size)


class _Trace(Calls):
    def __init__(self) -> None:
        super().__init__({})
        self.values: dict[int, _Value] = {}
        self.made: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.started: dict[str, int] = {}
        self.first: dict[str, _Value] = {}

    def value(self, tensor: Any) -> _Value | None:
        known = self.values.get(id(tensor))
        return known if known is not None and known.tensor() is tensor else None

    def follow(self, tensor: Tensor, consumer: str, passed: bool = False) -> _Value:
        self.values[id(tensor)] = value = _Value(tensor, consumer, passed)
        return value

    def read(self, values: Any, reader: str) -> None:
        for value in filter(None, map(self.value, tensors(values))):
            value.readers.append(reader)

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = getattr(func, "__name__", "")
        if next(tensors(result), None) is not None:  # not for its shape alone
            self.read([*args, kwargs], name)
        if not isinstance(result, Tensor):
            return
        rectified = self.value(args[0]) if name in _RELU and args else None
        if name in _ADD and not kwargs and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
            self.add(args, result)
        elif rectified is not None:
            rectified.rectified = self.follow(result, rectified.consumer, passed=True)
        elif id(result) in self.values:  # changed in place: no longer what the layer gave
            del self.values[id(result)]
        self.made[id(result)] = weakref.ref(result), self.count

    def add(self, operands: tuple[Any, ...], result: Tensor) -> None:
        """The layer that ran last of those that are added makes up for the sum."""
        values = [(value, k) for k, value in enumerate(map(self.value, operands)) if value and not value.passed]
        if not values or operands[0].shape != operands[1].shape:
            self.values.pop(id(result), None)
            return
        value, index = max(values, key=lambda pair: self.started[pair[0].consumer])
        other = operands[1 - index]
        reference, number = self.made.get(id(other), (None, -1))
        if reference is None or reference() is not other or number >= self.started[value.consumer]:
            self.values.pop(id(result), None)
            return
        value.sum = self.count, number, self.follow(result, value.consumer, passed=True)


def trace_sites(model: nn.Module, inputs: Any) -> dict[str, Site]:
    """Where the outputs of each consumer of a model first matter, by the consumer's name, in the order they run.

    Layers that run more than once are left out.

    Args:
        model: in any mode; run once in eval mode.
        inputs: as Torch-Pruning takes them.
    """
    names = module_names(model)
    trace = _Trace()
    again: set[str] = set()
    sizes: dict[str, int] = {}
    handles = []

    def before(module: nn.Module, args: Any) -> None:
        name = names[module]
        value = trace.value(args[0]) if args else None
        if value is not None:
            value.layer = name
        if name in trace.started:
            again.add(name)
        trace.started[name] = trace.count

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            trace.first[names[module]] = trace.follow(output, names[module])
            with trace.paused():
                sizes[names[module]] = output.numel() // max(len(output), 1)

    def normed(module: nn.Module, args: Any, output: Any) -> None:
        value = trace.value(args[0]) if args else None
        if value is not None and not value.passed and value is trace.first[value.consumer]:
            value.norm = names[module], trace.follow(output, value.consumer)

    for module in names:
        if has_weights(module):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        elif is_batchnorm(module):
            handles.append(module.register_forward_hook(normed))
    with in_eval(model, handles), torch.no_grad(), trace:
        outputs = call(model, inputs)
        with trace.paused():
            trace.read(outputs, "return")
    return {
        name: trace.first[name].site(sizes[name]) if name in trace.first else Site()
        for name in trace.started
        if name not in again
    }
