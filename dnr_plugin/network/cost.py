"""What a network costs: fvcore's FLOPs, parameters, latency.

fvcore counts one multiply-add as one FLOP; every number of FLOPs in this package does so too.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError
from dnr_plugin.network.calling import (
    call_as_it_is,
    eager,
    in_eval,
    is_compiled,
    kept_modes,
    one_sample,
    tensors,
    uncompiled,
)
from dnr_plugin.network.flop_handles import FLOP_HANDLES, multiplies_matrices, noting_scripted
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
    unsupported_ops: operators that were not counted, with how often they ran.
    uncalled: modules that the forward pass did not reach.
    """

    params: int
    flops: int
    layers: list[LayerCost]
    unsupported_ops: dict[str, int] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)

    @property
    def uncounted_products(self) -> dict[str, int]:
        """Those of ``unsupported_ops`` that multiply matrices, or may: the FLOPs lack what they cost.

        The others work element by element, which fvcore leaves out for the most part.
        """
        return {name: times for name, times in self.unsupported_ops.items() if multiplies_matrices(name)}


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

    Where fvcore has no count for an operator that multiplies matrices, `flop_handles` has one.

    Args:
        model: any network; its modes and BatchNorm statistics are left as they are.
        example_inputs: a tensor, a sequence or a dict of tensors; only the first sample is used.

    Returns:
        Counts, with the operators that are not in them.

    Raises:
        InputError: the model or a part of it was scripted, traced or exported, or is quantised.
    """
    from fvcore.nn import FlopCountAnalysis

    model = eager(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"model: expected modules as they were written, found {name}, which was scripted or traced, so that "
                "its FLOPs cannot be counted: replace it by the module that it was made from"
            )
    inputs, prefix, counted = one_sample(example_inputs), "", model
    if isinstance(inputs, dict):
        counted, prefix = _Keywords(model, list(inputs)), "model"
        inputs = tuple(inputs.values())
    elif isinstance(inputs, list):
        inputs = tuple(inputs)
    with kept_modes(model), uncompiled(), torch.enable_grad(), _traceable(model):
        counted.eval()
        analysis = FlopCountAnalysis(counted, inputs)
        scripted: Counter[str] = Counter()
        analysis.set_op_handle(**FLOP_HANDLES, **{"prim::CallFunction": noting_scripted(scripted)})
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        by_module: Counter[str] = analysis.by_module()
        of_shapes: set[str] = getattr(analysis, "_ignored_ops", set())  # which cost nothing
        scripted = Counter({name: times for name, times in scripted.items() if name not in of_shapes})
        unsupported = {name: int(times) for name, times in sorted((analysis.unsupported_ops() + scripted).items())}
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


@contextlib.contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Lets a model run by operators that the JIT sees and that are counted.

    What `torch.compile` returned for a part of it runs as it was written; `nn.MultiheadAttention` keeps off its fast
    path, which is one operator.
    """
    compiled = {module: vars(module)["forward"] for module in model.modules() if is_compiled(module)}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module in compiled:  # not by setattr, which such a module hands on to what it wraps
        vars(module)["forward"] = module._orig_mod
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, forward in compiled.items():
            vars(module)["forward"] = forward


def latencies(models: list[nn.Module], inputs: Any, *, seconds: float = 2.0, warmup: int = 3) -> list[float]:
    """Median seconds of one forward pass of each model, in eval mode, measured in turn so that drift hits all alike.

    Args:
        models: on the device of the inputs; or what a `runtimes.Runtime` prepared.
        inputs: one batch.
        seconds: about how long to measure, all models together; at least 5 rounds are run.
        warmup: rounds not counted.
    """
    return [statistics.median(times) for times in forward_times(models, inputs, seconds=seconds, warmup=warmup)]


def forward_times(models: list[nn.Module], inputs: Any, *, seconds: float = 2.0, warmup: int = 3) -> list[list[float]]:
    """Seconds of every round of a forward pass of each model, `steadied`; see `latencies`."""
    device = next(tensors(inputs)).device

    def run(model: nn.Module) -> None:
        call_as_it_is(model, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad(), contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(in_eval(model))
        return steadied(timed_in_turn([partial(run, model) for model in models], seconds=seconds, warmup=warmup))


def ratio_quartiles(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of ``after / before``, round by round, of times made in turn."""
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def steadied(rounds: Sequence[Sequence[float]]) -> list[list[float]]:
    """Times of calls made in turn, each round scaled to last as long as the median round.

    A machine that is slowed down for a while is so for all calls of a round.

    Args:
        rounds: seconds of every round of each call.
    """
    totals = [sum(times) for times in zip(*rounds, strict=True)]
    middle = statistics.median(totals)
    return [[seconds * middle / total for seconds, total in zip(times, totals, strict=True)] for times in rounds]


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
