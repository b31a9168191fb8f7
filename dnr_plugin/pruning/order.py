"""In which order the neurons of a network go: the scopes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dnr_plugin.network.cost import FlopReport
from dnr_plugin.network.dependencies import isomorphism_class
from dnr_plugin.pruning.cost_model import CostModel
from dnr_plugin.pruning.groups import Layer
from dnr_plugin.pruning.targets import Target

# Of what is saved against what is lost: 0 for "global", 1 for damage per FLOP; docs/criterion.md has the measurement.
_WEIGHT = 0.7
SCOPES = ("local", "global", "isomorphic", "cost_aware")


@dataclass(frozen=True)
class Step:
    """One removal step: the next ``offsets`` of a layer, in every block.

    Attributes:
        layer: its index among the layers considered.
        offsets: within a block, lowest score first.
        key: by which steps are ordered: the highest score of this step and those before it in the layer.
        dead: whether all its neurons are dead.
    """

    layer: int
    offsets: tuple[int, ...]
    key: tuple[float, ...]
    dead: bool


def layer_steps(index: int, layer: Layer, scores: Tensor, dead: Tensor) -> Iterator[Step]:
    """The removal steps of one layer, in order: dead neurons first, then by score.

    Args:
        index: of the layer among those considered.
        layer: with its portions, one a step.
        scores: of its neurons, shape [size]; averaged over blocks.
        dead: bool, shape [size]; an offset is dead where it is so in every block.
    """
    by_offset = scores.detach().cpu().double().view(layer.blocks, -1).mean(0)
    offset_dead = dead.view(layer.blocks, -1).all(0)
    order = sorted(range(len(by_offset)), key=lambda k: (not offset_dead[k], float(by_offset[k]), k))
    start, highest = 0, -math.inf
    for portion in layer.portions:
        offsets = tuple(order[start : start + portion])
        start += portion
        highest = max(highest, *(float(by_offset[k]) for k in offsets))
        yield Step(index, offsets, (highest,), all(bool(offset_dead[k]) for k in offsets))


def savings_of(model: nn.Module, report: FlopReport, layers: Sequence[Layer], target: Target) -> list[float]:
    """What a neuron of each layer saves of what a target counts, as far as it weighs against its score.

    Args:
        model: the network as it is now.
        report: its `cost.flop_report`.
        layers: that may shrink.
        target: says what counts (`Target.saved`).

    Returns:
        For each layer what scores are divided by, > 0.
    """
    savings = []
    for layer in layers:
        cost = CostModel(model, report)
        before = cost.flops, cost.params
        cost.remove(layer.effect)
        saved = target.saved(before[0] - cost.flops, before[1] - cost.params)
        savings.append(max(saved, 1e-9) ** _WEIGHT)
    return savings


def ordered(steps: Sequence[Step], layers: Sequence[Layer], scope: str, savings: Sequence[float]) -> list[Step]:
    """All removal steps in the order in which they are taken; within a layer the given order is kept.

    Args:
        steps: of all layers (`layer_steps`).
        layers: that the steps number.
        scope: one of `SCOPES`.
        savings: what the scores of each layer are divided by; 1 where nothing weighs against them.
    """

    def group_of(step: Step) -> object:
        layer = layers[step.layer]
        return layer.name if scope == "local" else isomorphism_class(layer.group) if scope == "isomorphic" else None

    pools: dict[object, list[Step]] = {}
    for step in steps:
        pools.setdefault(group_of(step), []).append(step)
    keyed: list[tuple[tuple[bool, float, int], Step]] = []
    for pool in pools.values():
        pool.sort(key=lambda step: (not step.dead, step.key[0] / savings[step.layer], step.layer))
        members = {step.layer for step in pool}
        total = sum(layers[k].first for k in members)
        gone = sum(layers[k].first - layers[k].size for k in members)
        for step in pool:
            gone += len(step.offsets) * layers[step.layer].blocks
            keyed.append(((not step.dead, gone / total, step.layer), step))
    keyed.sort(key=lambda pair: pair[0])
    return [step for _, step in keyed]
