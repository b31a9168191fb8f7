"""What a network costs: fvcore's FLOPs, parameters, latency.

fvcore counts one multiply-add as one FLOP; every number of FLOPs in this package does so too.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.network.calling import call_as_it_is, eager, kept_modes, one_sample, uncompiled
from dnr_plugin.network.kinds import kind_of


@dataclass(frozen=True)
class LayerCost:
    """One module that holds parameters or costs FLOPs of its own.

    Attributes:
        name: dotted name in the model.
        type: class name.
        in_channels, out_channels: 0 where the module has none.
        params: its own parameters, but for those that a layer before it owns as well.
        flops: its own FLOPs for one sample.
    """

    name: str
    type: str
    in_channels: int
    out_channels: int
    params: int
    flops: int


@dataclass(frozen=True)
class FlopReport:
    """Attributes:
    params: of the whole model, shared ones once.
    flops: of the whole model for one sample.
    layers: modules with a cost of their own, in the model's order.
    unsupported_ops: operators that fvcore did not count, with how often they ran.
    uncalled: modules that the forward pass did not reach.
    """

    params: int
    flops: int
    layers: list[LayerCost]
    unsupported_ops: dict[str, int] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)


class _Keywords(nn.Module):
    """Lets fvcore, which calls by position, call a model by keyword."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Any) -> Any:
        return self.model(**dict(zip(self.names, values, strict=True)))


def count_params(model: nn.Module) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flop_report(model: nn.Module, example_inputs: Any) -> FlopReport:
    """FLOPs and parameters per layer, by fvcore, for one sample in eval mode.

    Args:
        model: any network; its modes and BatchNorm statistics are left as they are.
        example_inputs: a tensor, a sequence or a dict of tensors; only the first sample is used.

    Returns:
        Counts, with the operators that fvcore has no count for.
    """
    from fvcore.nn import FlopCountAnalysis

    model = eager(model)
    inputs, prefix, counted = one_sample(example_inputs), "", model
    if isinstance(inputs, dict):
        counted, prefix = _Keywords(model, list(inputs)), "model"
        inputs = tuple(inputs.values())
    elif isinstance(inputs, list):
        inputs = tuple(inputs)
    # without gradients attention takes a fused path that nobody counts
    with kept_modes(model), uncompiled(), torch.enable_grad():
        counted.eval()
        analysis = FlopCountAnalysis(counted, inputs)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        by_module: Counter[str] = analysis.by_module()
        unsupported = {name: int(times) for name, times in sorted(analysis.unsupported_ops().items())}
        uncalled = sorted(analysis.uncalled_modules())

    def name_in_trace(name: str) -> str:
        return ".".join(part for part in (prefix, name) if part)

    layers = []
    seen: set[Tensor] = set()
    for name, module in model.named_modules():
        children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        flops = int(by_module[name_in_trace(name)] - sum(by_module[name_in_trace(child)] for child in children))
        own = set(module.parameters(recurse=False)) - seen
        seen |= own
        params = sum(parameter.numel() for parameter in own)
        if flops or params:
            layers.append(LayerCost(name, type(module).__name__, *kind_of(module).channels, params, flops))
    dropped = len(prefix) + 1 if prefix else 0
    uncalled = [name[dropped:] for name in uncalled if name[dropped:]]
    return FlopReport(count_params(model), int(by_module[""]), layers, unsupported, uncalled)


def _attention_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Multiply-adds of scores and of what they weigh: [..., L, E] x [..., E, S], then [..., L, S] x [..., S, V]."""
    from fvcore.nn.jit_handles import get_shape

    query, key, value = (get_shape(values) for values in inputs[:3])
    assert query is not None and key is not None and value is not None
    return Counter({"scaled_dot_product_attention": math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])})


def latencies(models: list[nn.Module], inputs: Any, *, seconds: float = 2.0, warmup: int = 3) -> list[float]:
    """Median seconds of one forward pass of each model, in eval mode, measured in turn so that drift hits all alike.

    Args:
        models: on the device of the inputs.
        inputs: one batch.
        seconds: about how long to measure, all models together; at least 5 rounds are run.
        warmup: rounds not counted.
    """
    device = next(models[0].parameters()).device

    def run(model: nn.Module) -> None:
        call_as_it_is(model, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad(), contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(kept_modes(model))
            model.eval()
        times = timed_in_turn([partial(run, model) for model in models], seconds=seconds, warmup=warmup)
    return [statistics.median(measured) for measured in times]


def timed_in_turn(calls: Sequence[Callable[[], object]], *, seconds: float = 2.0, warmup: int = 3) -> list[list[float]]:
    """Seconds of every round of each call, made in turn so that drift hits all alike.

    Args:
        calls: what to time; each ends when its work is done.
        seconds: about how long to measure, all calls together; at least 5 rounds are run.
        warmup: rounds not counted.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in [*calls] * warmup:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, measured in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            measured.append(time.perf_counter() - start)
    return times
