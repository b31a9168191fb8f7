"""The runs of a sweep: combinations of varied options, their names and folders, and which train alike."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnr_plugin.errors import InputError
from dnr_plugin.recipe.load import listed_values, load_recipe
from dnr_plugin.recipe.schema import Recipe

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


def combine(path: str | os.PathLike[str], overrides: Sequence[str], vary: Sequence[str]) -> list[Combination]:
    """The recipes of all combinations of values, the last option varying fastest.

    Raises:
        InputError: all problems of ``vary`` itself; where there are none, of the recipes.
    """
    options = _options(vary)
    grid = list(itertools.islice(itertools.product(*options.values()), MAX_RUNS + 1))
    if len(grid) > MAX_RUNS:
        raise InputError(f"--vary: expected at most {MAX_RUNS} combinations, found more")
    readable: list[Combination] = []
    wrong: dict[tuple[str, ...], Sequence[str]] = {}
    for values in grid:
        try:
            readable.append(Combination(values, load_recipe(path, overrides, values)))
        except InputError as error:
            wrong[values] = error.problems
    raise_wrong(wrong, grid)
    seen: dict[str, Combination] = {}
    problems = []
    for combination in readable:
        same = seen.setdefault(_key(combination.recipe), combination)
        if same is not combination:
            problems.append(
                f"--vary: expected combinations that differ, found the same recipe for {' '.join(same.values)} and for "
                f"{' '.join(combination.values)}"
            )
    if problems:
        raise InputError(*problems)
    return readable


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


def raise_wrong(wrong: Mapping[tuple[str, ...], Sequence[str]], grid: Sequence[tuple[str, ...]]) -> None:
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


def with_folders(combinations: Sequence[Combination], earlier: Sequence[Planned], folder: Path) -> list[Planned]:
    """Gives every combination its folder: the one it had, or else a new one."""
    known = {_key(run.recipe): run for run in earlier}
    wanted = {_key(combination.recipe) for combination in combinations}
    lost = [run.folder for key, run in known.items() if key not in wanted]
    if lost:
        raise InputError(
            f"--output: expected the values of the sweep in {folder}, and perhaps more, found none that make "
            f"{', '.join(lost[:8])}" + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        )
    taken = {run.folder.casefold() for run in earlier}
    trainings = {_training(run.recipe): run.dense for run in earlier if run.dense}
    runs = []
    for combination in combinations:
        before, training = known.get(_key(combination.recipe)), _training(combination.recipe)
        name = before.folder if before else _free(_name(combination.values), taken)
        taken.add(name.casefold())
        dense = None if training is None else trainings.setdefault(training, f"dense-{len(trainings) + 1}")
        runs.append(Planned(combination.values, combination.recipe, name, dense))
    return runs


def _free(name: str, taken: Collection[str]) -> str:
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free.casefold() not in taken)


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
