"""What the tests of whole runs share: runs that are stopped, and what lasts of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dnr_plugin.models.saved import load_pruned
from dnr_plugin.runs.state import Track


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


def stopping_after(calls: int) -> Track:
    """Stops a run at some step of some epoch, or while it observes."""
    left = [calls]

    def track(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        for item in items:
            left[0] -= 1
            if left[0] < 0:
                raise Killed(what)
            yield item

    return track


def stopping_at(stage: str) -> Track:
    """Stops a run at its first step of a stage."""

    def track(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        if what.startswith(stage):
            raise Killed(what)
        return items

    return track


def lasting(folder: Path) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Report and events without timings, and the weights."""
    report = json.loads((folder / "report.json").read_text())
    for timed in ("seconds", "latency", "latencies"):
        del report[timed]
    (report["dynamics"] or {}).pop("wall_clock_ratio", None)
    events = events_of(folder)
    for event in events:
        for timed in ("seconds", "training_seconds", "check_seconds"):
            event.pop(timed, None)
    return report, events, load_pruned(folder).state_dict()


def assert_same(found: Any, expected: Any, calls: int) -> None:
    assert found[0] == expected[0], calls
    assert found[1] == expected[1], calls
    assert all(torch.equal(found[2][name], expected[2][name]) for name in expected[2]), calls
