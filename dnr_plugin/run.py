"""A compression run, stage by stage: train, remove, fine-tune, report. Every stage can be resumed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import activations, checkpoint, report
from .batchnorm import recalibrate_batchnorm
from .checks import (
    check_folder,
    check_forward,
    check_ranks,
    check_recipe,
    check_sizes,
    check_space,
    check_timetable,
    example_image,
    limits_of,
    timetable,
)
from .data import Data, derive_seed, load_data
from .dynamics import Check, DyingNeuronDynamics
from .environment import pick_device, placed
from .errors import InputError, RunError, TargetError
from .files import atomic_write
from .graph import eval_outputs, kept_modes
from .history import NeuronHistory
from .importance import DyingNeuronImportance
from .layers import Limits
from .measure import flop_report, latencies
from .models import build_model
from .outcome import outcome
from .planning import KEPT_TARGETS, Baseline, Plan, baseline, measure, plan_removal, reached
from .recipe import write_recipe
from .removal import output_difference, prune_neurons, renumbered
from .repair import repair_network
from .schema import Recipe, TargetOptions
from .train import Progress, Trainer, evaluate

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]

_BATCH = 250  # images per step where nothing is learned: observing, recalibrating
_SUMS = ("checks", "dead", "neurons", "died", "reactivated", "restored", "removed", "exact", "max_abs_diff")
_TIMED = 8  # images per forward pass where latency is measured


def _quiet(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    return items


def run_recipe(
    recipe: Recipe,
    output: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    track: Track = _quiet,
) -> dict[str, Any]:
    """Runs a recipe and fills its folder with the model, the report, the events and the plots.

    Args:
        recipe: from `recipe.load_recipe`.
        output: the folder; ``runs/<name>`` by default.
        resume: go on with what lies in the folder. A run that was killed goes on after its last finished epoch and ends
            as if it had not been; a finished one is only read. The recipe must be the same, but for ``prune`` and
            ``finetune`` if the run has not come to these.
        device: "auto", "cpu" or "cuda".
        track: wraps an iterable for display, with its length and a description.

    Returns:
        What ``report.json`` holds. ``report["target"]["reached"]`` tells whether the target was reached; if not, the
        closest that could be reached was.

    Raises:
        InputError: recipe, data, folder or target cannot be used; nothing was written.
        RunError: the run failed underway: the loss became NaN (`DivergedError`), an image cannot be read.
    """
    check_ranks()
    folder = Path(output) if output is not None else Path("runs") / recipe.name
    finished = check_folder(folder, recipe, resume)
    if finished is not None:
        return finished
    run = prepared(recipe, folder, pick_device(device), track)
    check_space(folder, run.model)
    try:
        return run.go(resume)
    except InputError as error:  # the folder has been written to by now
        raise RunError(str(error)) from error


def train_dense(recipe: Recipe, folder: Path, *, device: str = "auto", track: Track = _quiet) -> _Run:
    """Trains as `run_recipe` does, or goes on with it, and stops before the removal.

    A folder that holds a copy of the ``checkpoint.pt`` this leaves, and a ``recipe.yaml`` that trains the same, is that
    of a run interrupted right there.

    Returns:
        The run at this point: its data, the trained model, and ``results["dense_accuracy"]``.

    Raises:
        InputError: as `run_recipe`.
        RunError: as `run_recipe`.
    """
    check_ranks()
    check_folder(folder, recipe, resume=True)
    run = prepared(recipe, folder, pick_device(device), track)
    check_space(folder, run.model)
    try:
        run.train_dense(resume=True)
    except InputError as error:
        raise RunError(str(error)) from error
    return run


def prepared(recipe: Recipe, folder: Path, device: torch.device, track: Track) -> _Run:
    """Loads the data, builds the model and checks that they fit each other and the recipe."""
    check_recipe(recipe)
    torch.manual_seed(derive_seed(recipe.seed, "weights"))
    data = load_data(recipe.data, recipe.seed)
    check_sizes(recipe, len(data.train))
    check_timetable(recipe, len(data.train))
    model = build_model(recipe.model, data.num_classes, data.in_channels, data.image_size)
    example = example_image(data.in_channels, data.image_size)
    check_forward(model, example, data.num_classes)
    dense = baseline(model, example)
    return _Run(recipe, folder, device, data, model, example, limits_of(recipe), dense, track)


class _Run:
    """The state of a run and its stages, in the order in which they run."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        data: Data,
        model: nn.Module,
        example: Tensor,
        limits: Limits,
        dense: Baseline,
        track: Track,
    ) -> None:
        self.recipe, self.folder, self.device, self.track = recipe, folder, device, track
        self.data, self.train_images, self.test_images = data, data.train.to(device), data.test.to(device)
        self.model, self.example = placed(model, device), example.to(device)
        self.limits, self.dense = limits, dense
        self.stage, self.epoch = "train", 0
        self.results: dict[str, Any] = {"seconds": {"train": 0.0, "prune": 0.0, "finetune": 0.0}}
        self.events = folder / "events.jsonl"
        self.unpruned: nn.Module | None = None  # while neurons are removed
        self.gone: dict[str, list[int]] = {}  # removed by steps so far, as numbered in the dense network
        self.histories: dict[str, NeuronHistory] = {}  # of the neurons that are left, from training on

    def train_dense(self, resume: bool) -> Mapping[str, Any] | None:
        """Everything up to the removal; returns the state of an interrupted stage that comes later."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_recipe(self.recipe, self.folder / "recipe.yaml")
        state = self.restore() if resume else None
        # as of the checkpoint: what a killed epoch wrote after it will be written again
        self.write_events("" if state is None else state["events"])
        self.architecture = json.dumps(checkpoint.describe(self.model))
        if self.stage == "train":
            self.train("train", state)
            mode, accuracy = self.recipe.prune.mode, self.accuracy()
            self.stage = "prune" if mode == "after_training" else "finetune"
            if mode != "dynamic":
                self.results["dense_accuracy"] = accuracy
            if mode != "after_training":
                self.results["accuracy_before_finetune"] = accuracy
            self.epoch, state = 0, None
            self.save()
        if self.recipe.prune.prior and self.stage == "prune" and not self.histories:
            raise InputError("prune.prior: expected neurons that were checked while training, found no check of any")
        return state

    def go(self, resume: bool) -> dict[str, Any]:
        state = self.train_dense(resume)
        if self.stage == "prune":
            with self.timed("prune"):
                self.prune()
            self.architecture = json.dumps(checkpoint.describe(self.model))
            self.stage, self.epoch = "finetune", 0
            self.save()
            state = None
        self.train("finetune", state)
        return self.finish()

    def train(self, stage: str, state: Mapping[str, Any] | None) -> None:
        """Trains for the epochs of a stage that are left, with a checkpoint after each."""
        options = self.recipe.train if stage == "train" else self.recipe.finetune
        if options.epochs == 0:
            return
        seed = derive_seed(self.recipe.seed, stage)
        torch.manual_seed(seed)  # of dropout and the like
        trainer = Trainer(self.model, self.train_images, options, seed, self.recipe.data.augment)
        dynamics = self.dynamics(trainer.optimizer) if stage == "train" else None
        if state is not None and "optimizer" in state:
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.schedule.load_state_dict(state["schedule"])
            if dynamics is not None:
                dynamics.load_state_dict(state["dynamics"])
            _set_random_state(state)
        trainer.dynamics = dynamics
        if dynamics is not None:
            self.results.setdefault("dynamics", dict.fromkeys(_SUMS, 0))
        with dynamics or contextlib.nullcontext():
            for number in range(self.epoch, options.epochs):
                start = time.perf_counter()
                with self.timed(stage):
                    done = trainer.epoch(number, self.shown(f"{stage} epoch {number + 1}/{options.epochs}"))
                training = time.perf_counter() - start
                self.epoch = number + 1
                for check in done.checks:
                    self.note(check, check.step / trainer.steps_per_epoch)
                if dynamics is not None and dynamics.stopped and "stopped" not in self.results["dynamics"]:
                    self.results["dynamics"]["stopped"] = dynamics.stopped
                    self.log(event="stopped", epoch=number + 1, reason=dynamics.stopped)
                self.log(
                    event="epoch", stage=stage, epoch=number + 1, loss=done.loss, lr=done.lr, accuracy=self.accuracy(),
                    seconds=time.perf_counter() - start, training_seconds=training,
                    check_seconds=sum(check.seconds for check in done.checks),
                )  # fmt: skip
                self.save(trainer)
            if dynamics is not None:
                self.histories = dynamics.histories
                if not dynamics.checks:
                    self.results["dynamics"]["stopped"] = "no check saw min_samples images at every layer"
                if self.recipe.prune.mode != "after_training":
                    self.results["removal"] = self.removed_while_training(dynamics)

    def dynamics(self, optimizer: torch.optim.Optimizer) -> DyingNeuronDynamics:
        """What watches the neurons while the network trains."""
        prune = self.recipe.prune
        options = prune.dynamics
        target = prune.target if prune.mode == "dynamic" else None
        return DyingNeuronDynamics(
            self.model, self.example, when=timetable(self.recipe, len(self.train_images)), optimizer=optimizer,
            kind=target.kind if target else None, value=target.value if target else 1.0,
            patience=options.patience, zero=options.zero, ramp=options.ramp, margin=options.margin,
            max_share=options.max_share, dying_entropy=options.dying_entropy, min_samples=prune.observe.min_samples,
            importance=self.importance(training=True), scope=prune.ranking, limits=self.limits if target else Limits(),
            dense=self.dense, fold=prune.fold,
        )  # fmt: skip

    def note(self, check: Check, epoch: float) -> None:
        """Adds a check to the events and to the sums that the report gives."""
        for row in check.layers:
            values = dataclasses.asdict(row)
            self.log(event="check", stage="train", check=check.number, epoch=epoch, step=check.step, **values)
        sums = self.results["dynamics"]
        sums["checks"] = check.number
        for what in ("died", "reactivated", "restored", "removed"):
            sums[what] += sum(getattr(row, what) for row in check.layers)
        sums["dead"], sums["neurons"] = (
            sum(getattr(row, what) for row in check.layers) for what in ("dead", "neurons")
        )
        sums["exact"] += check.exact
        sums["max_abs_diff"] = max(sums["max_abs_diff"], check.max_abs_diff)
        if check.removed:
            self.architecture = json.dumps(checkpoint.describe(self.model))

    def removed_while_training(self, dynamics: DyingNeuronDynamics) -> dict[str, Any]:
        """The same facts that `prune` notes."""
        sums, target = self.results["dynamics"], self.recipe.prune.target
        left = baseline(self.model, self.example)
        achieved, met = None, True
        if target is not None:
            achieved = measure(target.kind, left.report.flops, left.report.params, left.neurons, self.dense)
            met = dynamics.stopped is None and (target.kind == "dead" or reached(target.kind, achieved, target.value))
        return {
            "dead": sums["dead"],
            "neurons": sums["neurons"],
            "skipped": dynamics.skipped,
            "exact_neurons": sums["exact"],
            "max_abs_diff": sums["max_abs_diff"],
            "achieved": achieved,
            "reached": met,
        }

    def prune(self) -> None:
        """Observes and removes, in the recipe's number of steps."""
        options = self.recipe.prune
        target = _given(options.target)
        done: dict[str, Any] = {"skipped": [], "exact_neurons": 0, "max_abs_diff": 0.0, "reached": True, "repair": None}
        self.unpruned, self.gone = copy.deepcopy(self.model) if options.repair else None, {}
        for step in range(1, options.steps + 1):
            importance = self.importance()
            self.observe(importance)
            try:
                plan = self.plan(importance, step_value(target.kind, target.value, step, options.steps))
            except TargetError as error:
                plan, done["reached"] = error.plan, False
            if step == 1:
                done["dead"], done["neurons"], done["skipped"] = plan.dead, plan.neurons, plan.skipped
            self.remove(plan, importance, step, done)
            self.histories = importance.histories
            done["achieved"] = plan.achieved
            if not done["reached"]:
                break
        self.results["removal"] = done
        self.results["accuracy_before_finetune"] = self.accuracy()

    def plan(self, importance: DyingNeuronImportance, value: float) -> Plan:
        options = self.recipe.prune
        target = _given(options.target)
        if target.kind != "latency":
            inputs = self.example
        else:
            inputs = self.timed_images()
            if self.dense.model is None:
                self.dense = baseline(self.model, self.example, keep_model=True)
        for _ in self.track([None], 1, "planning the removal"):
            plan = plan_removal(
                self.model, inputs, importance, target.kind, value,
                scope=options.ranking, limits=self.limits, dense=self.dense,
            )  # fmt: skip
        return plan

    def importance(self, training: bool = False) -> DyingNeuronImportance:
        options = self.recipe.prune
        read, score = options.observe, options.criterion
        if training and score == "redundancy":  # which is scored after training, and here nothing is
            score = "variation"
        settings: dict[str, Any] = {"moments": score == "redundancy"}
        if not training:
            settings |= {"histories": self.histories, "prior": options.prior}
        return DyingNeuronImportance(score, threshold=read.threshold, share=read.share, bins=read.bins, **settings)

    def observe(self, importance: DyingNeuronImportance) -> None:
        wanted = self.recipe.prune.observe
        with importance.observe(self.model) as observer, kept_modes(self.model), torch.no_grad():
            self.model.eval()
            for images in self.calibration(wanted.samples, "observing"):
                self.model(images)
        seen = observer.samples
        if seen < wanted.min_samples:
            raise InputError(
                f"prune.observe.min_samples: expected at most {seen}, the training images there are, "
                f"found {wanted.min_samples}"
            )

    def remove(self, plan: Plan, importance: DyingNeuronImportance, step: int, done: dict[str, Any]) -> None:
        """Takes what is exactly zero first, to measure that nothing changes, then the rest."""
        exact = {name: gone for name, gone in plan.zero.items() if gone}
        if exact:
            probe = next(iter(self.train_images.batches(_BATCH)))[0]
            before = eval_outputs(self.model, probe)
            prune_neurons(self.model, self.example, exact, importance=importance)
            done["exact_neurons"] += sum(map(len, exact.values()))
            done["max_abs_diff"] = max(
                done["max_abs_diff"], output_difference(before, eval_outputs(self.model, probe))[0]
            )
        rest = {name: renumbered(gone, exact.get(name, [])) for name, gone in plan.removals.items()}
        prune_neurons(self.model, self.example, rest, importance=importance, fold=self.recipe.prune.fold)
        if self.recipe.prune.repair:
            self.repair(plan, done)
        recalibrate = self.recipe.prune.recalibration
        if recalibrate:
            batches = -(-min(recalibrate, len(self.train_images)) // _BATCH)
            images = self.calibration(recalibrate, "recalibrating BatchNorm", self.recipe.data.augment)
            recalibrate_batchnorm(self.model, images, batches)
        for name, gone in plan.removals.items():
            self.log(
                event="removed", step=step, layer=name, removed=len(gone), exactly_zero=len(plan.zero.get(name, [])),
                neurons=plan.sizes[name] - len(gone),
            )  # fmt: skip

    def repair(self, plan: Plan, done: dict[str, Any]) -> None:
        """Fits the layers to the dense network's, whatever was removed in earlier steps."""
        assert self.unpruned is not None
        for name, neurons in plan.removals.items():
            earlier = self.gone.get(name, [])
            there = [n for n in range(plan.sizes[name] + len(earlier)) if n not in set(earlier)]
            self.gone[name] = sorted([*earlier, *(there[n] for n in neurons)])
        # augmented: on the very images it was trained on, the dense network is surer than on others
        images = self.calibration(self.recipe.prune.repair_samples, "repairing", self.recipe.data.augment)
        layers = repair_network(
            self.model, self.unpruned, self.example, self.gone, images, pairs=self.recipe.prune.repair_pairs,
            seed=self.recipe.seed,
        )  # fmt: skip
        errors = [(row.error_before, row.error_after) for row in layers if row.damping is not None]
        done["repair"] = {
            "layers": len(errors),
            "error_before": sum(before for before, _ in errors) / max(len(errors), 1),
            "error_after": sum(after for _, after in errors) / max(len(errors), 1),
            "left": [(row.layer, row.left) for row in layers if row.left is not None],
        }

    def finish(self) -> dict[str, Any]:
        """Measures the result and writes everything that stays."""
        left = baseline(self.model, self.example)
        measured = {
            "accuracy": self.accuracy(),
            "latency": self.latency(),
            "activation": activations.summary(self.model, self.example),
        }
        events = self.read_events()
        data = outcome(self.recipe, self.device, self.dense, left, self.results, events, measured)
        checkpoint.save_pruned(self.model, self.folder)
        report.write_report(self.folder, data, events)
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        return data

    def timed_images(self) -> Tensor:
        return self.example.expand(_TIMED, -1, -1, -1).contiguous()

    def latency(self) -> dict[str, Any]:
        dense = build_model(
            self.recipe.model.model_copy(update={"checkpoint": None}),
            self.data.num_classes, self.data.in_channels, self.data.image_size,
        )  # fmt: skip
        before, after = latencies([placed(dense, self.device), self.model], self.timed_images())
        return {"batch": _TIMED, "dense_ms": 1e3 * before, "pruned_ms": 1e3 * after, "ratio": after / before}

    def calibration(self, samples: int, what: str, augment: Sequence[str] = ()) -> Iterator[Tensor]:
        """The first training images in an order of the seed."""
        for images, _ in self.labelled(samples, what, augment):
            yield images

    def labelled(self, samples: int, what: str, augment: Sequence[str] = ()) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of `calibration` with their labels."""
        left = min(samples, len(self.train_images))
        seed = derive_seed(self.recipe.seed, "calibration")
        steps = -(-left // _BATCH)
        size = -(-left // steps)  # equal batches: BatchNorm fails on one image
        batches = self.train_images.batches(size, seed=seed, augment=augment)
        for images, labels in self.track(islice(batches, steps), steps, what):
            yield images[:left], labels[:left]
            left -= len(images)

    def accuracy(self) -> float:
        return evaluate(self.model, self.test_images, progress=self.shown("evaluating"))

    def shown(self, what: str) -> Progress:
        return lambda items, total: self.track(items, total, what)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.results["seconds"][stage] += time.perf_counter() - start

    def log(self, **event: Any) -> None:
        with self.events.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def read_events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.events.read_text().splitlines()]

    def write_events(self, text: str) -> None:
        with atomic_write(self.events) as file:
            file.write(text)

    def save(self, trainer: Trainer | None = None) -> None:
        state = {
            "stage": self.stage,
            "epoch": self.epoch,
            "results": self.results,
            "events": self.events.read_text(),
            "architecture": self.architecture,
            "model": self.model.state_dict(),
            "histories": {name: history.state_dict() for name, history in self.histories.items()},
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        if trainer is not None:
            state["optimizer"] = trainer.optimizer.state_dict()
            state["schedule"] = trainer.schedule.state_dict()
            if trainer.dynamics is not None:
                state["dynamics"] = trainer.dynamics.state_dict()
        checkpoint.save_checkpoint(state, self.folder / "checkpoint.pt")

    def restore(self) -> dict[str, Any] | None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return None
        state = checkpoint.load_checkpoint_state(path)
        self.stage, self.epoch, self.results = state["stage"], state["epoch"], state["results"]
        histories = state.get("histories", {})  # those of 0.1.0's first checkpoints are not there
        self.histories = {name: NeuronHistory.from_state_dict(past) for name, past in histories.items()}
        # the builder is the recipe's own, which this run would call anyway
        self.model = checkpoint.build(json.loads(state["architecture"]), allow_import=True)
        self.model.load_state_dict(state["model"])
        self.model = placed(self.model, self.device)
        return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["random"])
    if "random_cuda" in state:
        torch.cuda.set_rng_state(state["random_cuda"])


def _given(target: TargetOptions | None) -> TargetOptions:
    """The target, which every mode but watch has (`PruneOptions`)."""
    assert target is not None
    return target


def step_value(kind: str, value: float, step: int, steps: int) -> float:
    """The target of one of several equal steps: the last one's is the recipe's own."""
    if kind in KEPT_TARGETS:
        return 1.0 - (1.0 - value) * step / steps
    return value * step / steps


def plan_recipe(
    recipe: Recipe, device: str = "auto", track: Track = _quiet
) -> tuple[Plan | None, list[dict[str, Any]], TargetError | None]:
    """What a recipe would remove from its model as it is now, in one step; writes nothing.

    Returns:
        The plan (None in mode watch, which removes nothing), the layers before and after, and the error where the
        target cannot be reached: then the plan is the closest.

    Raises:
        InputError: as `run_recipe`.
    """
    run = prepared(recipe, Path(os.devnull), pick_device(device), track)
    if recipe.prune.target is None:
        return None, report.layer_rows(run.dense.report, run.dense.report), None
    importance = run.importance()
    run.observe(importance)
    missed = None
    try:
        plan = run.plan(importance, recipe.prune.target.value)
    except TargetError as error:
        plan, missed = error.plan, error
    prune_neurons(run.model, run.example, plan.removals)
    return plan, report.layer_rows(run.dense.report, flop_report(run.model, run.example)), missed
