"""Latency asked and measured: a table, files, and what cannot be reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import refused

from dnr_plugin.benchmarks import latency
from dnr_plugin.benchmarks.latency import Latency, latency_table, notes, write_latencies
from dnr_plugin.cli.main import main
from dnr_plugin.errors import TargetError
from dnr_plugin.pruning.plan import Plan

RESULTS = [
    Latency("a", "eager", 1, 0.5, 0.48, 0.49, 0.51, 0.5, 0.52, 0.4, 3.25, 12.4),
    Latency("a", "eager", 1, 0.25, missed="expected at least 0.3, found 0.25"),
]


def test_a_row_for_each_plan() -> None:
    rows = latency_table(RESULTS).rows
    expected = ["a", "eager", "1", "3.2", "0.5", "0.480", "0.490", "0.510 (0.500 to 0.520)", "40.0%", "12"]
    assert rows[0] == expected
    assert rows[1] == ["a", "eager", "1", "-", "0.25", *"-----"]
    assert notes(RESULTS, "cpu")[1:] == ["a, eager, batch 1, 0.25: expected at least 0.3, found 0.25"]


def test_files_are_written(tmp_path: Path) -> None:
    write_latencies(RESULTS[:1], tmp_path, "cpu")
    write_latencies(RESULTS, tmp_path, "cpu")
    assert [row["asked"] for row in json.loads((tmp_path / "latency.json").read_text())] == [0.5, 0.25]
    assert "0.510 (0.500 to 0.520)" in (tmp_path / "latency.md").read_text()
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_plans_are_made_carried_out_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command; the search for a plan alone is left out. What misses its target is timed and named."""
    asked: list[tuple[int, float, dict[str, Any]]] = []

    def plan(model: Any, images: Any, importance: Any, kind: str, value: float, **options: Any) -> Plan:
        asked.append((len(images), value, options))
        assert kind == "latency"
        found = Plan({"layer1.0.conv1": [0, 1]}, kind, value, 0.9, 100, 100, predicted=0.8)
        if value < 0.5:
            raise TargetError("not reached", 0.9, found)
        return found

    monkeypatch.setattr(latency, "plan_removal", plan)
    monkeypatch.setattr(latency, "_SECONDS", 0.1)
    small = ["--width", "4", "--side", "8", "--batch", "1,2", "--levels", "0.5,0.3"]
    assert main(["bench", "latency", *small, "--output", str(tmp_path)]) == 0
    assert [(batch, value) for batch, value, _ in asked] == [(1, 0.5), (1, 0.3), (2, 0.5), (2, 0.3)]
    assert asked[0][2] == {"scope": "latency_aware", "runtime": "eager"}
    rows = json.loads((tmp_path / "latency.json").read_text())
    assert [row["missed"] for row in rows] == [None, "not reached"] * 2
    for row in rows:
        assert row["low"] <= row["again"] <= row["high"]
        assert (row["predicted"], row["measured"]) == (0.8, 0.9)
        assert 0.9 < row["flops"] < 1.0
    assert "resnet18, width 4, eager, batch 2, 0.3: not reached" in capsys.readouterr().out
    assert "expected a folder without latency.json" in refused(capsys, "bench", "latency", "--output", str(tmp_path))


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--levels", "1.5", "--levels: expected shares of the latency above 0 and below 1, found '1.5'"),
        ("--levels", "half", "found 'half'"),
        ("--runtimes", "eagr", "--runtimes: expected some of eager, compiled, onnxruntime, found 'eagr'"),
    ],
)
def test_bad_input_is_one_line(option: str, value: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(capsys, "bench", "latency", option, value)
