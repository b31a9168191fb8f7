"""Reports and events of runs that never ran, in the formats of real ones, for what draws and compares them."""

from __future__ import annotations

import math
import random
from typing import Any

LAYERS = ("conv1", *(f"layer{stage}.{block}.conv1" for stage in range(1, 5) for block in range(2)))


def check_events(
    *, layers: tuple[str, ...] = LAYERS, epochs: int = 20, removes: bool = True, seed: int = 0, died: float = 0.05
) -> list[dict[str, Any]]:
    """One event per check (epoch) and layer; counts that add up: what is dead, candidate and removed follows."""
    draw = random.Random(seed)
    events = []
    left = {name: 16 * 2 ** (4 * n // len(layers)) for n, name in enumerate(layers)}
    dead, candidates = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    for check in range(1, epochs + 1):
        for depth, name in enumerate(layers):
            fresh = round((left[name] - dead[name]) * died * draw.random() * (1 + depth) / len(layers))
            back = round(0.3 * dead[name] * draw.random())
            removed = round(0.5 * candidates[name]) if removes and check < 0.6 * epochs else 0
            restored = min(candidates[name] - removed, back) if removes else 0
            now = dead[name] + fresh - back
            nominated = max(0, now - candidates[name]) if removes and check < 0.6 * epochs else 0
            candidates[name] += nominated - removed - restored
            events.append(
                {
                    "event": "check", "stage": "train", "check": check, "epoch": float(check), "step": 100 * check,
                    "layer": name, "neurons": left[name], "dead": now, "died": fresh, "reactivated": back,
                    "candidates": candidates[name], "nominated": nominated, "restored": restored, "removed": removed,
                    "entropy": 2.4 - 1.5 * depth / len(layers) + 0.8 * math.exp(-check / 8) + 0.05 * draw.random(),
                    "drift": None if check == 1 else 0.6 * math.exp(-check / 4) * (1 + draw.random()) + 0.002,
                }
            )  # fmt: skip
            dead[name] = max(0, now - removed)
            left[name] -= removed
    return events


def epoch_events(epochs: int = 20, stage: str = "train", best: float = 0.9) -> list[dict[str, Any]]:
    """One event per epoch of a stage, accuracy rising towards `best`."""
    return [
        {
            "event": "epoch", "stage": stage, "epoch": epoch, "loss": 2.3 * math.exp(-epoch / 6), "lr": 0.1,
            "accuracy": best * (1 - math.exp(-epoch / 4)), "seconds": 3.0,
        }
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


def report_of(
    recipe: dict[str, Any], events: list[dict[str, Any]], *, accuracy: float = 0.9, kept: float = 0.3
) -> dict[str, Any]:
    """The report of a run with these events: of a watching or removing one if they hold checks, else of an old one."""
    checks = [event for event in events if event["event"] == "check"]
    layers = dict.fromkeys(event["layer"] for event in checks) or dict.fromkeys(LAYERS)
    rows = [
        {
            "name": name, "type": "Conv2d", "channels_before": 64, "channels_after": round(64 * kept),
            "params_before": 9 * 64, "params_after": round(9 * 64 * kept), "flops_before": 6400,
            "flops_after": round(6400 * kept),
        }
        for name in layers
    ]  # fmt: skip
    report: dict[str, Any] = {
        "name": recipe["name"], "seed": recipe.get("seed", 0), "recipe": recipe, "device": "CPU", "versions": {},
        "seconds": {"train": 60.0, "prune": 1.0, "finetune": 20.0, "total": 81.0},
        "dense": {"params": 10_000, "flops": 20_000, "accuracy": 0.91},
        "pruned": {
            "params": round(10_000 * kept), "flops": round(20_000 * kept), "accuracy": accuracy,
            "accuracy_before_finetune": 0.5,
        },
        "sparsity": {"neuron": 0.9 * (1 - kept), "weight": 1 - kept}, "kept": {"params": kept, "flops": kept},
        "latency": None,
        "target": {"kind": "flops", "requested": kept, "achieved": kept, "reached": True},
        "dead": {"neurons": 7, "of": 900}, "reactivated": 0, "exact_removal": {"neurons": 0, "max_abs_diff": 0.0},
        "layers": rows, "skipped": [], "unsupported_ops": {},
    }  # fmt: skip
    if checks:
        counts = {name: sum(event[name] for event in checks) for name in ("died", "reactivated", "restored", "removed")}
        report["mode"] = "dynamic" if counts["removed"] else "watch"
        report["dynamics"] = {
            "checks": max(event["check"] for event in checks), **counts, "stopped": None, "wall_clock_ratio": 0.71,
        }  # fmt: skip
        report["reactivated"] = counts["reactivated"]
        report["dense"]["accuracy"] = report["pruned"]["accuracy_before_finetune"] = None
    if report.get("mode") == "watch":
        report["target"] = {"kind": None, "requested": None, "achieved": None, "reached": True}
    return report
