"""The stages of a run that train: before the removal, watched and perhaps pruned by their dynamics, and after it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch

from dnr_plugin.dynamics.check import Check
from dnr_plugin.dynamics.dynamics import DyingNeuronDynamics
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.targets import baseline
from dnr_plugin.recipe.training_sections import TrainOptions
from dnr_plugin.runs.removal_stage import importance_of
from dnr_plugin.runs.results import CheckSums, Removal
from dnr_plugin.runs.state import RunState, set_random_state
from dnr_plugin.runs.timetable import timetable
from dnr_plugin.seeds import derive_seed
from dnr_plugin.training.precision import Precision, choose_precision
from dnr_plugin.training.trainer import Trainer


def train(run: RunState, stage: str, state: Mapping[str, Any] | None) -> None:
    """Trains for the epochs of a stage that remain, with a checkpoint after each.

    Args:
        run: changed.
        stage: "train" or "finetune".
        state: a checkpoint inside this stage to go on from, or None.
    """
    options = run.recipe.train if stage == "train" else run.recipe.finetune
    if options.epochs == 0:
        return
    options = options.model_copy(update={"amp": _precision(run, stage, options).used})
    seed = derive_seed(run.recipe.seed, stage)
    torch.manual_seed(seed)  # of dropout and the like
    trainer = Trainer(run.model, run.train_images, options, seed, run.recipe.data.augment)
    dynamics = _dynamics(run, trainer.optimizer) if stage == "train" else None
    if state is not None and "optimizer" in state:
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.schedule.load_state_dict(state["schedule"])
        if dynamics is not None:
            dynamics.load_state_dict(state["dynamics"])
        set_random_state(state)
    trainer.dynamics = dynamics
    if dynamics is not None and run.results.dynamics is None:
        run.results.dynamics = CheckSums()
    with dynamics or contextlib.nullcontext():
        for number in range(run.epoch, options.epochs):
            start = time.perf_counter()
            with run.timed(stage):
                done = trainer.epoch(number, run.shown(f"{stage} epoch {number + 1}/{options.epochs}"))
            training = time.perf_counter() - start
            run.epoch = number + 1
            for check in done.checks:
                _note(run, check, check.step / trainer.steps_per_epoch)
            if dynamics is not None and dynamics.stopped and (sums := _sums(run)).stopped is None:
                sums.stopped = dynamics.stopped
                run.log(event="stopped", epoch=number + 1, reason=dynamics.stopped)
            run.log(
                event="epoch", stage=stage, epoch=number + 1, loss=done.loss, lr=done.lr,
                accuracy=run.accuracy(trainer.amp), seconds=time.perf_counter() - start, training_seconds=training,
                check_seconds=sum(check.seconds for check in done.checks),
            )  # fmt: skip
            run.save(trainer)
        if dynamics is not None:
            run.histories = {**dynamics.histories}
            if not dynamics.checks:
                _sums(run).stopped = "no check saw min_samples images at every layer"
            if run.recipe.prune.mode != "after_training":
                run.results.removal = _removed_while_training(run, dynamics)


def _precision(run: RunState, stage: str, options: TrainOptions) -> Precision:
    """What a stage computes in: chosen once, and noted in the results, so that a resumed run goes on in the same.

    Fine-tuning follows a training that had the choice, so that runs that share their training also share this.
    """
    known = run.results.amp
    if stage not in known:
        trained = known.get("train")
        if options.amp == "auto" and trained is not None and trained.asked == "auto":
            known[stage] = Precision("auto", trained.used, reason="as in training")
        else:
            images = options.epochs * len(run.train_images)
            with run.timed(stage):
                known[stage] = choose_precision(run.model, run.example, options, run.dense.report.flops, images)
    return known[stage]


def _sums(run: RunState) -> CheckSums:
    assert run.results.dynamics is not None
    return run.results.dynamics


def _dynamics(run: RunState, optimizer: torch.optim.Optimizer) -> DyingNeuronDynamics:
    """What watches the neurons while the network trains."""
    prune = run.recipe.prune
    options = prune.dynamics
    target = prune.target if prune.mode == "dynamic" else None
    return DyingNeuronDynamics(
        run.model, run.example, when=timetable(run.recipe, len(run.train_images)), optimizer=optimizer,
        kind=target.kind if target else None, value=target.value if target else 1.0,
        patience=options.patience, zero=options.zero, ramp=options.ramp, margin=options.margin,
        max_share=options.max_share, dying_entropy=options.dying_entropy, min_samples=prune.observe.min_samples,
        importance=importance_of(run, training=True), scope=prune.ranking if target else "local",
        limits=run.limits if target else Limits(), dense=run.dense, fold=prune.fold,
    )  # fmt: skip


def _note(run: RunState, check: Check, epoch: float) -> None:
    """Adds a check to the events and to the sums that the report gives."""
    for row in check.layers:
        values = dataclasses.asdict(row)
        run.log(event="check", stage="train", check=check.number, epoch=epoch, step=check.step, **values)
    sums = _sums(run)
    sums.checks = check.number
    sums.died += sum(row.died for row in check.layers)
    sums.reactivated += sum(row.reactivated for row in check.layers)
    sums.restored += sum(row.restored for row in check.layers)
    sums.removed += sum(row.removed for row in check.layers)
    sums.dead, sums.neurons = sum(row.dead for row in check.layers), sum(row.neurons for row in check.layers)
    sums.exact += check.exact
    sums.max_abs_diff = max(sums.max_abs_diff, check.max_abs_diff)
    if check.removed:
        run.describe()


def _removed_while_training(run: RunState, dynamics: DyingNeuronDynamics) -> Removal:
    """The same facts that a removal stage notes."""
    sums, options = _sums(run), run.recipe.prune.target
    now = baseline(run.model, run.example, verify=run.limits.verify)
    achieved, met = None, True
    if options is not None:
        target = options.target
        achieved = target.measure(now.report.flops, now.report.params, now.neurons, run.dense)
        met = dynamics.stopped is None and (not target.known_beforehand or target.reached(achieved))
    return Removal(sums.dead, sums.neurons, dynamics.skipped, sums.exact, sums.max_abs_diff, achieved, met)
