"""The figures of a finished run: what ``report.json`` holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dnr_plugin.devices import device_name, versions
from dnr_plugin.pruning.targets import Baseline
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.reports.layer_report import layer_rows
from dnr_plugin.runs.results import CheckSums, Results


@dataclass(frozen=True)
class Measured:
    """Of a run's final model.

    Attributes:
        accuracy: on test images.
        latencies: beside the dense one's, by runtime and batch, eager ones first.
        unmeasured: runtimes without a latency, and why.
        batch: of a target.
        activation: see `activation_summary`.
    """

    accuracy: float
    latencies: Sequence[Mapping[str, Any]]
    unmeasured: Mapping[str, str]
    batch: int
    activation: dict[str, Any]


def outcome(
    recipe: Recipe,
    device: torch.device,
    dense: Baseline,
    now: Baseline,
    results: Results,
    events: Sequence[Mapping[str, Any]],
    measured: Measured,
) -> dict[str, Any]:
    """Puts together what the stages of a run have noted.

    Args:
        recipe: of the run.
        device: on which it ran.
        dense, now: `targets.baseline` of the model before and after.
        results: seconds, accuracies and removals of the stages.
        events: of ``events.jsonl``.
        measured: of the final model.
    """
    removal, target, seconds = results.removal, recipe.prune.target, results.seconds
    assert removal is not None
    before, after = dense.report, now.report
    kept = {"params": after.params / before.params, "flops": after.flops / before.flops}
    dynamics = _dynamics(results.dynamics, events)
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json"),
        "device": device_name(device),
        "versions": versions(),
        "seconds": {**asdict(seconds), "total": seconds.total},
        "mode": recipe.prune.mode,
        "dense": {"params": before.params, "flops": before.flops, "accuracy": results.dense_accuracy},
        "pruned": {
            "params": after.params,
            "flops": after.flops,
            "accuracy": measured.accuracy,
            "accuracy_before_finetune": results.accuracy_before_finetune,
        },
        "sparsity": {"neuron": 1 - now.neurons / dense.neurons, "weight": 1 - kept["params"]},
        "kept": kept,
        "latency": next(timed for timed in measured.latencies if timed["batch"] == measured.batch),
        "latencies": measured.latencies,
        "unmeasured": measured.unmeasured,
        "layer_times": [{"name": name, **_plain(time)} for name, time in removal.layer_times.items()],
        "target": {
            "kind": target.kind if target else None,
            "requested": (True if target.kind == "dead" else target.value) if target else None,
            "achieved": removal.achieved,
            "reached": removal.reached,
            "predicted": removal.predicted,
        },
        "round_to": removal.round_to if removal.round_to is not None else recipe.prune.round_to,
        "dead": {"neurons": removal.dead, "of": removal.neurons},
        "reactivated": dynamics["reactivated"] if dynamics else 0,
        "dynamics": dynamics,
        "exact_removal": {"neurons": removal.exact_neurons, "max_abs_diff": removal.max_abs_diff},
        "repair": asdict(removal.repair) if removal.repair is not None else None,
        "layers": layer_rows(before, after),
        "skipped": [{"layer": layer, "reason": reason} for layer, reason in removal.skipped],
        "unsupported_ops": after.unsupported_ops,
        "activation": measured.activation,
        "amp": {stage: asdict(chosen) for stage, chosen in results.amp.items()},
    }


def _plain(time: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in time.items()}


def _dynamics(sums: CheckSums | None, events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Sums over all checks, and how long training took against training the dense network all along."""
    if sums is None:
        return None
    epochs = [event for event in events if event["event"] == "epoch" and event["stage"] == "train"]
    shrunk = min((event["epoch"] for event in events if event["event"] == "check" and event["removed"]), default=None)
    dense = [e["training_seconds"] - e["check_seconds"] for e in epochs if e["epoch"] <= (shrunk or math.inf)]
    ratio = None
    if dense and shrunk is not None:
        ratio = sum(e["training_seconds"] for e in epochs) / (len(epochs) * statistics.median(dense))
    told = {what: getattr(sums, what) for what in ("checks", "died", "reactivated", "restored", "removed")}
    return {**told, "stopped": sums.stopped, "wall_clock_ratio": ratio}
