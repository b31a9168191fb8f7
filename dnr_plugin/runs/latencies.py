"""What a run's user gets: latency of the dense and of the final network, by runtime and batch."""

from __future__ import annotations

import statistics
from typing import Any

from torch import nn

from dnr_plugin.devices import to_device
from dnr_plugin.errors import RunError
from dnr_plugin.network.cost import forward_times, ratio_quartiles
from dnr_plugin.network.runtimes import RUNTIMES, Runtime
from dnr_plugin.runs.removal_stage import MANY, TIMED, timed_images
from dnr_plugin.runs.state import RunState


def measured_latencies(run: RunState) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Of batches of one image, of as many as a target is measured on, and of many.

    In eager mode and in the recipe's ``prune.runtime`` all three, in the others of ``report.runtimes`` one and many.

    Returns:
        A row for each runtime and batch, eager ones first; and of runtimes that the networks cannot run in, why.
    """
    dense, asked = to_device(run.untouched, run.device), run.recipe.prune.runtime
    rows, unmeasured = list[dict[str, Any]](), dict[str, str]()
    for name in dict.fromkeys(["eager", asked, *run.recipe.report.runtimes]):
        batches = (1, TIMED, MANY) if name in ("eager", asked) else (1, MANY)
        try:
            for _ in run.track([None], 1, f"timing, {name}"):
                for batch in batches:
                    rows.append(_row(run, dense, RUNTIMES[name], batch))
        except RunError as error:
            unmeasured[name] = str(error)
    return rows, unmeasured


def _row(run: RunState, dense: nn.Module, runtime: Runtime, batch: int) -> dict[str, Any]:
    """Medians in milliseconds; of their ratio by round, how wide the middle half is."""
    images = runtime.inputs(timed_images(run, batch))
    before, after = forward_times([runtime.prepared(m, images) for m in (dense, run.model)], images, warmup=1)
    lower, _, upper = ratio_quartiles(before, after)
    first, second = 1e3 * statistics.median(before), 1e3 * statistics.median(after)
    return {
        "runtime": runtime.name,
        "batch": batch,
        "dense_ms": first,
        "pruned_ms": second,
        "ratio": second / first,
        "spread": upper - lower,
    }
