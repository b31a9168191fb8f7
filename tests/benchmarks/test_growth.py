"""Cost against size: a table, the power by which each stage grows, and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dnr_plugin.benchmarks import overhead
from dnr_plugin.benchmarks.growth import STAGES, exponent, growth_table, write_growth
from dnr_plugin.benchmarks.overhead import Cost, Overhead, Setting, measured


def result(width: int) -> Overhead:
    """Forward passes grow with the square of the width, observing like them, scoring and repair with the cube."""
    passed = 0.01 * width**2
    seconds = {"observing": 1.5 * passed, "scoring": 1e-4 * width**3, "planning": 2.0, "repair": 1e-3 * width**3}
    costs = [Cost("forward passes", passed, 1.0, None)]
    costs += [Cost(STAGES[stage], time, time / passed, width * 2**20) for stage, time in seconds.items()]
    costs.append(Cost("another criterion", 1.0, 1.0, 2**40))
    return Overhead(Setting(width=width).resolved(), costs, [], "a machine", (1.0, 1.0))


def test_a_power_law_is_recovered() -> None:
    assert exponent([1.0, 2.0, 4.0], [3.0, 24.0, 192.0]) == pytest.approx(3.0)
    assert exponent([2.0, 2.0], [1.0, 2.0]) is None


def test_what_grows_faster_than_the_forward_passes_is_told() -> None:
    rows = growth_table([result(width) for width in (16, 32, 64)]).rows
    assert [row[0] for row in rows[:3]] == ["resnet18, width 16", "resnet18, width 32", "resnet18, width 64"]
    assert rows[1][2:4] == ["10.24", "5.12"]  # observing: what it adds
    assert rows[1][-1] == "32 MiB"
    assert rows[3][2:7] == ["1", "1.00", "1.50", "0.00", "1.50"]
    assert len(growth_table([result(16), result(32)]).rows) == 2  # two networks are no law


def test_files_are_written(tmp_path: Path) -> None:
    write_growth([result(16)], tmp_path)
    write_growth([result(16), result(32)], tmp_path)
    assert [entry["setting"]["width"] for entry in json.loads((tmp_path / "overhead.json").read_text())] == [16, 32]
    assert "resnet18, width 32" in (tmp_path / "overhead.md").read_text()
    assert (tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")


def test_every_width_and_number_of_images_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that have one width are measured once for it."""
    asked: list[Setting] = []
    monkeypatch.setattr(overhead, "overhead", lambda setting, device: asked.append(setting))
    names = ["resnet18", "torchvision.resnet50"]
    [*measured(names, [16, 32], [64, 128], {"side": 32}, "cpu", lambda items, total, what: items)]
    assert [(s.network, s.width, s.images) for s in asked] == [
        ("resnet18", 16, 64), ("resnet18", 16, 128), ("resnet18", 32, 64), ("resnet18", 32, 128),
        ("torchvision.resnet50", 16, 64), ("torchvision.resnet50", 16, 128),
    ]  # fmt: skip
