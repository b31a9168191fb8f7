"""The stage of a run that removes: observe, plan, prune, repair or recalibrate, in the recipe's number of steps."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError, TargetError
from dnr_plugin.network.batchnorm import recalibrate_batchnorm
from dnr_plugin.network.calling import eval_outputs, kept_modes, output_difference
from dnr_plugin.network.splitting import split_attention
from dnr_plugin.pruning.numbering import original_numbers, renumbered
from dnr_plugin.pruning.plan import Plan, plan_removal
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.pruning.targets import Target, baseline
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.recipe.sections import TargetOptions
from dnr_plugin.repair.network import repair_network
from dnr_plugin.runs.results import Removal, Repaired
from dnr_plugin.runs.state import BATCH, RunState
from dnr_plugin.scoring.importance import DyingNeuronImportance

TIMED, MANY = 8, 32  # images per forward pass: where latency is a target, and where it is a matter of throughput


def prune(run: RunState) -> None:
    """Observes and removes; notes what was done in the run's results.

    Raises:
        InputError: there are too few images to judge death on.
    """
    options = run.recipe.prune
    target = _given(options.target).target
    done = Removal()
    split(run)
    dense = copy.deepcopy(run.model) if options.repair else None
    gone: dict[str, list[int]] = {}  # removed by steps so far, as numbered in the dense network
    for step in range(1, options.steps + 1):
        importance = importance_of(run)
        observe(run, importance)
        try:
            plan = plan_towards(run, importance, target.after(step, options.steps))
        except TargetError as error:
            plan, done.reached = error.plan, False
        if step == 1:
            done.dead, done.neurons, done.skipped = plan.dead, plan.neurons, plan.skipped
        _remove(run, plan, importance, done)
        if dense is not None:
            for name, neurons in plan.removals.items():
                gone[name] = sorted([*gone.get(name, []), *original_numbers(neurons, gone.get(name, []))])
            done.repair = _repair(run, dense, gone)
        _recalibrate(run)
        for name, removed in plan.removals.items():
            run.log(
                event="removed", step=step, layer=name, removed=len(removed),
                exactly_zero=len(plan.zero.get(name, [])), neurons=plan.sizes[name] - len(removed),
            )  # fmt: skip
        run.histories = importance.histories
        done.achieved, done.predicted, done.round_to = plan.achieved, plan.predicted, plan.round_to
        for name, time in plan.layer_times.items():
            first = done.layer_times.get(name, {}).get("before", time.before)
            done.layer_times[name] = {**asdict(time), "before": first}
        if plan.round_to is not None:  # measured once, for all steps
            run.limits = replace(run.limits, round_to=plan.round_to)
        if not done.reached:
            break
    run.results.removal = done
    run.results.accuracy_before_finetune = run.accuracy()


def split(run: RunState) -> None:
    """Splits the model's attention, where the recipe asks for it."""
    options = run.recipe.prune
    if options.attention:
        split_attention(run.model, run.example, run.calibration(options.observe.samples, "splitting attention"))


def importance_of(run: RunState, training: bool = False) -> DyingNeuronImportance:
    """The criterion of a recipe."""
    options = run.recipe.prune
    read, score = options.observe, options.criterion
    if training and score == "redundancy":  # which is scored after training, and here nothing is
        score = "variation"
    settings: dict[str, Any] = {"moments": score == "redundancy"}
    if not training:
        settings |= {"histories": run.histories, "prior": options.prior}
    return DyingNeuronImportance(score, threshold=read.threshold, share=read.share, bins=read.bins, **settings)


def observe(run: RunState, importance: DyingNeuronImportance) -> None:
    """Lets a criterion see training images.

    Raises:
        InputError: there are fewer than death is judged on.
    """
    wanted = run.recipe.prune.observe
    with importance.observe(run.model) as observer, kept_modes(run.model), torch.no_grad():
        run.model.eval()
        for images in run.calibration(wanted.samples, "observing"):
            run.model(images)
    seen = observer.samples
    if seen < wanted.min_samples:
        raise InputError(
            f"prune.observe.min_samples: expected at most {seen}, the training images there are, "
            f"found {wanted.min_samples}"
        )


def plan_towards(run: RunState, importance: DyingNeuronImportance, target: Target) -> Plan:
    """Plans the removal that meets a target.

    Raises:
        TargetError: it cannot be met; with the closest plan.
        RunError: it needs times of layers, and the machine is too noisy to tell.
    """
    options = run.recipe.prune
    timed = target.timed or run.limits.round_to == "auto"
    inputs = timed_images(run) if timed else run.example
    if target.timed and run.dense.model is None:
        run.dense = baseline(run.model, run.example, keep_model=True, verify=run.limits.verify)
    for _ in run.track([None], 1, "planning the removal"):
        plan = plan_removal(
            run.model, inputs, importance, target.kind, target.value,
            scope=options.ranking, limits=run.limits, dense=run.dense,
            runtime=options.runtime if timed else "eager",
        )  # fmt: skip
    return plan


def timed_images(run: RunState, batch: int = TIMED) -> Tensor:
    """A batch on which latency is measured."""
    return run.example.expand(batch, -1, -1, -1).contiguous()


def _remove(run: RunState, plan: Plan, importance: DyingNeuronImportance, done: Removal) -> None:
    """Takes what is exactly zero first, to measure that nothing changes, then the rest."""
    exact = {name: neurons for name, neurons in plan.zero.items() if neurons}
    if exact:
        probe = next(iter(run.train_images.batches(BATCH)))[0]
        before = eval_outputs(run.model, probe)
        prune_neurons(run.model, run.example, exact, importance=importance)
        done.exact_neurons += sum(map(len, exact.values()))
        difference, _ = output_difference(before, eval_outputs(run.model, probe))
        done.max_abs_diff = max(done.max_abs_diff, difference)
    rest = {name: renumbered(neurons, exact.get(name, [])) for name, neurons in plan.removals.items()}
    prune_neurons(run.model, run.example, rest, importance=importance, fold=run.recipe.prune.fold)


def _repair(run: RunState, dense: nn.Module, gone: dict[str, list[int]]) -> Repaired:
    """Fits the layers to the dense network's, whatever was removed in earlier steps."""
    options = run.recipe.prune
    # augmented: on the very images it was trained on, the dense network is surer than on others
    images = run.calibration(options.repair_samples, "repairing", run.recipe.data.augment)
    layers = repair_network(
        run.model, dense, run.example, gone, images,
        pairs=options.repair_pairs, amp=repair_precision(run.recipe), seed=run.recipe.seed,
    )  # fmt: skip
    errors = [(row.error_before, row.error_after) for row in layers if row.damping is not None]
    return Repaired(
        len(errors),
        sum(before for before, _ in errors) / max(len(errors), 1),
        sum(after for _, after in errors) / max(len(errors), 1),
        [(row.layer, row.left) for row in layers if row.left is not None],
        any(row.narrow for row in layers),
    )


def repair_precision(recipe: Recipe) -> Literal[False, "auto"]:
    """``amp`` of a recipe's repair: float32 where it trains so because it was asked to."""
    return False if recipe.train.amp is False else "auto"


def _recalibrate(run: RunState) -> None:
    count = run.recipe.prune.recalibration
    if count:
        batches = -(-min(count, len(run.train_images)) // BATCH)
        images = run.calibration(count, "recalibrating BatchNorm", run.recipe.data.augment)
        recalibrate_batchnorm(run.model, images, batches)


def _given(target: TargetOptions | None) -> TargetOptions:
    """The target, which every mode but watch has (`PruneOptions`)."""
    assert target is not None
    return target
