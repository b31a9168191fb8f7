"""The plots of a comparison: accuracy against what is kept, beside published results, and dead neurons."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from dnr_plugin.reports.comparison import COLUMNS, Comparison, Group, Run, show
from dnr_plugin.reports.figures.run import check_totals
from dnr_plugin.reports.published import FULL_WIDTH, TRAINING_IMAGES, Published, published

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COMPARISON_CAPTIONS = {
    "neuron_sparsity": "Accuracy against the share of neurons removed. Points are means over seeds, bars their sample "
    "standard deviation; grey: published results, of full-size networks on all training images.",
    "weight_sparsity": "Accuracy against the share of parameters removed; as above.",
    "flops": "Accuracy against the share of FLOPs kept; as above.",
    "dead": "Dead neurons, as a share of those that the network had at the check; one line per run.",
    "dead_against": "Dead neurons at the last check against the option in which the runs differ; as above.",
}
_TARGET = "prune.target."
# Options of a section that is absent where there is no pressure.
_ZERO_IF_ABSENT = ("pressure.bn_l1.strength", "pressure.noise.std")


def comparison_figures(comparison: Comparison) -> dict[str, Figure]:
    """All the plots that these runs allow, by name."""
    figures = {}
    if any(run.values["neuron_sparsity"] for run in comparison.runs):
        figures = {name: accuracy_figure(comparison, name) for name in ("neuron_sparsity", "weight_sparsity", "flops")}
    watched = [run for run in comparison.runs if dead_shares(run)]
    if len(watched) > 1:
        figures["dead"] = dead_figure(comparison, watched)
        option = varied_number(comparison, watched)
        if option is not None:
            figures["dead_against"] = dead_against_figure(comparison, watched, option)
    return figures


def label_of(run: Run, options: Sequence[str]) -> str:
    """What tells a run from the others, for a legend."""
    told = ", ".join(f"{name} {show(run.option(name))}" for name in options)
    return textwrap.fill(told, 100, break_on_hyphens=False)


def accuracy_figure(comparison: Comparison, measure: str) -> Figure:
    """Accuracy against a sparsity or the FLOPs kept: a line per setting joins its targets, beside published ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    fixed = [name for name in comparison.options if name != "seed" and not name.startswith(_TARGET)]
    series: dict[tuple[str, str], list[Group]] = {}
    for group in comparison.groups:
        run = group.runs[0]
        label = label_of(run, fixed) if fixed else "this comparison"
        kind = run.report["target"]["kind"]
        series.setdefault((label, f"target {kind}" if kind else "nothing removed"), []).append(group)
    kinds = {kind for _, kind in series}
    drawn: list[Any] = []  # in the legend's order
    for ((label, kind), groups), colour in zip(series.items(), _colours(len(series)), strict=True):
        groups.sort(key=lambda group: group.mean[measure] or 0.0)
        points = axes.errorbar(
            [100 * (group.mean[measure] or 0.0) for group in groups],
            [100 * (group.mean["accuracy"] or 0.0) for group in groups],
            xerr=_bars(groups, measure), yerr=_bars(groups, "accuracy"), color=colour, marker="o", markersize=5,
            capsize=3, label=f"{label} ({kind})" if len(kinds) > 1 else label, zorder=3,
        )  # fmt: skip
        drawn.append(points)
    dense = [run.values["dense_accuracy"] for run in comparison.runs]
    known = [value for value in dense if value is not None]
    if known:
        label = "dense, mean of these runs"
        drawn.append(axes.axhline(100 * mean(known), color="black", linestyle=":", linewidth=1, label=label))
    curves = _published(comparison.runs, measure)
    for n, curve in enumerate(curves):
        drawn += axes.plot(
            *zip(*curve.points, strict=True), color="#8a8a8a", linestyle=("--", "-.", ":")[n % 3],
            marker="sD^vPX"[n % 6], markersize=4, label=f"{curve.method}, {_spelt(curve)} (published, full size)",
        )  # fmt: skip
    axes.set_xlabel(COLUMNS[measure].title)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Accuracy against {COLUMNS[measure].title.rpartition(',')[0]}")
    axes.grid(alpha=0.3)
    smaller = sorted({note for run in comparison.runs if (note := smaller_than_published(run))})
    figure.legend(
        handles=drawn, loc="outside lower center", fontsize=8, frameon=False, title_fontsize=8,
        ncols=1 if len(series) < 6 else 2,
        title=f"these runs are smaller than the published: {'; '.join(smaller)}" if curves and smaller else None,
    )  # fmt: skip
    return figure


def smaller_than_published(run: Run) -> str:
    """In what a run is smaller than the networks of papers, or an empty string."""
    notes = []
    model, width, images = (run.option(name) for name in ("model.name", "model.width", "data.train_size"))
    if width is not None and width < FULL_WIDTH.get(model, 0):
        notes.append(f"width {width} instead of {FULL_WIDTH[model]}")
    if images is not None and images < TRAINING_IMAGES:
        notes.append(f"{images:,} of {TRAINING_IMAGES:,} training images")
    return ", ".join(notes)


def dead_shares(run: Run) -> list[tuple[float, float]]:
    """(epoch, share of the network's neurons that are dead) at each check; empty for a run that had none."""
    return [(row["epoch"], row["dead"] / row["neurons"]) for row in check_totals(run.events) if row["neurons"]]


def dead_figure(comparison: Comparison, runs: Sequence[Run]) -> Figure:
    """The share of dead neurons over the epochs: a line per run, in one colour where only the seed differs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    fixed = [name for name in comparison.options if name != "seed"]
    option = varied_number(comparison, runs)
    if option is not None:
        runs = sorted(runs, key=lambda run: _number(run, option) or 0.0)
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(label_of(run, fixed) if fixed else "this comparison", []).append(run)
    for (label, group), colour in zip(together.items(), _colours(len(together), option is not None), strict=True):
        for n, run in enumerate(group):
            points = [(epoch, 100 * share) for epoch, share in dead_shares(run)]
            seeds = f" ({len(group)} seeds)" if len(group) > 1 else ""
            axes.plot(
                *zip(*points, strict=True), color=colour, marker="o", markersize=3 if len(points) <= 40 else 0,
                linewidth=1.5, label=label + seeds if n == 0 else None,
            )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("dead neurons, % of the network at the check")
    axes.set_title("Dead neurons over training")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=1 if len(together) < 6 else 2)
    return figure


def varied_number(comparison: Comparison, runs: Sequence[Run]) -> str | None:
    """The one numeric option, besides seed and target, in which the runs differ; None if there is none, or several."""
    names = [name for name in comparison.options if name != "seed" and not name.startswith(_TARGET)]
    numbers = [
        name
        for name in names
        if all(_number(run, name) is not None for run in runs) and len({_number(run, name) for run in runs}) > 1
    ]
    return numbers[0] if len(numbers) == 1 else None


def dead_against_figure(comparison: Comparison, runs: Sequence[Run], option: str) -> Figure:
    """The share of dead neurons at the last check against an option, a mean over seeds; one line per other setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    others = [name for name in comparison.options if name not in ("seed", option)]
    series: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        label = label_of(run, others) if others else "dead neurons"
        series.setdefault(label, {}).setdefault(_number(run, option) or 0.0, []).append(100 * dead_shares(run)[-1][1])
    for (label, points), colour in zip(series.items(), _colours(len(series)), strict=True):
        at = sorted(points)
        axes.errorbar(
            at, [mean(points[x]) for x in at], yerr=[stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in at],
            color=colour, marker="o", capsize=3, label=label,
        )  # fmt: skip
    _scale(axes, sorted({x for points in series.values() for x in points}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(option)
    axes.set_ylabel("dead neurons at the last check, %")
    axes.set_title(f"Dead neurons against {option}")
    axes.grid(alpha=0.3)
    if others:
        figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    return figure


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where values span more than a factor of ten, with room for zero; a tick at each value."""
    positive = [value for value in values if value > 0]
    if positive and positive[-1] > 10 * positive[0]:
        if values[0] > 0:
            axes.set_xscale("log")
        else:
            # linear from zero to the lowest value, which is as far from zero as a factor of ten from the next
            axes.set_xscale("symlog", linthresh=positive[0])
            axes.set_xlim(left=-0.2 * positive[0])
    axes.set_xticks(values, labels=[f"{value:g}" for value in values], rotation=0 if len(values) < 8 else 45)
    axes.minorticks_off()


def _number(run: Run, option: str) -> float | None:
    value = run.option(option)
    if value is None and option.endswith(_ZERO_IF_ABSENT):
        return 0.0
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _bars(groups: Sequence[Group], key: str) -> list[float] | None:
    """Standard deviations in percent; None where no group has one."""
    bars = [100 * (group.sd[key] or 0.0) for group in groups]
    return bars if any(bars) else None


def _published(runs: Sequence[Run], measure: str) -> list[Published]:
    """What papers say of the networks and data of these runs, each curve once."""
    curves = [
        curve
        for run in runs
        for curve in published(
            measure, run.option("model.name"), run.option("model.activation") or "relu", run.option("data.name")
        )
    ]
    return list(dict.fromkeys(curves))


def _spelt(curve: Published) -> str:
    names = {"resnet18": "ResNet-18", "resnet56": "ResNet-56", "vgg16_bn": "VGG-16"}
    return f"{names[curve.model]}, {'ReLU' if curve.activation == 'relu' else 'Leaky ReLU'}"


def _colours(count: int, ordered: bool = False) -> list[Any]:
    """Distinct ones for few lines; for many, or for lines with an order, a scale."""
    from matplotlib import colormaps

    if count <= 10 and not ordered:
        return list(colormaps["tab10"].colors[:count])  # type: ignore[attr-defined]
    return [colormaps["viridis"](0.9 * n / max(1, count - 1)) for n in range(count)]
