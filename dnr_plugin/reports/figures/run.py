"""The plots of one run. Each function draws what it is given and returns the figure; `save_figure` writes it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Event = Mapping[str, Any]
RUN_CAPTIONS = {
    "channels": "Output channels of each layer, before and after.",
    "accuracy": "Accuracy on the test images after each epoch.",
    "neurons": "Above: how many neurons are dead, candidates (zeroed on trial), or removed so far. Below: how many "
    "changed sides at each check.",
    "layers": "Each layer, from input (top) to output, as each check found it, before removing anything.",
    "entropy": "Above: entropy of the neurons' activation histograms, a mean over each layer and over the network. "
    "Below: how far the histograms moved since the check before (Kullback-Leibler divergence).",
}
# One colour a kind of neuron, in every plot.
_COLOURS = {
    "dead": "#555555",
    "candidates": "#ff7f0e",
    "removed": "#d62728",
    "died": "#555555",
    "nominated": "#ff7f0e",
    "reactivated": "#2ca02c",
    "restored": "#1f77b4",
}
_COUNTS = ("neurons", "dead", "died", "reactivated", "candidates", "nominated", "restored", "removed")


def run_figures(report: Mapping[str, Any], events: Sequence[Event]) -> dict[str, Figure]:
    """All the plots that a run's report and events allow, by name."""
    figures = {"channels": channels_figure(report)}
    if any(event["event"] == "epoch" for event in events):
        figures["accuracy"] = accuracy_figure(report, events)
    if any(event["event"] == "check" for event in events):
        figures["neurons"] = neurons_figure(report, events)
        figures["layers"] = layers_figure(report, events)
        figures["entropy"] = entropy_figure(report, events)
    return figures


def check_totals(events: Sequence[Event]) -> list[dict[str, Any]]:
    """One row per check, summed over the layers: ``check``, ``epoch`` and the counts of the check events."""
    totals: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "check":
            row = totals.setdefault(event["check"], {"check": event["check"], "epoch": event["epoch"]})
            for name in _COUNTS:
                row[name] = row.get(name, 0) + event[name]
    return [totals[check] for check in sorted(totals)]


def channels_figure(report: Mapping[str, Any]) -> Figure:
    """The channels of each layer, dense and pruned."""
    from matplotlib.figure import Figure

    rows = [row for row in report["layers"] if row["type"].startswith(("Conv", "Linear"))]
    figure = Figure(figsize=(8, max(2.5, 0.24 * len(rows) + 1)), layout="constrained")
    axes = figure.subplots()
    positions = range(len(rows))
    axes.barh(positions, [row["channels_before"] for row in rows], color="#d0d4d9", label="dense")
    axes.barh(positions, [row["channels_after"] for row in rows], color="#1f77b4", height=0.5, label="pruned")
    axes.set_yticks(positions, [row["name"] for row in rows], fontsize=8 if len(rows) < 60 else 5)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("output channels")
    axes.set_title(f"{report['name']}: channels kept per layer")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def accuracy_figure(report: Mapping[str, Any], events: Sequence[Event]) -> Figure:
    """Test accuracy over training and fine-tuning, with the removals where they happened."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [event for event in events if event["event"] == "epoch"]
    trained = [(e["epoch"], 100 * e["accuracy"]) for e in epochs if e["stage"] == "train"]
    tuned = [(len(trained) + e["epoch"], 100 * e["accuracy"]) for e in epochs if e["stage"] == "finetune"]
    after_training = report.get("mode", "after_training") == "after_training"
    if trained:
        label = "dense training" if after_training else "training"
        axes.plot(*zip(*trained, strict=True), marker="o", markersize=3, color="#555555", label=label)
    before = report["pruned"]["accuracy_before_finetune"]
    start = trained[-1:] if before is None else [(len(trained), 100 * before)]
    if tuned or after_training:
        points = [*start, *tuned]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color="#1f77b4", label="fine-tuning")
    if after_training:
        axes.plot(*start[0], "v", color=_COLOURS["removed"], label="after removal")
    _shade_removals(axes, events)
    _mark_stop(axes, events)
    _over_epochs(axes)
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.set_title(f"{report['name']}: accuracy over the run")
    axes.legend()
    return figure


def neurons_figure(report: Mapping[str, Any], events: Sequence[Event]) -> Figure:
    """The network's neurons: how many are dead, candidates or removed, and how many changed at each check."""
    from matplotlib.figure import Figure

    totals = check_totals(events)
    epochs = [row["epoch"] for row in totals]
    removed = _so_far(totals, "removed")
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    style = _markers(totals)

    def draw(axes: Axes, name: str, values: Sequence[int], label: str, **how: Any) -> None:
        axes.plot(epochs, values, label=label, color=_COLOURS[name], **{**style, **how})

    draw(above, "dead", [row["dead"] for row in totals], f"dead\n({totals[-1]['dead']:,} at the end)")
    if any(row["candidates"] for row in totals):
        draw(above, "candidates", [row["candidates"] for row in totals], "candidates")
    if removed[-1]:
        label = f"removed so far\n({removed[-1]:,} at the end)"
        draw(above, "removed", removed, label, drawstyle="steps-post")
    above.set_ylabel(f"neurons, of {totals[0]['neurons']:,}")
    above.set_title(f"{report['name']}: neurons over the run")
    for name, meaning in (
        ("died", "died"),
        ("reactivated", "reactivated"),
        ("nominated", "became candidates"),
        ("restored", "candidates given back"),
    ):
        total = sum(row[name] for row in totals)
        if total or name in ("died", "reactivated"):
            # broad, because candidates given back are often the same neurons and would hide it
            broad = {"linewidth": 4, "alpha": 0.5} if name == "reactivated" else {}
            draw(below, name, [row[name] for row in totals], f"{meaning}\n({total:,} in all)", **broad)
    below.set_ylabel("neurons per check")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        _over_epochs(axes)
        axes.label_outer()
    _mark_stop(above, events)
    for axes in (above, below):
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def layers_figure(report: Mapping[str, Any], events: Sequence[Event]) -> Figure:
    """Heat maps of layer and epoch: the share of dead neurons, and what is kept (or, if all is, what came back)."""
    import numpy as np
    from matplotlib.figure import Figure

    checks = [event for event in events if event["event"] == "check"]
    layers = _in_order(report, checks)
    totals = check_totals(events)
    column = {row["check"]: n for n, row in enumerate(totals)}
    dead, kept, back = np.full((3, len(layers), len(totals)), np.nan)
    first: dict[str, int] = {}
    for event in checks:
        cell = layers.index(event["layer"]), column[event["check"]]
        before = first.setdefault(event["layer"], event["neurons"])
        # a layer at the end of its neurons has none to be dead
        dead[cell] = 100 * event["dead"] / max(1, event["neurons"])
        kept[cell] = 100 * event["neurons"] / before
        back[cell] = 100 * event["reactivated"] / before
    # a check tells the state that the time since the one before has led to
    edges = [0.0, *(row["epoch"] for row in totals)]
    figure = Figure(figsize=(11, min(14.0, max(3.0, 0.2 * len(layers) + 1.5))), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    if any(row["removed"] for row in totals):
        second = (kept, "neurons kept", "% of the layer at the start", "viridis", 100.0)
    else:
        second = (back, "reactivated since the check before", "% of the layer at the start", "YlGn", _top(back))
    first_panel = (dead, "dead neurons", "% of the layer at the check", "magma_r", _top(dead))
    for axes, (values, title, unit, colours, top) in zip(panels, (first_panel, second), strict=True):
        mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, values, cmap=colours, vmin=0, vmax=top)
        axes.set_facecolor("#e8e8e8")  # a layer that a check did not see
        axes.set_title(title, fontsize=10)
        _over_epochs(axes)
        figure.colorbar(mesh, ax=axes, label=unit, fraction=0.05, pad=0.02)
    panels[0].set_yticks(range(len(layers)), layers, fontsize=8 if len(layers) <= 40 else 6)
    panels[0].invert_yaxis()
    panels[1].tick_params(left=False)
    figure.suptitle(f"{report['name']}: layer by layer")
    return figure


def entropy_figure(report: Mapping[str, Any], events: Sequence[Event]) -> Figure:
    """Activation entropy and drift of each layer, coloured by depth, and of the network."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    checks = [event for event in events if event["event"] == "check"]
    layers = _in_order(report, checks)
    depth = Normalize(0, max(1, len(layers) - 1))
    colours = colormaps["viridis"]
    # the first check has nothing to drift from
    shown = [name for name in ("entropy", "drift") if any(event[name] is not None for event in checks)]
    figure = Figure(figsize=(9, 3.25 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, shown, strict=True):
        known = [event for event in checks if event[name] is not None]
        times = sorted({event["epoch"] for event in known})
        for n, layer in enumerate(layers):
            points = [(event["epoch"], event[name]) for event in known if event["layer"] == layer]
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=colours(depth(n)), linewidth=1, alpha=0.8, **_markers(times)
                )  # fmt: skip
        means = [_mean([event for event in known if event["epoch"] == time], name) for time in times]
        axes.plot(times, means, color="black", linewidth=2.5, label="mean over all neurons", **_markers(times))
        axes.set_ylabel(f"{name}, bits")
        axes.grid(alpha=0.3)
        _over_epochs(axes)
        axes.label_outer()
    panels[0].set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    # the first epochs move the histograms by orders of magnitude more than the last
    if any(event["drift"] for event in checks):
        panels[-1].set_yscale("log", nonpositive="mask")
    bar = figure.colorbar(ScalarMappable(depth, colours), ax=panels, fraction=0.04, pad=0.02)
    ticks = sorted({round(n * (len(layers) - 1) / 7) for n in range(8)})
    bar.set_ticks(ticks, labels=[layers[n] for n in ticks], fontsize=8)
    bar.ax.invert_yaxis()
    bar.set_label("layer, from input to output")
    figure.suptitle(f"{report['name']}: activation entropy")
    return figure


def _in_order(report: Mapping[str, Any], checks: Sequence[Event]) -> list[str]:
    """The layers of the checks in the model's order."""
    order = {row["name"]: n for n, row in enumerate(report["layers"])}
    return sorted(dict.fromkeys(event["layer"] for event in checks), key=lambda name: order.get(name, len(order)))


def _so_far(totals: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """Running sums of a count over the checks."""
    return list(itertools.accumulate(row[name] for row in totals))


def _mean(events: Sequence[Event], name: str) -> float:
    """Over neurons, so that a layer counts by its size; NaN (not drawn) where none remains."""
    neurons: int = sum(event["neurons"] for event in events)
    return float(sum(event["neurons"] * event[name] for event in events) / neurons) if neurons else float("nan")


def _top(values: Any) -> float:
    """The end of a colour scale that starts at zero: the highest value, but never zero as well."""
    import numpy as np

    return max(1.0, float(np.nanmax(values)))


def _markers(totals: Sequence[Any]) -> dict[str, Any]:
    """Points where they can be told apart."""
    return {"marker": "o", "markersize": 3 if len(totals) <= 40 else 0}


def _over_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.set_xlabel("epoch")


def _shade_removals(axes: Axes, events: Sequence[Event]) -> None:
    """The share of the neurons that is gone, shaded from below against an axis of its own on the right."""
    totals = check_totals(events)
    removed = _so_far(totals, "removed")
    if not removed or not removed[-1]:
        return
    right = axes.twinx()
    shares = [100 * count / totals[0]["neurons"] for count in removed]
    last = sum(event["event"] == "epoch" for event in events)  # of training and fine-tuning together
    right.fill_between(
        [row["epoch"] for row in totals] + [max(last, totals[-1]["epoch"])], [*shares, shares[-1]], step="post",
        color=_COLOURS["removed"], alpha=0.15, linewidth=0,
    )  # fmt: skip
    right.set_ylim(0, 100)
    right.set_ylabel("neurons removed so far, % (shaded)", color=_COLOURS["removed"])


def _mark_stop(axes: Axes, events: Sequence[Event]) -> None:
    for event in events:
        if event["event"] == "stopped":
            axes.axvline(event["epoch"], color="black", linestyle="--", linewidth=1, label="removal stopped early")
