"""What times of layers tell a plan: how many channels go at once, and the latency as they go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dnr_plugin.network.cost import FlopReport
from dnr_plugin.network.runtimes import RUNTIMES, Runtime
from dnr_plugin.pruning.groups import Prunable, Survey
from dnr_plugin.pruning.latency import LatencyModel
from dnr_plugin.pruning.latency_table import LatencyTable
from dnr_plugin.pruning.layers import Layer, Limits, layer_of
from dnr_plugin.pruning.order import TIMED_SCOPES
from dnr_plugin.pruning.targets import Target


@dataclass(frozen=True)
class Timing:
    """Attributes:
    layers: that may shrink, in portions that the hardware rounds to where that was asked.
    round_to: channels that they keep a multiple of, given or measured; None: any number.
    model: of the latency, where it is the target.
    """

    layers: list[Layer]
    round_to: int | None
    model: LatencyModel | None


def counts_time(scope: str, target: Target, limits: Limits) -> bool:
    """Whether a plan needs times of layers."""
    return target.timed or _measures_rounding(scope, limits)


def _measures_rounding(scope: str, limits: Limits) -> bool:
    return limits.round_to == "auto" or (scope in TIMED_SCOPES and limits.round_to is None)


def timing(
    survey: Survey,
    inputs: Any,
    prunable: Prunable,
    scope: str,
    target: Target,
    limits: Limits,
    report: FlopReport,
    table: LatencyTable | None,
    runtime: Runtime,
) -> Timing:
    """Measures layers where scope, target or limits ask for it.

    Args:
        survey: of the network as it is now; prunable: what may go; report: of its FLOPs.
        inputs: the batch that is timed.
        scope, target, limits, table: see `plan.plan_removal`.
        runtime: that the network is timed in.

    Raises:
        RunError: the machine is too noisy to tell.
    """
    given = limits.round_to if isinstance(limits.round_to, int) else None
    if not counts_time(scope, target, limits):
        return Timing(prunable.layers, given, None)
    ran_by = RUNTIMES[runtime.layers]
    if table is None:
        table = LatencyTable(ran_by.device(next(survey.model.parameters()).device))
    model = LatencyModel(
        survey.model, inputs, prunable.layers, report, table, runtime=ran_by.name, stairs_only=not target.timed
    )
    layers = prunable.layers
    if _measures_rounding(scope, limits):
        given = model.multiple
        limits = replace(limits, round_to=given)
        layers = [layer_of(layer.group, layer.name, layer.first, survey.names, limits) for layer in layers]
    return Timing(layers, given, model if target.timed else None)
