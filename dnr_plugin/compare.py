"""Finished runs side by side: what tells them apart, what came of them, and the spread between seeds."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from . import page, plots
from .checks import check_writable
from .errors import InputError
from .files import atomic_write
from .recipe import leaves
from .report import NOTE
from .schema import Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType

# Options that change no result: two runs that differ in nothing else are runs of the same thing.
_NAMES_ONLY = ("name", "description", "data.root", "data.download", "data.workers")
SWEEP = "sweep.json"  # what lists the runs in the folder of a sweep
_FILES = ("compare.json", "compare.md", "compare.html")


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
    found: list[Run] = []
    folders = [run for folder in folders for run in _runs_in(Path(folder))]
    places = [Path(folder).resolve() for folder in folders]
    for number, folder in enumerate(folders):
        try:
            if places[number] in places[:number]:
                raise InputError(f"compare: expected each run once, found {folder} again")
            unique = [place.name for place in places].count(places[number].name) == 1
            found.append(_read(Path(folder), places[number].name if unique else str(folder)))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    options = _differing(found)
    groups: dict[tuple[str | None, ...], list[Run]] = {}
    for run in found:
        groups.setdefault(tuple(run.options.get(name) for name in options if name != "seed"), []).append(run)
    return Comparison(found, options, [_group(runs) for runs in groups.values()])


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
    try:
        places = [folder / str(run["folder"]) for run in json.loads(index.read_text(encoding="utf-8"))["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: expected the list of a sweep's runs, found damage: {error!r}"[:300]) from error
    return [place for place in places if (place / "report.json").is_file()] or [folder]


def _read(folder: Path, name: str) -> Run:
    file = folder / "report.json"
    if not file.is_file():
        what = "no report.json in it" if folder.is_dir() else "no such folder"
        raise InputError(f"compare: expected the folder of a finished run, found {folder} with {what}")
    events = folder / "events.jsonl"
    try:
        report = json.loads(file.read_text())
        lines = events.read_text().splitlines() if events.is_file() else []
        values = {key: column.value(report) for key, column in COLUMNS.items()}
        return Run(name, str(folder), report, [json.loads(line) for line in lines], _options(report["recipe"]), values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"compare: expected the report of a run in {folder}, found damage: {error!r}") from error


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


def rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table: one row per run, then one per group of several seeds."""
    keys = [key for key in COLUMNS if any(run.values[key] is not None for run in comparison.runs)]
    head = ["run", *comparison.options, *(COLUMNS[key].title for key in keys)]
    cells = [
        [run.name, *(show(run.option(name)) for name in comparison.options), *(_figure(run, key) for key in keys)]
        for run in comparison.runs
    ]
    for group in comparison.groups:
        if len(group.runs) > 1:
            options = [
                ", ".join(dict.fromkeys(show(run.option(name)) for run in group.runs)) for name in comparison.options
            ]
            cells.append([f"mean ± sd, n = {len(group.runs)}", *options, *(_spread(group, key) for key in keys)])
    return head, cells


def _figure(run: Run, key: str) -> str:
    return COLUMNS[key].show(run.values[key])


def _spread(group: Group, key: str) -> str:
    column, middle, sd = COLUMNS[key], group.mean[key], group.sd[key]
    if middle is None or sd is None:
        return "-"
    more = int(column.digits == 0)  # a mean of counts is no count
    return f"{column.show(middle, more)} ± {column.show(sd, more)}"


def comparison_table(comparison: Comparison) -> RenderableType:
    """The table for a terminal."""
    from rich.table import Table

    head, cells = rows(comparison)
    table = Table(title=title(comparison), title_justify="left")
    for n, name in enumerate(head):
        # the values are short, so the heads break wherever they can
        table.add_column(name.replace(".", ".\n").replace(" ", "\n"), justify="left" if n == 0 else "right")
    for n, row in enumerate(cells):
        table.add_row(*row, end_section=n == len(comparison.runs) - 1)
    return table


def title(comparison: Comparison) -> str:
    n = len(comparison.runs)
    return f"{n} run{'s' * (n > 1)} compared"


def notes(comparison: Comparison) -> list[str]:
    """What a reader should know beside the table."""
    devices = sorted({str(run.report.get("device")) for run in comparison.runs})
    lines = [NOTE, f"Accuracy is of the final model on the test images. Device: {'; '.join(devices)}."]
    if len(devices) > 1:
        lines.append("Seconds on different devices do not compare.")
    if any(len(group.runs) > 1 for group in comparison.groups):
        lines.append("sd: sample standard deviation over runs that differ in nothing but their seed.")
    return lines


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    head, cells = rows(comparison)
    lines = [f"# {title(comparison)}", "", f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(comparison))]) + "\n"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data: options that differ, figures of each run, mean and sd of each group."""
    names = comparison.options
    return {
        "options": names,
        "runs": [
            {
                "name": run.name,
                "folder": run.folder,
                "recipe": run.report["name"],
                "options": {name: run.option(name) for name in names},
                **run.values,
            }
            for run in comparison.runs
        ],
        "groups": [
            {"runs": [run.name for run in group.runs], "n": len(group.runs), "mean": group.mean, "sd": group.sd}
            for group in comparison.groups
        ],
    }


def check_output(folder: Path) -> None:
    """Refuses a folder with anything but an earlier comparison in it.

    Raises:
        InputError: it is a file, cannot be written to, or holds other things.
    """
    check_writable(folder)
    if folder.is_dir():
        ours = {folder / name for name in (*_FILES, "plots")}
        other = [path for path in folder.iterdir() if path not in ours]
        other += [path for path in folder.glob("plots/*") if path.name not in _plot_names()]
        if other:
            raise InputError(
                f"--output: expected an empty folder or that of an earlier comparison, found {min(other)} in it"
            )


def _plot_names() -> set[str]:
    from .compare_plots import CAPTIONS

    return {f"{name}.png" for name in CAPTIONS}


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Writes ``compare.json``, ``compare.md``, ``plots/*.png`` and the self-contained ``compare.html``.

    Raises:
        InputError: see `check_output`.
    """
    from .compare_plots import CAPTIONS, comparison_figures

    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.save_figures(comparison_figures(comparison), folder / "plots")
    for stale in set((folder / "plots").iterdir()) - set(drawn):
        stale.unlink()
    with atomic_write(folder / "compare.json") as file:
        json.dump(as_json(comparison), file, indent=1)
        file.write("\n")
    with atomic_write(folder / "compare.md") as file:
        file.write(markdown(comparison))
    with atomic_write(folder / "compare.html") as file:
        file.write(
            page.page(
                title(comparison),
                page.table(*rows(comparison)),
                page.items(notes(comparison)),
                page.images(drawn, CAPTIONS),
            )
        )
