"""Removes the neurons whose removal changes no output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from dnr_plugin.errors import InputError
from dnr_plugin.linalg import without_autocast
from dnr_plugin.network.calling import (
    batch_inputs,
    call,
    copied,
    eager,
    eval_outputs,
    kept_modes,
    mapped,
    output_difference,
)
from dnr_plugin.network.cost import count_params
from dnr_plugin.network.dependencies import inexact_reason
from dnr_plugin.pruning.folding import can_fold
from dnr_plugin.pruning.groups import prunable_layers
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.scoring.evidence import read
from dnr_plugin.scoring.importance import DyingNeuronImportance

# Largest relative difference of the outputs that float32 rounding explains, with room for deep networks.
EXACT_TOLERANCE = 1e-4
EXACT_TOLERANCE_16_BITS = 2e-2  # where constants were observed in 16 bits: a bfloat16 is off by up to 0.4 %


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
        skipped: layers whose neurons were not judged, as (root layer, reason).
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
    skipped: list[tuple[str, str]] = field(default_factory=list)


def remove_dead_neurons(
    model: nn.Module,
    example_inputs: Any,
    calibration: Iterable[Any],
    *,
    min_samples: int = 1536,
    ignored: Sequence[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
    verify: bool = True,
    followers: Sequence[nn.Module] = (),
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
        verify: check Torch-Pruning's groups before they are used (`Limits`).
        followers: models that lose the same neurons (`prune_neurons`); an average of the weights is not constant where
            the model is, so that its outputs change as far as it still differs.

    Raises:
        InputError: fewer than ``min_samples`` samples; the model cannot be traced; an ignored name that fits nothing.
        ValueError: activations that are not finite.
    """
    model = eager(model)
    importance = DyingNeuronImportance("variation", moments=False)
    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise InputError("calibration: expected at least one batch, found none")
    probe = batch_inputs(first, example_inputs)
    before = eval_outputs(model, probe)
    with kept_modes(model), torch.no_grad():
        model.eval()
        with importance.observe(model) as observer:
            for batch in chain([first], batches):
                call(model, batch_inputs(batch, example_inputs))
    samples = observer.samples
    if samples < min_samples:
        raise InputError(f"calibration: expected at least {min_samples} samples to judge death on, found {samples}")
    params_before = count_params(model)
    prunable = prunable_layers(model, example_inputs, Limits(ignored, verify=verify), {})
    layers, skipped, neurons = prunable.layers, prunable.skipped, prunable.neurons
    removals: dict[str, list[int]] = {}
    zero: dict[str, int] = {}
    dead = 0
    left: list[tuple[str, int, str]] = []
    for layer in layers:
        verdict = importance.verdict(layer.group)
        if verdict is None:
            skipped.append((layer.name, str(importance.why_unscored(layer.group))))
            continue
        unread = int((~read(importance.evidence(layer.group), layer.size)).sum())
        if unread:
            skipped.append((layer.name, f"{unread} of its neurons are read by no layer that could be observed"))
        dead_or_constant = verdict.dead | verdict.constant
        dead += int(verdict.dead.sum())
        if not dead_or_constant.any():
            continue
        reason = inexact_reason(layer.group)
        if reason is not None:
            left.append((layer.name, int(dead_or_constant.sum()), f"removal is not exact: {reason}"))
            continue
        foldable = all(can_fold(layer.group._DG, e.use.module) for e in importance.evidence(layer.group))
        exact = verdict.zero | (verdict.constant if foldable else torch.zeros_like(verdict.zero))
        for stays, why in (
            (verdict.constant & ~exact, "constant, but a layer that reads them cannot take the constant up exactly"),
            (verdict.dead & ~verdict.constant, "silent, but not constant: removal would not be exact"),
        ):
            if stays.any():
                left.append((layer.name, int(stays.sum()), why))
        taken = layer.whole(exact)
        for part in layer.parts:  # what is dead altogether keeps one unit
            if taken[layer.neurons(part.units)].all():
                taken[layer.neurons(part.units[:1])] = False
        if int((exact & ~taken).sum()):
            blocked = (
                "the layer keeps one" if layer.units == layer.size else "their channel groups are not dead as a whole"
            )
            left.append((layer.name, int((exact & ~taken).sum()), blocked))
        if taken.any():
            removals[layer.name] = taken.nonzero().flatten().tolist()
            zero[layer.name] = int((taken & verdict.zero).sum())
    for name in _changing(model, example_inputs, removals, importance, probe):
        left.append((name, len(removals.pop(name)), "removal would change the outputs: something mixes the channels"))
        del zero[name]
    prune_neurons(
        model, example_inputs, removals, importance=importance, fold=True, optimizer=optimizer, followers=followers
    )
    absolute, relative = output_difference(before, eval_outputs(model, probe))
    removed, exactly_zero = sum(map(len, removals.values())), sum(zero.values())
    return DeadNeuronReport(
        removals, removed, neurons, exactly_zero, removed - exactly_zero, dead, absolute, relative, samples, left,
        params_before, count_params(model), skipped,
    )  # fmt: skip


def _changing(
    model: nn.Module,
    example_inputs: Any,
    removals: Mapping[str, Sequence[int]],
    importance: DyingNeuronImportance,
    probe: Any,
) -> list[str]:
    """Layers whose dead neurons still matter, tried on a copy.

    What mixes channels ahead of the consumer (a sum or a mean over channels, say) cannot be listed by name. A model of
    16 bits, or one under autocast, is tried in 32, where only the rounding of the constants observed is left: that of
    its outputs would hide such a mixture, or look like one.
    """
    if not removals:
        return []
    device = next(model.parameters()).device
    narrow = any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())
    tolerance = EXACT_TOLERANCE_16_BITS if narrow or torch.is_autocast_enabled(device.type) else EXACT_TOLERANCE
    with without_autocast(device):
        dense, wide = copied(model), (example_inputs, probe)
        if narrow:
            dense, wide = dense.float(), mapped(lambda a: a.float() if a.is_floating_point() else a, wide)
        before = eval_outputs(dense, wide[1])

        def changes(chosen: Mapping[str, Sequence[int]]) -> bool:
            trial = copied(dense)
            with importance.unchanged():
                prune_neurons(trial, wide[0], chosen, importance=importance, fold=True)
            return output_difference(before, eval_outputs(trial, wide[1]))[1] > tolerance

        if not changes(removals):
            return []
        return [name for name, gone in removals.items() if changes({name: gone})] or list(removals)
