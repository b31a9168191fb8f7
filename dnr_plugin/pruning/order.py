"""In which order the neurons of a network go: the scopes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from dnr_plugin.network.dependencies import isomorphism_class
from dnr_plugin.pruning.cost_model import CostModel
from dnr_plugin.pruning.latency import LatencyModel
from dnr_plugin.pruning.layers import Layer, Part
from dnr_plugin.pruning.targets import Target

# Of what is saved against what is lost: 0 for "global", 1 for damage per FLOP; docs/criterion.md has the measurement.
_WEIGHT = 0.7
COUNTED_SCOPES = ("local", "global", "isomorphic", "cost_aware")
TIMED_SCOPES = ("latency_aware",)  # which need times of layers, and with these a target of latency
SCOPES = (*COUNTED_SCOPES, *TIMED_SCOPES)


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


@dataclass(frozen=True)
class Costs:
    """What removal saves, by count and where a scope asks for it by time; of the network as it is now."""

    counted: CostModel
    timed: LatencyModel | None = None


def savings_of(steps: Sequence[Step], layers: Sequence[Layer], target: Target, scope: str, costs: Costs) -> list[float]:
    """What a neuron of each removal step saves, as it weighs against its score: 1 for all in the scopes that do not
    ask."""
    if scope == "cost_aware":
        of_parts = {
            (number, k): _counted_saving(layer, part, target, costs.counted)
            for number, layer in enumerate(layers)
            for k, part in enumerate(layer.parts)
        }
        savings = [of_parts[step.layer, step.part] for step in steps]
    elif scope == "latency_aware":
        assert costs.timed is not None
        savings = _timed_savings(steps, layers, costs.timed)
    else:
        return [1.0] * len(steps)
    return [max(saving, 1e-9) ** _WEIGHT for saving in savings]


def _counted_saving(layer: Layer, part: Part, target: Target, cost: CostModel) -> float:
    each = layer.size / layer.units
    return target.saved(*cost.saved({key: count / each for key, count in part.effect.items()}))


def _timed_savings(steps: Sequence[Step], layers: Sequence[Layer], model: LatencyModel) -> list[float]:
    """Shares of the latency that a neuron of each step saves, while other layers are as wide as now.

    Time is a staircase, so that a step is counted together with those up to the next stair: within a part savings are
    the slopes of the concave hull of what its steps save, and never grow.
    """
    savings = [0.0] * len(steps)
    of_parts: dict[tuple[int, int], list[int]] = {}
    for index, step in enumerate(steps):
        of_parts.setdefault((step.layer, step.part), []).append(index)
    for (number, k), indices in of_parts.items():
        effect = layers[number].parts[k].effect
        blocks: list[tuple[list[int], float, int]] = []  # steps, what they save, their neurons
        for index in indices:
            step = steps[index]
            saved = model.remove({key: count * len(step.units) for key, count in effect.items()})
            block = ([index], saved, step.neurons)
            while blocks and blocks[-1][1] * block[2] <= block[1] * blocks[-1][2]:
                before = blocks.pop()
                block = (before[0] + block[0], before[1] + block[1], before[2] + block[2])
            blocks.append(block)
        units = sum(len(steps[index].units) for index in indices)
        model.remove({key: -count * units for key, count in effect.items()})
        for members, saved, neurons in blocks:
            for index in members:
                savings[index] = saved / neurons
    return savings


def ordered(steps: Sequence[Step], layers: Sequence[Layer], scope: str, savings: Sequence[float]) -> list[Step]:
    """All removal steps in the order in which they are taken; within a layer the given order is kept.

    By score for savings this is the greedy solution of a knapsack: among all ways to save as much it loses at most the
    score of the one step that it takes beyond the target, as far as scores and savings add up.

    Args:
        steps: of all layers, those of a part one after the other.
        layers: that they are of.
        scope: one of `SCOPES`.
        savings: of each step (`savings_of`).
    """

    def group_of(step: Step) -> object:
        layer = layers[step.layer]
        return layer.name if scope == "local" else isomorphism_class(layer.group) if scope == "isomorphic" else None

    pools: dict[object, list[tuple[Step, float]]] = {}
    for step, saving in zip(steps, savings, strict=True):
        pools.setdefault(group_of(step), []).append((step, step.key[0] / saving))
    keyed: list[tuple[tuple[bool, float, int], Step]] = []
    for pool in pools.values():
        pool.sort(key=lambda pair: (not pair[0].dead, pair[1], pair[0].layer))
        members = {step.layer for step, _ in pool}
        total = sum(layers[k].first for k in members)
        gone = sum(layers[k].first - layers[k].size for k in members)
        for step, _ in pool:
            gone += step.neurons
            keyed.append(((not step.dead, gone / total, step.layer), step))
    keyed.sort(key=lambda pair: pair[0])
    return [step for _, step in keyed]
