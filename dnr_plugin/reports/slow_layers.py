"""In which layers FLOPs fell and time did not, and why, as far as measured times of layers tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_SHOWN = 3  # layers
_WORTH = 0.005  # of the time of all layers: what one must lack to be shown
_ROUNDED = 1.02  # of the channels that are left: so many more in a full block are a reason
_STAYS = 0.5  # of a layer's time: as much in one of half its size or less is a reason


def slow_layers(report: Mapping[str, Any]) -> list[str]:
    """One line, where latency was a target: the layers that would save most if their time fell as their FLOPs did.

    Args:
        report: of a run; earlier versions' have no times of layers.
    """
    times = report.get("layer_times") or []
    if not times:
        return []
    flops = {row["name"]: (row["flops_before"], row["flops_after"]) for row in report["layers"]}
    whole = sum(time["before"] for time in times)
    lacking = []
    for time in times:
        before, after = flops.get(time["name"], (0, 0))
        if before and time["before"] > 0.0:
            lacks = time["after"] / time["before"] - after / before
            lacking.append((lacks * time["before"] / whole, after / before, time))
    lacking.sort(key=lambda lack: -lack[0])
    shown = [_shown(kept, time) for worth, kept, time in lacking[:_SHOWN] if worth >= _WORTH]
    if not shown:
        return []
    runtime = report["recipe"].get("prune", {}).get("runtime", "eager")
    ran_in = "onnxruntime" if runtime == "onnxruntime" else "eager mode"  # layers are not compiled alone
    return [
        f"Layers whose FLOPs fell most beyond their time, by times of single layers in {ran_in}: {'; '.join(shown)}."
    ]


def _shown(kept: float, time: Mapping[str, Any]) -> str:
    after = time["after"] / time["before"]
    return f"{time['name']} (FLOPs to {100 * kept:.0f} %, time to {100 * after:.0f} %: {_reason(time)})"


def _reason(time: Mapping[str, Any]) -> str:
    (inputs, outputs), kept = time["kept"], math.prod(time["kept"])
    if math.prod(time["rounded"]) >= _ROUNDED * kept:
        full_in, full_out = time["rounded"]
        return f"{inputs:.4g} to {outputs:.4g} channels take as long as {full_in:g} to {full_out:g}"
    if time["least"] >= _STAYS * time["after"] and math.prod(time["narrowest"]) <= kept / 2:
        (few_in, few_out), share = time["narrowest"], time["least"] / time["before"]
        return f"{100 * share:.0f} % stay with {few_in:g} to {few_out:g} channels, for memory and the call"
    return "narrower, it takes longer for each FLOP"
