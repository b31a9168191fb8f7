"""A comparison as tables and a page: terminal, Markdown, HTML, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dnr_plugin.errors import InputError
from dnr_plugin.files import atomic_write, check_writable, contents
from dnr_plugin.reports.comparison import COLUMNS, Comparison, Group, Run, show
from dnr_plugin.reports.figures.drawing import save_figures
from dnr_plugin.reports.html import html_images, html_items, html_page
from dnr_plugin.reports.layer_report import NOTE
from dnr_plugin.reports.table import Table, markdown_items, plain_markdown

_FILES = ("compare.json", "compare.md", "compare.html")


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


def comparison_table(comparison: Comparison) -> Table:
    """One row per run, then one per group of several seeds."""
    head, cells = rows(comparison)
    # the values are short, so the heads break wherever they can
    return Table(title(comparison), head, cells, parted=len(comparison.runs), narrow=True)


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
    lines = [f"# {plain_markdown(title(comparison))}", "", *comparison_table(comparison).markdown()]
    return "\n".join([*lines, "", *markdown_items(notes(comparison))]) + "\n"


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
        other = [path for path in contents(folder) if path not in ours]
        other += [path for path in contents(folder / "plots") if path.name not in _plot_names()]
        if other:
            raise InputError(
                f"--output: expected an empty folder or that of an earlier comparison, found {min(other)} in it"
            )


def _plot_names() -> set[str]:
    from dnr_plugin.reports.figures.comparison import COMPARISON_CAPTIONS

    return {f"{name}.png" for name in COMPARISON_CAPTIONS}


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Writes ``compare.json``, ``compare.md``, ``plots/*.png`` and the self-contained ``compare.html``.

    Raises:
        InputError: see `check_output`.
    """
    from dnr_plugin.reports.figures.comparison import COMPARISON_CAPTIONS, comparison_figures

    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = save_figures(comparison_figures(comparison), folder / "plots")
    for stale in set((folder / "plots").iterdir()) - set(drawn):
        stale.unlink()
    with atomic_write(folder / "compare.json") as file:
        json.dump(as_json(comparison), file, indent=1)
        file.write("\n")
    with atomic_write(folder / "compare.md") as file:
        file.write(markdown(comparison))
    with atomic_write(folder / "compare.html") as file:
        file.write(
            html_page(
                title(comparison),
                comparison_table(comparison).html(),
                html_items(notes(comparison)),
                html_images(drawn, COMPARISON_CAPTIONS),
            )
        )
