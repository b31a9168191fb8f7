"""Chooses which neurons go so that a target is just reached; removes nothing from the model itself."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.errors import InputError, TargetError, did_you_mean
from dnr_plugin.network.attention import completed, split_modules
from dnr_plugin.network.calling import copied, eager
from dnr_plugin.network.cost import flop_report, latencies
from dnr_plugin.network.dependencies import inexact_reason
from dnr_plugin.network.runtimes import Runtime, check_runtime, runtime_of
from dnr_plugin.pruning.cost_model import CostModel
from dnr_plugin.pruning.groups import Survey
from dnr_plugin.pruning.latency import LayerTime
from dnr_plugin.pruning.latency_table import LatencyTable
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.order import SCOPES, TIMED_SCOPES, Costs, Step, layer_steps, ordered, savings_of
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.pruning.targets import Baseline, Dead, Target, baseline, target_of
from dnr_plugin.pruning.timing import counts_time, timing
from dnr_plugin.scoring.importance import DyingNeuronImportance

_EXACT = 1e-9  # of a share: a prediction that comes so close was no guess
_AGAIN = 5  # measurements of a latency
_NEAR = 0.02  # as a share of a latency that was asked: so little below it will do
_TRIES = 8  # removals that are measured to come so near


@dataclass
class Plan:
    """What is going to be removed.

    Attributes:
        removals: root layer -> its neurons that go, ascending.
        kind, requested: the target.
        achieved: the target's measure after the removal.
        neurons: hidden neurons before this removal; dense_neurons: in the dense model.
        dead: how many neurons are dead or dying; None where the criterion does not observe.
        zero: of ``removals``, the neurons whose removal changes nothing.
        skipped: groups left alone, as (root layer, reason).
        sizes: neurons of each root layer that was considered, before this removal.
        predicted: of a latency target, what times of layers predict; ``achieved`` is measured.
        layer_times: of a latency target, what times of layers say of each that may shrink.
        round_to: channels of which layers keep a multiple; as measured, where the limits left it to that.
    """

    removals: dict[str, list[int]]
    kind: str
    requested: float
    achieved: float
    neurons: int
    dense_neurons: int
    dead: int | None = None
    zero: dict[str, list[int]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    predicted: float | None = None
    round_to: int | None = None
    layer_times: dict[str, LayerTime] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """Number of neurons that go."""
        return sum(map(len, self.removals.values()))


def reachable(
    model: nn.Module,
    example_inputs: Any,
    kind: str,
    limits: Limits = Limits(),
    dense: Baseline | None = None,
    survey: Survey | None = None,
) -> float:
    """The furthest value of a target that the limits allow, whatever the criterion.

    Args:
        model: the network as it is now; stays as it is.
        example_inputs: as Torch-Pruning takes them.
        kind: of a target that is `known_beforehand`.
        limits: what may be taken.
        dense: the dense model's `baseline`; this model by default.
        survey: of the model; made here by default.

    Raises:
        ValueError: of the target nothing is known beforehand.
    """
    target = target_of(kind, 1.0)
    if not target.known_beforehand:
        raise ValueError(f"kind: expected a target that can be known beforehand, found {kind!r}")
    survey = survey or Survey(model, example_inputs)
    dense = dense or baseline(model, example_inputs, survey=survey, verify=limits.verify)
    prunable = survey.within(limits, dense.sizes)
    furthest = {
        layer.name: sorted(layer.neurons(u for part in layer.parts for u in part.units[: sum(part.portions)]))
        for layer in prunable.layers
    }
    removals = completed(split_modules(model), furthest)
    trial = copied(model)
    prune_neurons(trial, example_inputs, removals)
    report = flop_report(trial, example_inputs)
    return target.measure(report.flops, report.params, prunable.neurons - sum(map(len, removals.values())), dense)


def check_target(
    model: nn.Module,
    example_inputs: Any,
    kind: str,
    value: float,
    limits: Limits,
    dense: Baseline | None = None,
    survey: Survey | None = None,
) -> None:
    """Refuses, before any training, a target that no choice of neurons can reach.

    Of some targets, as latency, this is known only later.

    Args:
        model, example_inputs, kind, limits, dense, survey: see `reachable`.
        value: of the target's measure.

    Raises:
        InputError: with the closest value that can be reached; or the limits name no layer.
    """
    target = target_of(kind, value)
    survey = survey or Survey(model, example_inputs)
    if not target.known_beforehand:
        survey.within(limits, {})
        return
    dense = dense or baseline(model, example_inputs, survey=survey, verify=limits.verify)
    target.check_counts(dense.report)
    closest = reachable(model, example_inputs, kind, limits, dense, survey)
    if not target.reached(closest):
        bound = "at least" if target.keeps else "at most"
        raise InputError(
            f"prune.target.{kind}: expected {bound} {closest:.4f}, which is as far as ignored, round_to and "
            f"max_pruning_ratio allow, found {value:g}"
        )


def plan_removal(
    model: nn.Module,
    example_inputs: Any,
    importance: Callable[[tp.dependency.Group], Tensor | None],
    kind: str,
    value: float = 1.0,
    *,
    scope: str = "local",
    limits: Limits = Limits(),
    dense: Baseline | None = None,
    dying: Mapping[str, Tensor] | None = None,
    table: LatencyTable | None = None,
    runtime: str = "eager",
) -> Plan:
    """Chooses neurons so that a target is just reached: with one removal step less it would not be.

    Latency is predicted from measured times of layers, then measured beside the dense model's and corrected, until it
    is at most 2 % below what was asked: what is closer is noise.

    Neurons that are dead on the observed samples go first, in every scope. Then, by scope: "local" takes equal shares
    of all layers, "global" ranks all neurons by score, "isomorphic" takes equal shares of each class of like groups
    and ranks within the class, "cost_aware" ranks all neurons by ``score / saved ** 0.7`` with what the removal of each
    saves: FLOPs (also for latency) or parameters of the network as it is now; where neurons count, as "global".
    "latency_aware" does so with the time that it saves, in steps that the hardware rounds to (`Limits.round_to` "auto",
    where it is None).

    Args:
        model: the network as it is now.
        example_inputs: as Torch-Pruning takes them; where time is measured, the batch that it is measured on.
        importance: a `DyingNeuronImportance` that has observed this model, or any Torch-Pruning criterion.
        kind: one of `targets.TARGETS`.
        value: share kept ("flops", "params", "latency") or removed ("neuron_sparsity", "weight_sparsity").
        scope: one of `SCOPES`.
        limits: what may be taken.
        dense: the dense model's `baseline`; this model by default.
        dying: root layer -> neurons that go as the dead ones do, bool, shape [n].
        table: times of layers, where they are needed; by default that of this machine, kept in the user's cache.
        runtime: one of `runtimes.RUNTIMES` that latency is meant in. "compiled" takes layers' times from eager mode and
            compiles the dense model and each that is measured, eleven at most; "onnxruntime" computes on the CPU.

    Raises:
        InputError: the runtime needs what is not installed.
        RunError: times are needed, and the machine is too noisy to tell, or the runtime cannot run this model.
        TargetError: the target cannot be reached; with the closest value, and the plan that reaches it.
        ValueError: an argument is unknown.
    """
    model, target = eager(model), target_of(kind, value)
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, found {scope!r}{did_you_mean(scope, SCOPES)}")
    if isinstance(target, Dead) and not isinstance(importance, DyingNeuronImportance):
        raise ValueError("kind: 'dead' needs a DyingNeuronImportance, which observes what is dead")
    if scope in TIMED_SCOPES and not target.timed:
        raise ValueError(f"scope: expected another than {scope} with {kind}, which does not count time, found {scope}")
    runs_in = runtime_of(runtime)
    if runtime != "eager" and not counts_time(scope, target, limits):
        raise ValueError(f"runtime: expected eager with {kind}, for which nothing is timed, found {runtime}")
    check_runtime(runtime)
    survey = Survey(model, example_inputs)
    if dense is None:
        dense = baseline(model, example_inputs, keep_model=target.timed, survey=survey, verify=limits.verify)
        target.check_counts(dense.report)
    limits = limits.in_scope(scope)
    prunable = survey.within(limits, dense.sizes)
    skipped, neurons = prunable.skipped, prunable.neurons
    report = flop_report(model, example_inputs)
    timed = timing(survey, example_inputs, prunable, scope, target, limits, report, table, runs_in)
    layers, rounded, latency = timed.layers, timed.round_to, timed.model
    stopwatch = _Stopwatch(dense, example_inputs, runs_in)
    zero: dict[str, Tensor] = {}
    dead_in: dict[str, int] = {}
    steps: list[Step] = []
    for index, layer in enumerate(layers):
        verdict = importance.verdict(layer.group) if isinstance(importance, DyingNeuronImportance) else None
        scores = importance(layer.group)
        if scores is None:
            reasons = importance.skipped if isinstance(importance, DyingNeuronImportance) else {}
            skipped.append((layer.name, reasons.get(layer.name, "the criterion gives it no score")))
            continue
        is_dead = verdict.dead if verdict is not None else torch.zeros(layer.size, dtype=torch.bool)
        if dying is not None and layer.name in dying:
            is_dead = is_dead | dying[layer.name]
        if verdict is not None:
            if inexact_reason(layer.group) is None:
                zero[layer.name] = layer.whole(verdict.zero)
            dead_in[layer.name] = int(is_dead.sum())
        steps += layer_steps(index, layer, scores, is_dead)
    cost = CostModel(model, report)
    steps = ordered(steps, layers, scope, savings_of(steps, layers, target, scope, Costs(cost, latency)))
    splits = split_modules(model)
    started = 1.0
    if latency is not None and neurons != dense.neurons:
        started = stopwatch.ratio(model)

    def measure() -> float:
        return target.measure(cost.flops, cost.params, remaining, dense) if latency is None else started * latency.share

    def effect_of(step: Step) -> dict[tuple[str, str], float]:
        effect = layers[step.layer].parts[step.part].effect
        return {key: count * len(step.units) for key, count in effect.items()}

    remaining, taken = neurons, defaultdict[str, set[int]](set)
    predicted = [measure()]
    for step in steps:
        layer, effect = layers[step.layer], effect_of(step)
        cost.remove(effect)
        if latency is not None:
            latency.remove(effect)
        for name, gone in completed(splits, {layer.name: layer.neurons(step.units)}).items():
            new = {*gone} - taken[name]
            taken[name] |= new
            remaining -= len(new)
        predicted.append(measure())

    def removals(count: int) -> dict[str, list[int]]:
        chosen: dict[str, list[int]] = {}
        for step in steps[:count]:
            layer = layers[step.layer]
            chosen.setdefault(layer.name, []).extend(layer.neurons(step.units))
        chosen = completed(splits, chosen)
        return {name: sorted(chosen[name]) for name in sorted(chosen)}

    def measured(count: int) -> float:
        if target.counts_neurons:
            return predicted[count]
        trial = copied(model)
        prune_neurons(trial, example_inputs, removals(count))
        if target.timed:
            return stopwatch.ratio(trial)
        report = flop_report(trial, example_inputs)
        return target.measure(report.flops, report.params, 0, dense)

    unreachable: TargetError | None = None
    try:
        if isinstance(target, Dead):
            count = sum(step.dead for step in steps)
            achieved = predicted[count]
            taken_from = removals(count)
            for name, number in dead_in.items():
                stay = number - len(taken_from.get(name, []))
                if stay:
                    skipped.append(
                        (name, f"{stay} of {number} dead neurons stay: round_to, max_pruning_ratio or channel groups")
                    )
        elif target.timed:
            count, achieved = _nearly_reached(target, predicted, measured)
        else:
            count, achieved = _first_reached(target, predicted, measured)
    except TargetError as error:
        unreachable, count, achieved = error, len(steps), error.closest
    chosen = removals(count)
    plan = Plan(
        chosen,
        kind,
        value,
        achieved,
        neurons,
        dense.neurons,
        sum(dead_in.values()) if isinstance(importance, DyingNeuronImportance) else None,
        {name: [i for i in gone if name in zero and zero[name][i]] for name, gone in chosen.items()},
        skipped,
        {layer.name: layer.size for layer in layers},
        predicted[count] if target.timed else None,
        rounded,
    )
    if latency is not None:
        for step in steps[count:]:
            latency.remove({key: -lost for key, lost in effect_of(step).items()})
        plan.layer_times = latency.times()
    if unreachable is not None:
        raise TargetError(str(unreachable), achieved, plan) from unreachable
    return plan


def _first_reached(target: Target, predicted: Sequence[float], measured: Callable[[int], float]) -> tuple[int, float]:
    """The first removal step at which the target is met: one less measures, or is known exactly, to miss it.

    Steps are guessed by prediction corrected with the last measurement; every third is the middle of what is open, for
    networks that cost otherwise than predicted.
    """
    last, error, tries = len(predicted) - 1, 0.0, 0
    missed, met, best = -1, last + 1, 0.0  # the target is missed up to here, met from here on
    while met - 1 > missed:
        tries += 1
        guess = next((k for k in range(last + 1) if target.reached(predicted[k] + error)), last)
        count = (missed + met) // 2 if tries % 3 == 0 else min(max(guess, missed + 1), met - 1)
        achieved = measured(count)
        error = achieved - predicted[count]
        if target.reached(achieved):
            met, best = count, achieved
            if abs(error) < _EXACT and count and not target.reached(predicted[count - 1] + error):
                break
        elif count == last:
            raise target.unreachable(achieved)
        else:
            missed = count
    return met, best


def _nearly_reached(target: Target, predicted: Sequence[float], measured: Callable[[int], float]) -> tuple[int, float]:
    """The removal step that measures nearest below the target of those that are measured.

    Prediction, corrected with the last measurement, leads to them; every third, or where it leads out of what is open,
    is the middle of that. Timings are not monotone, so none is the first that meets the target.
    """
    last, error = len(predicted) - 1, 0.0
    missed, met, best = -1, last + 1, 0.0
    for number in range(1, _TRIES + 1):
        guess = next((k for k in range(last + 1) if target.reached(predicted[k] + error)), last)
        count = guess if missed < guess < met and number % 3 else (missed + met) // 2
        achieved = measured(count)
        error = achieved - predicted[count]
        if target.reached(achieved):
            met, best = count, achieved
            if achieved >= target.value * (1.0 - _NEAR):
                break
        else:
            missed = count
        if met - 1 <= missed:
            break
    if met <= last:
        return met, best
    closest = achieved if missed == last else measured(last)
    if not target.reached(closest):
        raise target.unreachable(closest)
    return last, closest


class _Stopwatch:
    """Latencies as shares of the dense model's, measured in turn in a runtime, for which that one is prepared once."""

    def __init__(self, dense: Baseline, inputs: Any, runtime: Runtime) -> None:
        self._model, self._inputs, self._runtime = dense.model, runtime.inputs(inputs), runtime

    @functools.cached_property
    def _dense(self) -> nn.Module:
        assert self._model is not None
        return self._runtime.prepared(self._model, self._inputs)

    def ratio(self, model: nn.Module) -> float:
        """Of a model: measured until two measurements agree, or `_AGAIN` times."""
        pair = [self._dense, self._runtime.prepared(model, self._inputs)]
        ratios: list[float] = []
        while len(ratios) < _AGAIN:
            before, after = latencies(pair, self._inputs)
            ratios = sorted([*ratios, after / before])
            if any(high - low <= _NEAR * high for low, high in itertools.pairwise(ratios)):
                break
        return statistics.median(ratios)
