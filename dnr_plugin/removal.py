"""Plan a removal for a target, then carry it out on the network's dependency groups."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .batchnorm import batch_inputs, can_fold, fold_means
from .costs import CostModel, effect_per_neuron
from .errors import InputError, TargetError, did_you_mean
from .graph import (
    build_graph,
    call,
    channel_groups,
    inexact_reason,
    isomorphism_class,
    kept_modes,
    output_layers,
    tensors,
)
from .importance import DyingNeuronImportance
from .measure import FlopReport, channels, flop_report, latencies, one_sample
from .observe import is_depthwise
from .optimizer import follow_optimizer

KEPT_TARGETS = ("flops", "params", "latency")
REMOVED_TARGETS = ("neuron_sparsity", "weight_sparsity")
TARGETS = (*KEPT_TARGETS, *REMOVED_TARGETS, "dead")
SCOPES = ("local", "global", "isomorphic")


@dataclass(frozen=True)
class Limits:
    """What may be taken, and in which portions.

    Attributes:
        ignored: layers left exactly as they are, neither outputs nor inputs removed; names or shell patterns. A name
            covers everything inside it.
        round_to: keep a multiple of this many channels.
        max_pruning_ratio: largest share in (0, 1] taken from one group, of its size in the dense model.
        min_channels: neurons that every group keeps, in every channel group, >= 1.
    """

    ignored: Sequence[str] = ()
    round_to: int | None = None
    max_pruning_ratio: float = 1.0
    min_channels: int = 1


@dataclass(frozen=True)
class Baseline:
    """The dense model that targets refer to, also when removal goes on in later steps."""

    report: FlopReport
    neurons: int
    sizes: Mapping[str, int]
    model: nn.Module | None = None


@dataclass
class Plan:
    """What is going to be removed.

    Attributes:
        removals: root layer -> its neurons that go, ascending.
        kind, requested: the target.
        achieved: the target's measure after the removal.
        neurons: hidden neurons before this removal; dense_neurons: in the dense model.
        dead: how many neurons are dead; None where the criterion does not observe.
        zero: of ``removals``, the neurons whose removal changes nothing.
        skipped: groups left alone, as (root layer, reason).
        sizes: neurons of each root layer that was considered, before this removal.
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

    @property
    def removed(self) -> int:
        """Number of neurons that go."""
        return sum(map(len, self.removals.values()))


@dataclass
class _Layer:
    """A dependency group, and the portions in which it may shrink."""

    name: str
    group: tp.dependency.Group
    size: int  # neurons now
    blocks: int
    first: int  # neurons in the dense model
    portions: list[int]  # offsets taken by each removal step, in order
    effect: dict[tuple[str, str], float]

    def neurons(self, offsets: Sequence[int]) -> list[int]:
        """The neurons at these offsets of every block."""
        width = self.size // self.blocks
        return [block * width + offset for block in range(self.blocks) for offset in offsets]


@dataclass(frozen=True)
class _Step:
    """One removal step: the next ``offsets`` of a layer, in every block."""

    layer: int
    offsets: tuple[int, ...]
    key: tuple[float, ...]
    dead: bool


def baseline(model: nn.Module, example_inputs: Any, *, keep_model: bool = False) -> Baseline:
    """Measures the dense model.

    Args:
        model: before anything is removed.
        example_inputs: as Torch-Pruning takes them.
        keep_model: keep a copy, which a latency target is measured against.
    """
    layers, _, neurons = _layers(model, example_inputs, Limits(), {})
    kept = copy.deepcopy(model) if keep_model else None
    return Baseline(flop_report(model, example_inputs), neurons, {layer.name: layer.size for layer in layers}, kept)


def reachable(
    model: nn.Module, example_inputs: Any, kind: str, limits: Limits = Limits(), dense: Baseline | None = None
) -> float:
    """The furthest value of a target that the limits allow, whatever the criterion.

    Args:
        kind: any of `TARGETS` but "latency" and "dead", which are known only when it comes to it.
    """
    if kind in ("latency", "dead"):
        raise ValueError(f"kind: expected a target that can be known beforehand, found {kind!r}")
    dense = dense or baseline(model, example_inputs)
    layers, _, neurons = _layers(model, example_inputs, limits, dense.sizes)
    removals = {layer.name: layer.neurons(range(sum(layer.portions))) for layer in layers}
    trial = copy.deepcopy(model)
    prune_neurons(trial, example_inputs, removals)
    report = flop_report(trial, example_inputs)
    return _measure(kind, report.flops, report.params, neurons - sum(map(len, removals.values())), dense)


def check_target(
    model: nn.Module, example_inputs: Any, kind: str, value: float, limits: Limits, dense: Baseline | None = None
) -> None:
    """Refuses, before any training, a target that no choice of neurons can reach.

    Latency and ``dead`` are known only later.

    Raises:
        InputError: with the closest value that can be reached; or the limits name no layer.
    """
    if kind in ("latency", "dead"):
        _layers(model, example_inputs, limits, {})
        return
    closest = reachable(model, example_inputs, kind, limits, dense)
    if not _reached(kind, closest, value):
        bound = "at least" if kind in KEPT_TARGETS else "at most"
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
) -> Plan:
    """Chooses neurons so that a target is just reached: with one removal step less it would not be.

    Neurons that are dead on the observed samples go first, in every scope. Then, by scope: "local" takes equal shares
    of all layers, "global" ranks all neurons by score, "isomorphic" takes equal shares of each class of like groups
    and ranks within the class.

    Args:
        model: the network as it is now.
        example_inputs: as Torch-Pruning takes them.
        importance: a `DyingNeuronImportance` that has observed this model, or any Torch-Pruning criterion.
        kind: one of `TARGETS`.
        value: share kept ("flops", "params", "latency") or removed ("neuron_sparsity", "weight_sparsity").
        scope: "local", "global" or "isomorphic".
        limits: what may be taken.
        dense: the dense model's `baseline`; this model by default.

    Raises:
        TargetError: the target cannot be reached; with the closest value, and the plan that reaches it.
        ValueError: an argument is unknown.
    """
    if kind not in TARGETS:
        raise ValueError(f"kind: expected one of {', '.join(TARGETS)}, found {kind!r}{did_you_mean(kind, TARGETS)}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, found {scope!r}{did_you_mean(scope, SCOPES)}")
    if kind == "dead" and not isinstance(importance, DyingNeuronImportance):
        raise ValueError("kind: 'dead' needs a DyingNeuronImportance, which observes what is dead")
    dense = dense or baseline(model, example_inputs, keep_model=kind == "latency")
    layers, skipped, neurons = _layers(model, example_inputs, limits, dense.sizes)
    zero: dict[str, Tensor] = {}
    dead = 0
    steps: list[_Step] = []
    for index, layer in enumerate(layers):
        verdict = importance.verdict(layer.group) if isinstance(importance, DyingNeuronImportance) else None
        scores = importance(layer.group)
        if scores is None:
            reasons = importance.skipped if isinstance(importance, DyingNeuronImportance) else {}
            skipped.append((layer.name, reasons.get(layer.name, "the criterion gives it no score")))
            continue
        is_dead = verdict.dead if verdict is not None else torch.zeros(layer.size, dtype=torch.bool)
        if verdict is not None:
            zero[layer.name] = verdict.zero if inexact_reason(layer.group) is None else torch.zeros_like(verdict.zero)
            dead += int(verdict.dead.sum())
        steps += _layer_steps(index, layer, scores, is_dead)
    steps = _ordered(steps, layers, scope)

    cost = CostModel(model, flop_report(model, example_inputs))
    predicted, left = [_measure(kind, cost.flops, cost.params, neurons, dense)], neurons
    for step in steps:
        taken = len(step.offsets) * layers[step.layer].blocks
        cost.remove({key: count * taken for key, count in layers[step.layer].effect.items()})
        left -= taken
        predicted.append(_measure(kind, cost.flops, cost.params, left, dense))

    def removals(count: int) -> dict[str, list[int]]:
        chosen: dict[str, list[int]] = {}
        for step in steps[:count]:
            layer = layers[step.layer]
            chosen.setdefault(layer.name, []).extend(layer.neurons(step.offsets))
        return {name: sorted(chosen[name]) for name in sorted(chosen)}

    def measured(count: int) -> float:
        if kind == "neuron_sparsity":
            return predicted[count]
        trial = copy.deepcopy(model)
        prune_neurons(trial, example_inputs, removals(count))
        if kind == "latency":
            assert dense.model is not None
            before, after = latencies([dense.model, trial], example_inputs)
            return after / before
        report = flop_report(trial, example_inputs)
        return _measure(kind, report.flops, report.params, 0, dense)

    unreachable: TargetError | None = None
    try:
        if kind == "dead":
            count = sum(step.dead for step in steps)
            achieved = predicted[count]
        elif kind == "latency":
            count, achieved = _bisect(len(steps), value, measured)
        else:
            count, achieved = _first_reached(kind, predicted, value, measured)
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
        dead if isinstance(importance, DyingNeuronImportance) else None,
        {name: [i for i in gone if name in zero and zero[name][i]] for name, gone in chosen.items()},
        skipped,
        {layer.name: layer.size for layer in layers},
    )
    if unreachable is not None:
        raise TargetError(str(unreachable), achieved, plan) from unreachable
    return plan


def prune_neurons(
    model: nn.Module,
    example_inputs: Any,
    removals: Mapping[str, Sequence[int]],
    *,
    importance: DyingNeuronImportance | None = None,
    fold: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Physically removes neurons and everything in their dependency groups.

    Afterwards modes, ``requires_grad`` and gradients are as they were, on the new shapes.

    Args:
        model: changed in place.
        example_inputs: as Torch-Pruning takes them.
        removals: root layer -> neurons, as in `Plan`.
        importance: whose statistics then follow, and whose means are folded.
        fold: move the means of the removed neurons into the next bias or BatchNorm; needs ``importance``.
        optimizer: taken along (`follow_optimizer`).

    Returns:
        Number of consumers that took a mean.

    Raises:
        RuntimeError: a removal would leave a layer without channels.
    """
    if fold and importance is None:
        raise ValueError("fold: expected an importance, whose statistics hold the means, found none")
    modules = dict(model.named_modules())
    folded = 0
    with follow_optimizer(optimizer, model):
        graph = build_graph(model, example_inputs)
        for name, neurons in removals.items():
            if not neurons:
                continue
            root = modules[name]
            prune = graph.get_pruner_of_module(root).prune_out_channels
            group = graph.get_pruning_group(root, prune, list(neurons))
            if not graph.check_pruning_group(group):
                raise RuntimeError(f"{name}: removing {len(neurons)} neurons would leave a layer without channels")
            if importance is not None:
                evidence = importance.evidence(group)  # also notes which channels of which consumer go
                if fold:
                    folded += sum(what in ("bias", "BatchNorm") for _, what, _ in fold_means(graph, evidence))
            group.prune()
    return folded


@dataclass
class DeadNeuronReport:
    """What `remove_dead_neurons` did.

    Attributes:
        removed: root layer -> neurons removed.
        neurons: how many were removed; of: how many hidden neurons there were.
        zero: of the removed, those whose activation was exactly zero; constant: those that were folded away.
        dead: neurons that were dead on every sample, removed or not.
        max_abs_diff, max_rel_diff: largest difference of the model's outputs on the first calibration batch, absolute,
            and relative to the largest output.
        samples: calibration samples seen.
        left: dead or constant neurons that stayed, as (root layer, how many, reason).
        params_before, params_after: of the model.
    """

    removed: dict[str, list[int]]
    neurons: int
    of: int
    zero: int
    constant: int
    dead: int
    max_abs_diff: float
    max_rel_diff: float
    samples: int
    left: list[tuple[str, int, str]]
    params_before: int
    params_after: int


def remove_dead_neurons(
    model: nn.Module,
    example_inputs: Any,
    calibration: Iterable[Any],
    *,
    min_samples: int = 1536,
    ignored: Sequence[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> DeadNeuronReport:
    """Removes neurons whose removal does not change the model's outputs, up to float rounding.

    These are the neurons that were exactly zero at every consumer on all calibration samples, and those that were
    constant there, where the constant can be folded into a bias or a BatchNorm exactly. Dead neurons that are neither
    (the varying negative side of a leaky activation, a constant in front of a zero-padded convolution) stay and are
    reported: to take these as well, use ``plan_removal(..., kind="dead")``.

    Args:
        model: changed in place; modes, gradients and hooks stay as they are.
        example_inputs: as Torch-Pruning takes them.
        calibration: batches of inputs, or of (input, target) pairs, on the model's device.
        min_samples: fewest samples on which to call a neuron dead. A neuron that fires on one image in a thousand goes
            unseen by 1,024 images with probability 36 %, by 4,096 with 1.7 %.
        ignored: layers left exactly as they are, by name or shell pattern.
        optimizer: taken along (`follow_optimizer`).

    Raises:
        InputError: fewer than ``min_samples`` samples; the model cannot be traced; an ignored name that fits nothing.
        ValueError: activations that are not finite.
    """
    importance = DyingNeuronImportance()
    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise InputError("calibration: expected at least one batch, found none")
    probe = batch_inputs(first)
    with kept_modes(model), torch.no_grad():
        model.eval()
        before = [out.clone() for out in tensors(call(model, probe))]
        with importance.observe(model) as observer:
            for batch in chain([first], batches):
                call(model, batch_inputs(batch))
    samples = min(activity.samples for activity in observer.activities.values())
    if samples < min_samples:
        raise InputError(f"calibration: expected at least {min_samples} samples to judge death on, found {samples}")
    params_before = sum(p.numel() for p in model.parameters())
    layers, skipped, neurons = _layers(model, example_inputs, Limits(ignored), {})
    removals: dict[str, list[int]] = {}
    zero = constant = dead = 0
    left: list[tuple[str, int, str]] = []
    for layer in layers:
        verdict = importance.verdict(layer.group)
        if verdict is None:
            skipped.append((layer.name, importance.skipped[layer.name]))
            continue
        found = verdict.dead | verdict.constant
        dead += int(verdict.dead.sum())
        if not found.any():
            continue
        reason = inexact_reason(layer.group)
        if reason is not None:
            left.append((layer.name, int(found.sum()), f"removal is not exact: {reason}"))
            continue
        foldable = all(can_fold(layer.group._DG, e.use.module) for e in importance.evidence(layer.group))
        exact = verdict.zero | (verdict.constant if foldable else torch.zeros_like(verdict.zero))
        for stays, why in (
            (verdict.constant & ~exact, "constant, but a layer that reads them cannot take the constant up exactly"),
            (verdict.dead & ~verdict.constant, "silent, but not constant: removal would not be exact"),
        ):
            if stays.any():
                left.append((layer.name, int(stays.sum()), why))
        whole = exact.view(layer.blocks, -1).all(0)
        if whole.all():  # a layer that is dead altogether keeps one channel in each block
            whole[0] = False
        taken = whole.repeat(layer.blocks)
        if int((exact & ~taken).sum()):
            blocked = "the layer keeps one" if layer.blocks == 1 else "their channel groups are not dead as a whole"
            left.append((layer.name, int((exact & ~taken).sum()), blocked))
        if taken.any():
            removals[layer.name] = taken.nonzero().flatten().tolist()
            zero += int((taken & verdict.zero).sum())
            constant += int((taken & ~verdict.zero).sum())
    prune_neurons(model, example_inputs, removals, importance=importance, fold=True, optimizer=optimizer)
    with kept_modes(model), torch.no_grad():
        model.eval()
        after = list(tensors(call(model, probe)))
    absolute, relative = output_difference(before, after)
    return DeadNeuronReport(
        removals, zero + constant, neurons, zero, constant, dead, absolute, relative, samples, left,
        params_before, sum(p.numel() for p in model.parameters()),
    )  # fmt: skip


def output_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Largest absolute difference of outputs, and the same relative to the largest output."""
    absolute = max(float((a.double() - b.double()).abs().max()) for a, b in zip(before, after, strict=True))
    largest = max(float(a.double().abs().max()) for a in before)
    return absolute, absolute / largest if largest > 0 else absolute


def _layers(
    model: nn.Module, example_inputs: Any, limits: Limits, sizes: Mapping[str, int]
) -> tuple[list[_Layer], list[tuple[str, str]], int]:
    """Groups that may shrink with their portions, those that may not with the reason, and all hidden neurons."""
    names = {module: name for name, module in model.named_modules()}
    ignored = _ignored(model, limits.ignored)
    graph = build_graph(model, one_sample(example_inputs))
    outputs = output_layers(model, one_sample(example_inputs))
    layers: list[_Layer] = []
    skipped: list[tuple[str, str]] = []
    neurons = 0
    for group in graph.get_all_groups():
        name, size = names[group[0].dep.target.module], len(group[0].idxs)
        members = [dep.target.module for dep, _ in group]
        if any(
            module in outputs and graph.is_out_channel_pruning_fn(dep.handler)
            for (dep, _), module in zip(group.items, members, strict=True)
            if isinstance(module, nn.Module)
        ):
            skipped.append((name, "its outputs are the model's outputs"))
            continue
        neurons += size
        touched = next((names[m] for m in members if isinstance(m, nn.Module) and m in ignored), None)
        if touched is not None:
            skipped.append((name, f"{touched} is ignored"))
            continue
        blocks = channel_groups(group)
        if not _divides(group, blocks):
            skipped.append((name, f"its {size} channels do not fall into {blocks} equal channel groups"))
            continue
        first = sizes.get(name, size)
        portions = _portions(size // blocks, first // blocks, blocks, limits)
        layers.append(_Layer(name, group, size, blocks, first, portions, effect_per_neuron(group, names)))
    if not layers:
        raise InputError(
            "model: expected at least one layer whose channels may be removed, found none"
            + "".join(f"; {name}: {reason}" for name, reason in skipped[:3])
        )
    return layers, skipped, neurons


def _divides(group: tp.dependency.Group, blocks: int) -> bool:
    """Whether neurons at the same offset of every block are at the same offset of every channel group they reach."""
    size = len(group[0].idxs)
    if blocks == 1:
        return True
    if any(len(idxs) % blocks for _, idxs in group):
        return False
    for item in group.items:
        module = item.dep.target.module
        if isinstance(module, nn.modules.conv._ConvNd) and not is_depthwise(module):
            parts = module.groups
        elif isinstance(module, nn.GroupNorm):
            parts = module.num_groups
        else:
            continue
        inwards = group._DG.is_in_channel_pruning_fn(item.dep.handler)
        if parts == 1:
            continue
        if len(item.idxs) != channels(module)[0 if inwards else 1] or None in item.root_idxs:
            return False  # other channels share its blocks, as after a concatenation
        root_of = dict(zip(item.idxs, item.root_idxs, strict=True))
        offsets = torch.tensor([root_of[k] % (size // blocks) for k in sorted(root_of)]).view(parts, -1)
        if (offsets != offsets[0]).any():
            return False
    return True


def _ignored(model: nn.Module, patterns: Sequence[str]) -> set[nn.Module]:
    names = [name for name, _ in model.named_modules() if name]
    found: set[nn.Module] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(
                f"prune.ignored: expected the name of a layer or a pattern that fits one, found {pattern!r}"
                f"{did_you_mean(pattern, names)}"
            )
        for name in matched:
            found.update(model.get_submodule(name).modules())
    return found


def _portions(offsets: int, first: int, blocks: int, limits: Limits) -> list[int]:
    """How many offsets each removal step takes, until what must stay is left."""
    multiple = limits.round_to // math.gcd(limits.round_to, blocks) if limits.round_to else 1
    floor = max(limits.min_channels, math.ceil(first * (1.0 - limits.max_pruning_ratio) - 1e-9), 1)
    portions: list[int] = []
    kept = offsets
    while True:
        fewer = (kept - 1) // multiple * multiple
        if fewer < floor:
            return portions
        portions.append(kept - fewer)
        kept = fewer


def _layer_steps(index: int, layer: _Layer, scores: Tensor, dead: Tensor) -> Iterator[_Step]:
    by_offset = scores.detach().cpu().double().view(layer.blocks, -1).mean(0)
    offset_dead = dead.view(layer.blocks, -1).all(0)
    order = sorted(range(len(by_offset)), key=lambda k: (not offset_dead[k], float(by_offset[k]), k))
    start, highest = 0, -math.inf
    for portion in layer.portions:
        offsets = tuple(order[start : start + portion])
        start += portion
        highest = max(highest, *(float(by_offset[k]) for k in offsets))
        yield _Step(index, offsets, (highest,), all(bool(offset_dead[k]) for k in offsets))


def _ordered(steps: Sequence[_Step], layers: Sequence[_Layer], scope: str) -> list[_Step]:
    """All removal steps in the order in which they are taken; within a layer the given order is kept."""

    def group_of(step: _Step) -> object:
        layer = layers[step.layer]
        return layer.name if scope == "local" else isomorphism_class(layer.group) if scope == "isomorphic" else None

    pools: dict[object, list[_Step]] = {}
    for step in steps:
        pools.setdefault(group_of(step), []).append(step)
    keyed: list[tuple[tuple[bool, float, int], _Step]] = []
    for pool in pools.values():
        pool.sort(key=lambda step: (not step.dead, step.key))
        members = {step.layer for step in pool}
        total = sum(layers[k].first for k in members)
        gone = sum(layers[k].first - layers[k].size for k in members)
        for step in pool:
            gone += len(step.offsets) * layers[step.layer].blocks
            keyed.append(((not step.dead, gone / total, step.layer), step))
    keyed.sort(key=lambda pair: pair[0])
    return [step for _, step in keyed]


def _measure(kind: str, flops: float, params: float, neurons: int, dense: Baseline) -> float:
    if kind == "flops":
        return flops / dense.report.flops
    if kind == "params":
        return params / dense.report.params
    if kind == "weight_sparsity":
        return 1.0 - params / dense.report.params
    return 1.0 - neurons / dense.neurons


def _reached(kind: str, achieved: float, requested: float) -> bool:
    return achieved <= requested + 1e-9 if kind in KEPT_TARGETS else achieved >= requested - 1e-9


def _first_reached(
    kind: str, predicted: Sequence[float], value: float, measured: Callable[[int], float]
) -> tuple[int, float]:
    """The first removal step at which the target is met, by prediction corrected with measurements."""
    last, error = len(predicted) - 1, 0.0
    missed, met, best = -1, last + 1, 0.0  # the target is missed up to here, met from here on
    while True:
        guess = next((k for k in range(last + 1) if _reached(kind, predicted[k] + error, value)), last)
        count = min(max(guess, missed + 1), met - 1)
        found = measured(count)
        error = found - predicted[count]
        if _reached(kind, found, value):
            met, best = count, found
        elif count == last:
            raise _unreachable(kind, found, value)
        else:
            missed = count
        if met - 1 == missed or (met <= last and not _reached(kind, predicted[met - 1] + error, value)):
            return met, best


def _bisect(last: int, value: float, measured: Callable[[int], float]) -> tuple[int, float]:
    """The fewest removal steps whose measured latency meets the target; timings are not monotone, so approximately."""
    low, high, best = 0, last, measured(last)
    if best > value:
        raise _unreachable("latency", best, value)
    while high - low > max(1, last // 256):
        middle = (low + high) // 2
        found = measured(middle)
        if found <= value:
            high, best = middle, found
        else:
            low = middle
    return high, best


def _unreachable(kind: str, closest: float, requested: float) -> TargetError:
    return TargetError(f"{kind}: {requested:g} was asked, {closest:.4f} is the closest that can be reached", closest)
