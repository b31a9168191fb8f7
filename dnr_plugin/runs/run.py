"""A compression run, stage by stage: train, remove, fine-tune, report. Every stage can be resumed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dnr_plugin.data.registry import load_data
from dnr_plugin.devices import pick_device
from dnr_plugin.errors import InputError, RunError
from dnr_plugin.files import locked
from dnr_plugin.models.activations.recording import activation_summary
from dnr_plugin.models.saved import describe, write_saved
from dnr_plugin.network.runtimes import RUNTIMES
from dnr_plugin.pruning.targets import baseline
from dnr_plugin.recipe.load import write_recipe
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.reports.run_report import write_report
from dnr_plugin.runs.checks import as_pruned, check_ranks, check_recipe, check_sizes
from dnr_plugin.runs.latencies import measured_latencies
from dnr_plugin.runs.outcome import Measured, outcome
from dnr_plugin.runs.removal_stage import TIMED, prune, timed_images
from dnr_plugin.runs.run_folder import check_folder, check_space, remove_checkpoints
from dnr_plugin.runs.state import RunState, Track, quiet
from dnr_plugin.runs.timetable import check_timetable
from dnr_plugin.runs.training_stage import train


def run_recipe(
    recipe: Recipe,
    output: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    track: Track = quiet,
) -> dict[str, Any]:
    """Runs a recipe and fills its folder with the model, the report, the events and the plots.

    Args:
        recipe: from `load.load_recipe`.
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
    run = begun(recipe, folder, pick_device(device), track)
    check_space(folder, run.model)
    with _begun_in(folder, run, resume) as state:
        state = _train_dense(run, state)
        if run.stage == "prune":
            with run.timed("prune"):
                prune(run)
            run.describe()
            run.stage, run.epoch = "finetune", 0
            run.save()
            state = None
        train(run, "finetune", state)
        return _finish(run)


@contextlib.contextmanager
def _begun_in(folder: Path, run: RunState, resume: bool) -> Iterator[Mapping[str, Any] | None]:
    """Keeps the folder to this run, and gives the state of an interrupted one.

    Wrong input that shows inside shows too late: the folder has been written to by then.
    """
    with locked(folder):
        check_folder(folder, run.recipe, resume)  # as another process may have left it meanwhile
        state = run.restore() if resume else None
        try:
            yield state
        except InputError as error:
            raise RunError(str(error)) from error


def train_dense(recipe: Recipe, folder: Path, *, device: str = "auto", track: Track = quiet) -> RunState:
    """Trains as `run_recipe` does, or goes on with it, and stops before the removal.

    A folder that holds a copy of the ``checkpoint.pt`` this leaves, and a ``recipe.yaml`` that trains the same, is that
    of a run interrupted right there.

    Returns:
        The run at this point: its data, the trained model, and ``results.dense_accuracy``.

    Raises:
        InputError: as `run_recipe`.
        RunError: as `run_recipe`.
    """
    check_ranks()
    check_folder(folder, recipe, resume=True)
    run = begun(recipe, folder, pick_device(device), track)
    check_space(folder, run.model)
    with _begun_in(folder, run, resume=True) as state:
        _train_dense(run, state)
    return run


def begun(recipe: Recipe, folder: Path, device: torch.device, track: Track) -> RunState:
    """A run at its beginning: checked, with its data loaded; nothing is written.

    Raises:
        InputError: recipe, model and data do not fit each other.
    """
    prepared = check_recipe(recipe)
    data = load_data(recipe.data, recipe.seed)
    assert (data.num_classes, data.in_channels, data.image_size) == prepared.shape
    check_sizes(recipe, len(data.train))
    check_timetable(recipe, len(data.train))
    run = RunState(prepared, data, folder, device, track)
    _check_runtime(run)
    return run


def _check_runtime(run: RunState) -> None:
    """Refuses a network that the runtime of a target cannot run: compiles or exports it once, at its full widths."""
    name = run.recipe.prune.runtime
    if name == "eager":
        return
    runtime = RUNTIMES[name]
    try:
        network = as_pruned(run.recipe, run.model, run.example)
        runtime.prepared(network, runtime.inputs(timed_images(run)))
    except RunError as error:
        raise InputError(f"prune.runtime: expected one that can run the network, found {name}: {error}") from error


def _train_dense(run: RunState, state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Everything up to the removal; returns the state of an interrupted stage that comes later."""
    write_recipe(run.recipe, run.folder / "recipe.yaml")
    # as of the checkpoint: what a killed epoch wrote after it will be written again
    run.write_events("" if state is None else state["events"])
    run.describe()
    if run.stage == "train":
        train(run, "train", state)
        mode, accuracy = run.recipe.prune.mode, run.accuracy()
        run.stage = "prune" if mode == "after_training" else "finetune"
        if mode != "dynamic":
            run.results.dense_accuracy = accuracy
        if mode != "after_training":
            run.results.accuracy_before_finetune = accuracy
        run.epoch, state = 0, None
        run.save()
    if run.recipe.prune.prior and run.stage == "prune" and not run.histories:
        raise InputError("prune.prior: expected neurons that were checked while training, found no check of any")
    return state


def _finish(run: RunState) -> dict[str, Any]:
    """Measures the result and writes everything that stays."""
    now = baseline(run.model, run.example, verify=run.limits.verify)
    latencies, unmeasured = measured_latencies(run)
    activation = activation_summary(run.model, run.example)
    measured = Measured(run.accuracy(), latencies, unmeasured, TIMED, activation)
    events = run.read_events()
    report = outcome(run.recipe, run.device, run.dense, now, run.results, events, measured)
    write_saved(run.model, run.folder, describe(run.model, fresh=run.untouched))
    write_report(run.folder, report, events)
    remove_checkpoints(run.folder)
    return report
