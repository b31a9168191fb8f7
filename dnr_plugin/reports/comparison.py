"""Finished runs side by side: what tells them apart, what came of them, and the spread between seeds."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pydantic import ValidationError

from dnr_plugin.errors import InputError, one_line
from dnr_plugin.files import inside, read_json
from dnr_plugin.recipe.difference import leaves
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.reports.stored import stored_events, stored_report

# Options that change no result: two runs that differ in nothing else are runs of the same thing.
_NAMES_ONLY = ("name", "description", "data.root", "data.download", "data.workers")
SWEEP = "sweep.json"  # what lists the runs in the folder of a sweep


@dataclass(frozen=True)
class Column:
    """A figure of a run: where it is in the report, and how it is shown (times `scale`, with `digits`)."""

    title: str
    value: Callable[[Mapping[str, Any]], float | None]
    scale: float = 100.0
    digits: int = 2

    def show(self, value: float | None, more: int = 0) -> str:
        return "-" if value is None else f"{self.scale * value:,.{self.digits + more}f}"


COLUMNS = {
    "dense_accuracy": Column("dense accuracy, %", lambda report: report["dense"]["accuracy"]),
    "accuracy": Column("accuracy, %", lambda report: report["pruned"]["accuracy"]),
    "params": Column("parameters kept, %", lambda report: report["kept"]["params"]),
    "flops": Column("FLOPs kept, %", lambda report: report["kept"]["flops"]),
    "neuron_sparsity": Column("neuron sparsity, %", lambda report: report["sparsity"]["neuron"]),
    "weight_sparsity": Column("weight sparsity, %", lambda report: report["sparsity"]["weight"]),
    "dead": Column("dead neurons", lambda report: report["dead"]["neurons"], 1.0, 0),
    "reactivated": Column("reactivated", lambda report: report["reactivated"], 1.0, 0),
    "train_seconds": Column("training, s", lambda report: report["seconds"]["train"], 1.0, 0),
    "seconds": Column("total, s", lambda report: report["seconds"]["total"], 1.0, 0),
    "wall_clock_ratio": Column(
        "training time / dense", lambda report: (report.get("dynamics") or {}).get("wall_clock_ratio"), 1.0
    ),
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: its folder's name, or the folder as given where several have the same.
        folder: as given.
        report: what ``report.json`` holds.
        events: of ``events.jsonl``.
        options: its recipe's, in JSON by dotted name, as far as they are set and decide results.
        values: one per key of `COLUMNS`.
    """

    name: str
    folder: str
    report: dict[str, Any]
    events: list[dict[str, Any]]
    options: dict[str, str]
    values: dict[str, float | None]

    def option(self, name: str) -> Any:
        """An option's value, None where it is not set."""
        return json.loads(self.options.get(name, "null"))


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        runs: at least one.
        mean: over the runs; None where a run has no such figure.
        sd: sample standard deviation; None also for a single run.
    """

    runs: list[Run]
    mean: dict[str, float | None]
    sd: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Runs, the options in which they differ (``seed`` first, if it does), and the runs grouped over seeds."""

    runs: list[Run]
    options: list[str]
    groups: list[Group]


def compare_runs(folders: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Reads finished runs and finds what tells them apart.

    Args:
        folders: of finished runs, or of sweeps, which stand for their finished runs.

    Raises:
        InputError: one problem per folder that is not that of a finished run, or that is given twice.
    """
    problems: list[str] = []
    compared: list[Run] = []
    folders = [run for folder in folders for run in _runs_in(Path(folder))]
    resolved = [Path(folder).resolve() for folder in folders]
    for number, folder in enumerate(folders):
        try:
            if resolved[number] in resolved[:number]:
                raise InputError(f"compare: expected each run once, found {folder} again")
            unique = [path.name for path in resolved].count(resolved[number].name) == 1
            compared.append(_read(Path(folder), resolved[number].name if unique else str(folder)))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    options = _differing(compared)
    groups: dict[tuple[str | None, ...], list[Run]] = {}
    for run in compared:
        groups.setdefault(tuple(run.options.get(name) for name in options if name != "seed"), []).append(run)
    return Comparison(compared, options, [_group(runs) for runs in groups.values()])


def _differing(runs: Sequence[Run]) -> list[str]:
    """The options that tell runs apart, seed first; of those that come and go together, such as strength and schedule
    of a penalty, only the first, unless the others differ on their own."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    values = {name: [run.options.get(name) for run in runs] for name in names}
    options: list[str] = []
    for name in sorted((name for name in names if len(set(values[name])) > 1), key=lambda name: name != "seed"):
        unset = [value is None for value in values[name]]
        companions = [other for other in options if other.rpartition(".")[0] == name.rpartition(".")[0]]
        implied = any(unset == [value is None for value in values[other]] for other in companions)
        if not (implied and len(set(values[name]) - {None}) == 1):
            options.append(name)
    return options


def _runs_in(folder: Path) -> list[Path]:
    """The finished runs of a sweep; a folder that is none stands for itself."""
    index = folder / SWEEP
    if not index.is_file():
        return [folder]
    listed = [folder / run["folder"] for run in listed_runs(index)]
    return [path for path in listed if (path / "report.json").is_file()] or [folder]


def listed_runs(index: Path) -> list[dict[str, Any]]:
    """The runs that the index of a sweep lists, whose folders lie beside it; no more of them is checked.

    Raises:
        InputError: it cannot be read, lists no runs, or folders elsewhere.
    """
    content = read_json(index)
    try:
        runs: list[dict[str, Any]] = content["runs"]
        names = [run["folder"] for run in runs]
    except (KeyError, TypeError) as error:
        raise InputError(f"{index}: expected the list of a sweep's runs, found damage: {one_line(error)}") from error
    for name in names:
        inside(index.parent, name, index)
    return runs


def _read(folder: Path, name: str) -> Run:
    file = folder / "report.json"
    if not file.is_file():
        what = "no report.json in it" if folder.is_dir() else "no such folder"
        raise InputError(f"compare: expected the folder of a finished run, found {folder} with {what}")
    events = folder / "events.jsonl"
    report = stored_report(file)
    values = {key: column.value(report) for key, column in COLUMNS.items()}
    rows = stored_events(events) if events.is_file() else []
    try:
        return Run(name, str(folder), report, rows, _options(report["recipe"]), values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: expected the report of a run, found a damaged recipe: {one_line(error)}") from error


def _options(recipe: dict[str, Any]) -> dict[str, str]:
    """What a recipe sets and what decides results, in JSON by dotted name."""
    with contextlib.suppress(ValidationError):  # of another version: what it says is still what it did
        # adds the defaults of options that came after an old report: they are no difference
        recipe = Recipe.model_validate(recipe).model_dump(mode="json")
    return {name: value for name, value in leaves(recipe).items() if value != "null" and name not in _NAMES_ONLY}


def _group(runs: list[Run]) -> Group:
    means: dict[str, float | None] = {}
    spread: dict[str, float | None] = {}
    for key in COLUMNS:
        values = [value for run in runs if (value := run.values[key]) is not None]
        whole = len(values) == len(runs)
        means[key] = mean(values) if whole else None
        spread[key] = stdev(values) if whole and len(values) > 1 else None
    return Group(runs, means, spread)


def show(value: Any) -> str:
    """An option's value, as short as a plot's legend wants it."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
