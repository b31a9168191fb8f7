"""The plot of the benchmark of criteria."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from dnr_plugin.benchmarks.criteria.contenders import CRITERIA, OURS
from dnr_plugin.benchmarks.criteria.tables import FIGURES, pairs_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Line = list[Mapping[str, Any]]  # the rows of one criterion and scope, by kept FLOPs
_MARKERS = "osD^v<>PXph*8d"
_DASHES = ("--", "-.", ":")


def criteria_figure(result: Mapping[str, Any]) -> Figure:
    """Accuracy against kept FLOPs: a panel per figure, in it a line per criterion in its best scope there.

    Args:
        result: of `tables.summary`.
    """
    from matplotlib.figure import Figure

    pairs = pairs_in(result)
    figure = Figure(figsize=(14, 7.5 * len(pairs)), layout="constrained")
    panels = figure.subplots(len(pairs), 2, squeeze=False, sharey="row")
    for axes_row, pair in zip(panels, pairs, strict=True):
        for axes, name in zip(axes_row, pair, strict=True):
            _draw(axes, result, name)
    figure.suptitle(f"{result['name']}: criteria of Torch-Pruning (grey) and of dnr_plugin (colour), same FLOPs")
    return figure


def best_lines(result: Mapping[str, Any], name: str) -> dict[str, Line]:
    """For each criterion the rows of the scope with the most levels and the highest mean, best criterion first."""
    by_scope: dict[tuple[str, str], Line] = {}
    for row in result["rows"]:
        if row["accuracy"][name]:
            by_scope.setdefault((row["criterion"], row["scope"]), []).append(row)

    def worth(line: Line) -> tuple[int, float]:
        return len(line), mean(row["accuracy"][name]["mean"] for row in line)

    best: dict[str, Line] = {}
    for (criterion, _), line in by_scope.items():
        if criterion not in best or worth(line) > worth(best[criterion]):
            best[criterion] = sorted(line, key=lambda row: float(row["kept_flops"]["mean"]))
    return dict(sorted(best.items(), key=lambda item: worth(item[1]), reverse=True))


def _draw(axes: Axes, result: Mapping[str, Any], name: str) -> None:
    for criterion, line in best_lines(result, name).items():
        accuracies = [row["accuracy"][name] for row in line]
        axes.errorbar(
            [100 * row["kept_flops"]["mean"] for row in line],
            [100 * value["mean"] for value in accuracies],
            yerr=[100 * (value["sd"] or 0.0) for value in accuracies],
            label=f"{criterion} ({line[0]['scope']})", markersize=5, elinewidth=0.8, **_style(criterion),
        )  # fmt: skip
    axes.axhline(100 * result["dense"]["mean"], color="black", linestyle="--", linewidth=1, label="dense")
    axes.set_title(FIGURES[name])
    axes.set_xlabel("FLOPs kept, %")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(
        title="criterion (its best scope here), best first", loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3,
        fontsize=8, title_fontsize=8, frameon=False,
    )  # fmt: skip


def _style(criterion: str) -> dict[str, Any]:
    """Ours in colour and in front; the others in greys, told apart by marker and dashes."""
    from matplotlib import colormaps

    ours = criterion in OURS
    n = [name for name in CRITERIA if (name in OURS) == ours].index(criterion)
    marker = _MARKERS[n % len(_MARKERS)]
    if ours:
        return {"color": colormaps["tab10"](n % 10), "marker": marker, "linewidth": 2, "zorder": 3}
    grey = colormaps["Greys"](0.4 + 0.4 * n / len(CRITERIA))
    return {"color": grey, "marker": marker, "linestyle": _DASHES[n % 3], "linewidth": 1.2, "zorder": 2}
