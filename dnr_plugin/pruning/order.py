"""In which order the neurons of a network go: the scopes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dnr_plugin.network.cost import FlopReport
from dnr_plugin.network.dependencies import isomorphism_class
from dnr_plugin.pruning.cost_model import CostModel
from dnr_plugin.pruning.layers import Layer
from dnr_plugin.pruning.targets import Target

# Of what is saved against what is lost: 0 for "global", 1 for damage per FLOP; docs/criterion.md has the measurement.
_WEIGHT = 0.7
SCOPES = ("local", "global", "isomorphic", "cost_aware")
_WEIGHING = ("cost_aware",)  # the scopes that weigh a score against what the removal saves


@dataclass(frozen=True)
class Step:
    """One removal step: the next ``units`` of one part of a layer."""

    layer: int
    part: int
    units: tuple[int, ...]
    neurons: int
    key: tuple[float, ...]
    dead: bool


def layer_steps(index: int, layer: Layer, scores: Tensor, dead: Tensor) -> Iterator[Step]:
    """The removal steps of a layer: in each part of it the dead units first, then by score."""
    by_unit, unit_dead = layer.by_unit(scores).tolist(), layer.all_of(dead).tolist()
    for number, part in enumerate(layer.parts):
        order = sorted(part.units, key=lambda k: (not unit_dead[k], by_unit[k], k))
        start, highest = 0, -math.inf
        for portion in part.portions:
            units = tuple(order[start : start + portion])
            start += portion
            highest = max(highest, *(by_unit[k] for k in units))
            yield Step(index, number, units, len(layer.neurons(units)), (highest,), all(unit_dead[k] for k in units))


def savings_of(
    model: nn.Module, report: FlopReport, layers: Sequence[Layer], target: Target, scope: str
) -> list[list[float]]:
    """What a neuron of each part of each layer saves of what a target counts, as it weighs against its score: 1 for
    all in the scopes that do not ask."""
    if scope not in _WEIGHING:
        return [[1.0] * len(layer.parts) for layer in layers]
    savings, cost = [], CostModel(model, report)
    for layer in layers:
        each = layer.size / layer.units
        of_parts = []
        for part in layer.parts:
            flops, params = cost.saved({key: count / each for key, count in part.effect.items()})
            of_parts.append(max(target.saved(flops, params), 1e-9) ** _WEIGHT)
        savings.append(of_parts)
    return savings


def ordered(
    steps: Sequence[Step], layers: Sequence[Layer], scope: str, savings: Sequence[Sequence[float]]
) -> list[Step]:
    """All removal steps in the order in which they are taken; within a layer the given order is kept."""

    def group_of(step: Step) -> object:
        layer = layers[step.layer]
        return layer.name if scope == "local" else isomorphism_class(layer.group) if scope == "isomorphic" else None

    pools: dict[object, list[Step]] = {}
    for step in steps:
        pools.setdefault(group_of(step), []).append(step)
    keyed: list[tuple[tuple[bool, float, int], Step]] = []
    for pool in pools.values():
        pool.sort(key=lambda step: (not step.dead, step.key[0] / savings[step.layer][step.part], step.layer))
        members = {step.layer for step in pool}
        total = sum(layers[k].first for k in members)
        gone = sum(layers[k].first - layers[k].size for k in members)
        for step in pool:
            gone += step.neurons
            keyed.append(((not step.dead, gone / total, step.layer), step))
    keyed.sort(key=lambda pair: pair[0])
    return [step for _, step in keyed]
