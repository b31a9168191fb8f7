"""What a removal is asked to reach, and how it is measured against the dense model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dnr_plugin.errors import TargetError
from dnr_plugin.network.cost import FlopReport, flop_report
from dnr_plugin.pruning.groups import Limits, prunable_layers

KEPT_TARGETS = ("flops", "params", "latency")
REMOVED_TARGETS = ("neuron_sparsity", "weight_sparsity")
TARGETS = (*KEPT_TARGETS, *REMOVED_TARGETS, "dead")


@dataclass(frozen=True)
class Baseline:
    """The dense model that targets refer to, also when removal goes on in later steps."""

    report: FlopReport
    neurons: int
    sizes: Mapping[str, int]
    model: nn.Module | None = None


def baseline(model: nn.Module, example_inputs: Any, *, keep_model: bool = False) -> Baseline:
    """Measures the dense model.

    Args:
        model: before anything is removed.
        example_inputs: as Torch-Pruning takes them.
        keep_model: keep a copy, which a latency target is measured against.
    """
    layers, _, neurons = prunable_layers(model, example_inputs, Limits(), {})
    kept = copy.deepcopy(model) if keep_model else None
    return Baseline(flop_report(model, example_inputs), neurons, {layer.name: layer.size for layer in layers}, kept)


def measure(kind: str, flops: float, params: float, neurons: int, dense: Baseline) -> float:
    """The measure of a target for a model of so many FLOPs, parameters and hidden neurons; "dead" counts neurons."""
    if kind == "flops":
        return flops / dense.report.flops
    if kind == "params":
        return params / dense.report.params
    if kind == "weight_sparsity":
        return 1.0 - params / dense.report.params
    return 1.0 - neurons / dense.neurons


def reached(kind: str, achieved: float, requested: float) -> bool:
    """Whether a measure meets the target."""
    return achieved <= requested + 1e-9 if kind in KEPT_TARGETS else achieved >= requested - 1e-9


def unreachable_error(kind: str, closest: float, requested: float) -> TargetError:
    return TargetError(f"{kind}: {requested:g} was asked, {closest:.4f} is the closest that can be reached", closest)
