"""What observing, scoring, planning and repair cost against the forward passes, over networks of several sizes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from dnr_plugin.benchmarks.overhead import Overhead
from dnr_plugin.files import atomic_write, locked
from dnr_plugin.reports.figures.drawing import save_figure
from dnr_plugin.reports.table import Table

STAGES = {
    "observing": "observing, second moments included",
    "scoring": "scoring all groups: redundancy, the default",
    "planning": "planning",
    "repair": "repair_network",
}
_FEW = 3  # networks, from which on a growth is told
FILE = "overhead.json"


def _seconds(result: Overhead, stage: str) -> float:
    """Of a stage; of observing, what it adds to the forward passes."""
    seconds = next(cost.seconds for cost in result.calibration if cost.name.startswith(STAGES[stage]))
    return max(seconds - result.calibration[0].seconds, 1e-9) if stage == "observing" else seconds


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    """p of ``seconds ~ sizes ** p``, by least squares of the logarithms; None where all sizes are the same."""
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in seconds]
    if len({round(value, 9) for value in x}) < 2:
        return None
    return statistics.linear_regression(x, y).slope


def growth_table(results: Sequence[Overhead]) -> Table:
    """A network in each row, with seconds of its forward passes and of each stage; then the exponents."""
    head = ["network", "images", "forward passes, s", *(f"{stage}, s" for stage in STAGES), "memory at the peak"]
    rows = []
    for result in results:
        stages = [cost for cost in result.calibration if cost.name.startswith(tuple(STAGES.values()))]
        peaks = [cost.peak_bytes for cost in stages if cost.peak_bytes is not None]
        memory = f"{max(peaks) / 2**20:,.0f} MiB" if peaks else "-"
        times = (result.calibration[0].seconds, *(_seconds(result, stage) for stage in STAGES))
        s = result.setting
        rows.append([result.setting.name, f"{s.images} of {s.side} px", *(f"{time:.2f}" for time in times), memory])
    if len(results) >= _FEW:
        passed = [result.calibration[0].seconds for result in results]
        powers = [exponent(passed, [_seconds(result, stage) for result in results]) for stage in STAGES]
        told = ["-" if power is None else f"{power:.2f}" for power in powers]
        rows.append(["grows with the forward passes to the power of", "", "1", *told, ""])
    return Table("cost against size; observing is what it adds to the forward passes", head, rows)


def write_growth(results: Sequence[Overhead], folder: Path) -> None:
    """Writes ``overhead.json``, ``overhead.md`` and ``overhead.png``."""
    from matplotlib.figure import Figure

    with locked(folder):
        with atomic_write(folder / FILE) as file:
            json.dump([result.as_dict() for result in results], file, indent=1)
            file.write("\n")
        lines = [
            *growth_table(results).markdown(),
            "",
            *(f"- {result.setting.name}: {result.notes()[0]}" for result in results),
        ]
        with atomic_write(folder / "overhead.md") as file:
            file.writelines(f"{line}\n" for line in lines)
        figure = Figure(figsize=(8, 6), layout="constrained")
        axes = figure.subplots()
        ordered = sorted(results, key=lambda result: result.calibration[0].seconds)
        passed = [result.calibration[0].seconds for result in ordered]
        axes.plot(passed, passed, color="black", linestyle="--", label="forward passes")
        for stage in STAGES:
            axes.plot(passed, [_seconds(result, stage) for result in ordered], marker="o", label=stage)
        for result, seconds in zip(ordered, passed, strict=True):
            axes.annotate(result.setting.name, (seconds, axes.get_ylim()[0]), rotation=90, fontsize=7, color="gray")
        axes.set(xscale="log", yscale="log", xlabel="forward passes of the images, s", ylabel="s")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
        save_figure(figure, folder / "overhead.png")
