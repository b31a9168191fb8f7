"""One run for each combination of varied options, with one dense training for those that train alike."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .checks import check_folder, check_ranks, check_recipe, check_writable
from .compare import SWEEP, check_output, compare_runs, write_comparison
from .environment import pick_device
from .errors import InputError, RunError, TargetError
from .files import atomic_write
from .recipe import listed_values, load_recipe, located, write_recipe
from .run import Track, run_recipe, train_dense
from .schema import Recipe

MAX_RUNS = 1000
_MAX_NAME = 100


@dataclass(frozen=True)
class Combination:
    """One recipe of a sweep.

    Attributes:
        values: ``a.b=value`` for each varied option.
        recipe: with these values.
    """

    values: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Planned(Combination):
    """A combination and where it runs.

    Attributes:
        folder: its name inside the sweep's folder.
        dense: name of the folder whose training it starts from; None where it trains by itself.
    """

    folder: str
    dense: str | None


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
        overrides: as for `recipe.load_recipe`.
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
    runs = _placed(combinations, _earlier(folder, resume), folder)
    _check(runs, folder, path, overrides, track)
    check_output(folder / "compare")
    folder.mkdir(parents=True, exist_ok=True)
    _write_index(runs, folder)
    outcome = Outcome(folder)
    trained: dict[str, str] = {}  # dense folders, with the reason where that failed
    for number, run in enumerate(runs, 1):
        place = folder / run.folder
        say(f"run {number} of {len(runs)}: {place}")
        try:
            if run.dense is not None and not (place / "recipe.yaml").is_file():
                if run.dense not in trained:
                    trained[run.dense] = _train_dense(run.recipe, folder / run.dense, device, track)
                if trained[run.dense]:
                    raise RunError(trained[run.dense])
                _begin(run.recipe, place, folder / run.dense)
            outcome.reports[run.folder] = run_recipe(run.recipe, place, resume=True, device=device, track=track)
        except (InputError, RunError) as error:
            outcome.failed[run.folder] = "; ".join(str(error).splitlines())
    if outcome.reports:
        write_comparison(folder / "compare", compare_runs([folder / name for name in outcome.reports]))
    return outcome


def combine(path: str | os.PathLike[str], overrides: Sequence[str], vary: Sequence[str]) -> list[Combination]:
    """The recipes of all combinations of values, the last option varying fastest.

    Raises:
        InputError: all problems of ``vary`` itself; where there are none, of the recipes.
    """
    options = _options(vary)
    grid = list(itertools.islice(itertools.product(*options.values()), MAX_RUNS + 1))
    if len(grid) > MAX_RUNS:
        raise InputError(f"--vary: expected at most {MAX_RUNS} combinations, found more")
    found: list[Combination] = []
    wrong: dict[tuple[str, ...], Sequence[str]] = {}
    for values in grid:
        try:
            found.append(Combination(values, load_recipe(path, overrides, values)))
        except InputError as error:
            wrong[values] = error.problems
    _raise(wrong, grid)
    seen: dict[str, Combination] = {}
    problems = []
    for one in found:
        same = seen.setdefault(_key(one.recipe), one)
        if same is not one:
            problems.append(
                f"--vary: expected combinations that differ, found the same recipe for {' '.join(same.values)} and for "
                f"{' '.join(one.values)}"
            )
    if problems:
        raise InputError(*problems)
    return found


def _options(vary: Sequence[str]) -> dict[str, list[str]]:
    """The overrides of each varied option, by its name."""
    options: dict[str, list[str]] = {}
    problems: list[str] = [] if vary else ["--vary: expected at least one option, found none"]
    for text in vary:
        try:
            values = listed_values(text)
        except InputError as error:
            problems += error.problems
            continue
        name = values[0].partition("=")[0]
        if name in options:
            problems.append(f"--vary {name}: expected each option once, found it again")
        repeated = [value.partition("=")[2] for value, times in Counter(values).items() if times > 1]
        problems += [f"--vary {name}: expected each value once, found {value} again" for value in repeated]
        options[name] = values
    if problems:
        raise InputError(*problems)
    return options


def _raise(wrong: Mapping[tuple[str, ...], Sequence[str]], grid: Sequence[tuple[str, ...]]) -> None:
    """Raises the problems of all combinations: each once, with a combination where it is not clear which have it."""
    times = Counter(problem for problems in wrong.values() for problem in set(problems))
    lines: dict[tuple[str, str], str] = {}
    for values, problems in wrong.items():
        for problem in problems:
            culprit = next((value for value in values if problem.startswith(f"--vary {value}: ")), "")
            option, rest = culprit.partition("=")[0], problem.removeprefix(f"--vary {culprit}: ")
            suspects = sum(not culprit or culprit in others for others in grid)
            if times[problem] < suspects:
                problem += f" (with {' '.join(f'--vary {value}' for value in values)})"
            # an option that does not exist is told once, not once for each value
            lines.setdefault((option, rest), problem)
    if lines:
        raise InputError(*lines.values())


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
    _raise(wrong, [run.values for run in runs])


def _earlier(folder: Path, resume: bool) -> list[Planned]:
    """The runs of the sweep that lies in the folder.

    Raises:
        InputError: the folder may not be written to, or holds something else.
    """
    check_writable(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
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
    try:
        return [
            Planned(tuple(run["values"]), Recipe.model_validate(run["recipe"]), str(run["folder"]), run["dense"])
            for run in json.loads(index.read_text(encoding="utf-8"))["runs"]
        ]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise InputError(f"{index}: expected the list of a sweep's runs, found damage: {error!r}"[:300]) from error


def _placed(combinations: Sequence[Combination], earlier: Sequence[Planned], folder: Path) -> list[Planned]:
    """Gives every combination its folder: the one it had, or else a new one."""
    known = {_key(run.recipe): run for run in earlier}
    wanted = {_key(one.recipe) for one in combinations}
    lost = [run.folder for key, run in known.items() if key not in wanted]
    if lost:
        raise InputError(
            f"--output: expected the values of the sweep in {folder}, and perhaps more, found none that make "
            f"{', '.join(lost[:8])}" + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        )
    taken = {run.folder.casefold() for run in earlier}
    trainings = {_training(run.recipe): run.dense for run in earlier if run.dense}
    runs = []
    for one in combinations:
        before, training = known.get(_key(one.recipe)), _training(one.recipe)
        name = before.folder if before else _free(_name(one.values), taken)
        taken.add(name.casefold())
        dense = None if training is None else trainings.setdefault(training, f"dense-{len(trainings) + 1}")
        runs.append(Planned(one.values, one.recipe, name, dense))
    return runs


def _free(name: str, taken: Collection[str]) -> str:
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free.casefold() not in taken)


def _write_index(runs: Sequence[Planned], folder: Path) -> None:
    listed = [
        {"folder": run.folder, "dense": run.dense, "values": run.values, "recipe": run.recipe.model_dump(mode="json")}
        for run in runs
    ]
    with atomic_write(folder / SWEEP) as file:
        json.dump({"runs": listed}, file, indent=1)
        file.write("\n")


def _key(recipe: Recipe) -> str:
    return json.dumps(recipe.model_dump(mode="json"), sort_keys=True)


def _training(recipe: Recipe) -> str | None:
    """All that weights and events depend on when the removal begins; None where there is nothing to share."""
    if recipe.prune.mode != "after_training" or recipe.train.epochs == 0:
        return None
    parts: Any = {"seed": True, "model": True, "data": True, "train": True, "prune": {"observe", "dynamics"}}
    return json.dumps(recipe.model_dump(mode="json", include=parts), sort_keys=True)


def _name(values: Sequence[str]) -> str:
    """A folder's name such as ``flops=0.5,seed=1``."""
    options = [value.partition("=")[0].split(".") for value in values]
    parts = []
    for value, path in zip(values, options, strict=True):
        # as much of the option's name as tells it from the others
        depths = (d for d in range(1, len(path)) if sum(other[-d:] == path[-d:] for other in options) == 1)
        depth = next(depths, len(path))
        parts.append(f"{_plain('.'.join(path[-depth:]))}={_plain(value.partition('=')[2])}")
    return ",".join(parts)[:_MAX_NAME]


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", re.sub(r"[\[\]{}'\"]", "", text))


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
    with (dense / "checkpoint.pt").open("rb") as source, atomic_write(folder / "checkpoint.pt", "wb") as file:
        shutil.copyfileobj(source, file)
    write_recipe(recipe, folder / "recipe.yaml")  # last: with it the folder is that of a run
