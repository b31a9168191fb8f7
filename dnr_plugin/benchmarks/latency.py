"""Latency that was asked of a plan against what comes out, by network, runtime and batch, and its FLOPs."""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp

from dnr_plugin.benchmarks.overhead import Setting, fresh_network
from dnr_plugin.devices import device_name, fast_layout, pick_device, versions
from dnr_plugin.errors import InputError, RunError, TargetError, did_you_mean
from dnr_plugin.files import atomic_write, locked
from dnr_plugin.network.cost import flop_report, forward_times, ratio_quartiles
from dnr_plugin.network.runtimes import RUNTIMES, check_runtime
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.reports.figures.drawing import save_figure
from dnr_plugin.reports.table import Table

FILE = "latency.json"
_SECONDS = 6.0  # that the dense and the pruned network are timed for in the end, in turn


@dataclass(frozen=True)
class Latency:
    """One plan.

    Attributes:
        network, runtime, batch: what is timed.
        asked: share of the dense network's latency.
        predicted: by times of layers; measured: by the plan, when it was made; None where there is none.
        again: measured once more, for longer; low, high: quartiles of that, by round.
        flops: share that is kept.
        dense_ms: of a batch.
        seconds: that planning took, layers that the table did not have yet included.
        missed: why there is no plan that reaches it, or None.
    """

    network: str
    runtime: str
    batch: int
    asked: float
    predicted: float | None = None
    measured: float | None = None
    again: float | None = None
    low: float | None = None
    high: float | None = None
    flops: float | None = None
    dense_ms: float | None = None
    seconds: float | None = None
    missed: str | None = None


def runtimes_of(text: str) -> list[str]:
    """Reads names of runtimes with commas between them.

    Raises:
        InputError: one that there is not, or that needs what is not installed.
    """
    names = [item.strip() for item in text.split(",")]
    for name in names:
        if name not in RUNTIMES:
            raise InputError(
                f"--runtimes: expected some of {', '.join(RUNTIMES)}, found {name!r}{did_you_mean(name, RUNTIMES)}"
            )
        check_runtime(name, "--runtimes")
    return names


def latencies_asked(
    networks: Sequence[str],
    runtimes: Sequence[str],
    batches: Sequence[int],
    levels: Sequence[float],
    setting: dict[str, Any],
    device: str,
    track: Callable[..., Any],
) -> Iterator[Latency]:
    """Plans each, in scope "latency_aware" with the magnitude of weights as score, of networks with fresh weights.

    Args:
        networks: as recipes name them; runtimes: see `runtimes_of`; batches: sizes; levels: see `Latency.asked`.
        setting: width, side and seed of `overhead.Setting`.
        device: "auto", "cpu" or "cuda".
        track: progress over a list.

    Raises:
        InputError: an unknown network.
    """
    cells = [*itertools.product(networks, runtimes, batches, levels)]
    for network, runtime, batch, level in track(cells, len(cells), "planning"):
        yield _planned(Setting(network=network, **setting).resolved(), runtime, batch, level, device)


def _planned(setting: Setting, runtime: str, batch: int, level: float, device: str) -> Latency:
    chosen, runs_in = pick_device(device), RUNTIMES[runtime]
    dense, side = fresh_network(setting, chosen).eval(), setting.side or 0
    images = torch.randn(batch, 3, side, side, device=chosen).to(memory_format=fast_layout(chosen))
    row = Latency(setting.name, runtime, batch, level)
    start, missed = time.perf_counter(), None
    try:
        plan = plan_removal(
            dense, images, tp.importance.MagnitudeImportance(), "latency", level,
            scope="latency_aware", runtime=runtime,
        )  # fmt: skip
    except TargetError as error:
        if error.plan is None:
            return replace(row, missed=str(error))
        plan, missed = error.plan, str(error)
    except RunError as error:
        return replace(row, missed=str(error))
    seconds = time.perf_counter() - start
    pruned = copy.deepcopy(dense)
    prune_neurons(pruned, images[:1], plan.removals)
    flops = [flop_report(model, images[:1]).flops for model in (pruned, dense)]
    inputs = runs_in.inputs(images)
    before, after = forward_times([runs_in.prepared(m, inputs) for m in (dense, pruned)], inputs, seconds=_SECONDS)
    low, middle, high = ratio_quartiles(before, after)
    return replace(
        row,
        predicted=plan.predicted,
        measured=plan.achieved,
        again=middle,
        low=low,
        high=high,
        flops=flops[0] / flops[1],
        dense_ms=1e3 * statistics.median(before),
        seconds=seconds,
        missed=missed,
    )


def latency_table(results: Sequence[Latency]) -> Table:
    """A plan in each row."""

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    head = ["network", "runtime", "batch", "dense, ms", "asked", "predicted", "measured", "again (quartiles)", "FLOPs",
            "planning, s"]  # fmt: skip
    rows = [
        [
            r.network,
            r.runtime,
            str(r.batch),
            "-" if r.dense_ms is None else f"{r.dense_ms:.1f}",
            f"{r.asked:g}",
            ratio(r.predicted),
            ratio(r.measured),
            ratio(r.again) if r.again is None else f"{r.again:.3f} ({r.low:.3f} to {r.high:.3f})",
            "-" if r.flops is None else f"{r.flops:.1%}",
            "-" if r.seconds is None else f"{r.seconds:.0f}",
        ]
        for r in results
    ]
    return Table("latency of the pruned network as a share of the dense one's", head, rows)


def notes(results: Sequence[Latency], device: str) -> list[str]:
    """Where it was measured, and what was not reached."""
    where = f"{device_name(pick_device(device))}, torch {versions()['torch']}; n = 1 plan each, fresh weights."
    missed = [f"{r.network}, {r.runtime}, batch {r.batch}, {r.asked:g}: {r.missed}" for r in results if r.missed]
    return [where, *missed]


def write_latencies(results: Sequence[Latency], folder: Path, device: str) -> None:
    """Writes ``latency.json``, ``latency.md`` and ``latency.png``."""
    from matplotlib.figure import Figure

    with locked(folder):
        with atomic_write(folder / FILE) as file:
            json.dump([asdict(result) for result in results], file, indent=1)
            file.write("\n")
        lines = [*latency_table(results).markdown(), "", *(f"- {note}" for note in notes(results, device))]
        with atomic_write(folder / "latency.md") as file:
            file.writelines(f"{line}\n" for line in lines)
        figure = Figure(figsize=(7, 6), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="black", linestyle="--", label="as much time as FLOPs")
        for network, runtime, batch in dict.fromkeys((r.network, r.runtime, r.batch) for r in results):
            own = [r for r in results if (r.network, r.runtime, r.batch) == (network, runtime, batch)]
            points = sorted((r.flops, r.again) for r in own if r.flops is not None and r.again is not None)
            axes.plot(
                *zip((*points, (1.0, 1.0)), strict=True), marker="o", label=f"{network}, {runtime}, batch {batch}"
            )
        axes.set(xlim=(0, 1.05), ylim=(0, 1.05), xlabel="share of the FLOPs", ylabel="share of the latency")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        save_figure(figure, folder / "latency.png")
