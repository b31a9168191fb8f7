"""One run for each combination of varied options, with one dense training for those that train alike."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dnr_plugin.devices import pick_device
from dnr_plugin.errors import InputError, RunError, TargetError, one_line
from dnr_plugin.files import atomic_write, check_writable, contents, inside, locked
from dnr_plugin.recipe.load import located, write_recipe
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.reports.comparison import SWEEP, compare_runs, listed_runs
from dnr_plugin.reports.comparison_report import check_output, write_comparison
from dnr_plugin.runs.checks import check_ranks, check_recipe
from dnr_plugin.runs.combinations import Planned, combine, raise_wrong, with_folders
from dnr_plugin.runs.run import run_recipe, train_dense
from dnr_plugin.runs.run_folder import CHECKPOINT, check_folder
from dnr_plugin.runs.state import Track


@dataclass
class Outcome:
    """What became of a sweep's runs.

    Attributes:
        folder: of the sweep.
        reports: what ``report.json`` holds, for each finished run by the name of its folder.
        failed: why, for each run that has no result.
    """

    folder: Path
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def missed(self) -> list[str]:
        """Finished runs that did not reach their target."""
        return [name for name, report in self.reports.items() if not report["target"]["reached"]]

    def raise_problems(self) -> None:
        """Raises what ends the command once all runs are through.

        Raises:
            RunError: a run failed.
            TargetError: none did, but one missed its target.
        """
        runs = len(self.reports) + len(self.failed)
        missed = f"{len(self.missed)} of {runs} runs missed their target, see {', '.join(self.missed)} in {self.folder}"
        if self.failed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.failed.items())
            raise RunError(
                f"{len(self.failed)} of {runs} runs failed: {reasons}" + (f"; {missed}" if self.missed else "")
            )
        if self.missed:
            raise TargetError(missed, self.reports[self.missed[0]]["target"]["achieved"])


def run_sweep(
    path: str | os.PathLike[str],
    overrides: Sequence[str],
    vary: Sequence[str],
    output: Path | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    track: Track = lambda items, total, what: items,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Runs a recipe once for each combination of values, then compares the runs.

    Every run ends as it would alone. Recipes that train alike, up to the removal, share that training: it is done in
    ``dense-1`` and so on, which stay, so that more values can be added later.

    Args:
        path: the recipe's file.
        overrides: as for `load.load_recipe`.
        vary: ``a.b=v1,v2`` each; all combinations of their values are run.
        output: folder with one folder for each run; ``sweeps/<recipe name>`` by default.
        resume: go on with what lies in the folder; the values may be more than they were, not others.
        device: "auto", "cpu" or "cuda".
        track: see `run.run_recipe`.
        say: told of each run when it begins.

    Returns:
        Reports of the runs; one that fails or misses its target does not stop the others.

    Raises:
        InputError: a problem of any combination, or of the folder; nothing was written.
    """
    check_ranks()
    pick_device(device)
    combinations = combine(path, overrides, vary)
    folder = output if output is not None else Path("sweeps") / combinations[0].recipe.name
    runs = with_folders(combinations, _earlier(folder, resume), folder)
    _check(runs, folder, path, overrides, track)
    check_output(folder / "compare")
    with locked(folder):
        _earlier(folder, resume)  # as another process may have left it meanwhile
        return _run_all(runs, folder, device, track, say)


def _run_all(runs: Sequence[Planned], folder: Path, device: str, track: Track, say: Callable[[str], None]) -> Outcome:
    _write_index(runs, folder)
    outcome = Outcome(folder)
    trained: dict[str, str] = {}  # dense folders, with the reason where that failed
    for number, run in enumerate(runs, 1):
        run_folder = folder / run.folder
        say(f"run {number} of {len(runs)}: {run_folder}")
        try:
            if run.dense is not None and not (run_folder / "recipe.yaml").is_file():
                if run.dense not in trained:
                    trained[run.dense] = _train_dense(run.recipe, folder / run.dense, device, track)
                if trained[run.dense]:
                    raise RunError(trained[run.dense])
                _begin(run.recipe, run_folder, folder / run.dense)
            outcome.reports[run.folder] = run_recipe(run.recipe, run_folder, resume=True, device=device, track=track)
        except (InputError, RunError) as error:
            outcome.failed[run.folder] = "; ".join(str(error).splitlines())
    if outcome.reports:
        write_comparison(folder / "compare", compare_runs([folder / name for name in outcome.reports]))
    return outcome


def _check(
    runs: Sequence[Planned], folder: Path, path: str | os.PathLike[str], overrides: Sequence[str], track: Track
) -> None:
    """Checks all that can be known before the first run."""
    wrong: dict[tuple[str, ...], Sequence[str]] = {}
    for run in track(runs, len(runs), "checking"):
        try:
            check_recipe(run.recipe)
            if (folder / run.folder / "recipe.yaml").is_file():
                check_folder(folder / run.folder, run.recipe, resume=True)
        except InputError as error:
            wrong[run.values] = located(error, path, overrides, run.values).problems
    raise_wrong(wrong, [run.values for run in runs])


def _earlier(folder: Path, resume: bool) -> list[Planned]:
    """The runs of the sweep that lies in the folder.

    Raises:
        InputError: the folder may not be written to, or holds something else.
    """
    check_writable(folder)
    if not contents(folder):
        return []
    index = folder / SWEEP
    if not index.is_file():
        raise InputError(
            f"--output: expected an empty folder or that of a sweep, found {folder} with other files in it"
        )
    if not resume:
        raise InputError(
            f"--output: {folder} holds a sweep already: add --resume to go on with it, or name another folder"
        )
    listed = listed_runs(index)
    for run in listed:
        if run.get("dense") is not None:
            inside(folder, run["dense"], index)
    try:
        return [
            Planned(tuple(run["values"]), Recipe.model_validate(run["recipe"]), run["folder"], run["dense"])
            for run in listed
        ]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise InputError(f"{index}: expected the list of a sweep's runs, found damage: {one_line(error)}") from error


def _write_index(runs: Sequence[Planned], folder: Path) -> None:
    listed = [
        {"folder": run.folder, "dense": run.dense, "values": run.values, "recipe": run.recipe.model_dump(mode="json")}
        for run in runs
    ]
    with atomic_write(folder / SWEEP) as file:
        json.dump({"runs": listed}, file, indent=1)
        file.write("\n")


def _train_dense(recipe: Recipe, folder: Path, device: str, track: Track) -> str:
    """Trains what runs share, or goes on with it; returns why that failed, or nothing."""
    # name and description take no part, and could differ from run to run
    update = {"name": folder.name, "description": "the training that runs of a sweep share"}
    try:
        train_dense(recipe.model_copy(update=update), folder, device=device, track=track)
    except (InputError, RunError) as error:
        return str(error)
    return ""


def _begin(recipe: Recipe, folder: Path, dense: Path) -> None:
    """Makes the folder of a run that was interrupted between training and removal."""
    folder.mkdir(exist_ok=True)
    with (dense / CHECKPOINT).open("rb") as source, atomic_write(folder / CHECKPOINT, "wb") as file:
        shutil.copyfileobj(source, file)
    write_recipe(recipe, folder / "recipe.yaml")  # last: with it the folder is that of a run
