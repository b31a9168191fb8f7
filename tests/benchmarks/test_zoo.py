"""The zoo: every network ends in a row, whatever happens to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dnr_plugin.benchmarks.zoo import networks, run
from dnr_plugin.benchmarks.zoo.networks import Entry, entries
from dnr_plugin.cli.main import main
from dnr_plugin.models.foreign import torchvision_names

NETS = """
import os, time
from torch import nn

def good():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

def tight():
    return nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(2, 500))

def online():
    raise OSError("no route to host")

def broken():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("not like this")
    return Broken()

def endless():
    time.sleep(1000)

def gone():
    os._exit(9)
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A zoo of small networks in a module of the current folder."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    names = ["good", "tight", "online", "broken", "endless", "gone"]
    small = [Entry(f"mine.{name}", {"name": f"nets:{name}", "kwargs": {}}, (3, 12, 12)) for name in names]
    small.append(Entry("mine.other", {"name": "nets:good", "kwargs": {}}, (3, 12, 12), "no_such_package"))
    monkeypatch.setattr(networks, "entries", lambda: small)

    def rows(*patterns: str, seconds: float = 120.0, **options: Any) -> dict[str, Any]:
        networks_by_name: dict[str, Any] = run.run_zoo(patterns, seconds=seconds, **options)["networks"]
        return networks_by_name

    return rows


def test_each_network_ends_in_a_row(zoo: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    rows = zoo("mine.[gtbo]*", output=tmp_path / "out", flops=0.6)
    assert {name.removeprefix("mine."): row["outcome"] for name, row in rows.items()} == {
        "good": "pruned", "tight": "short", "online": "refused", "broken": "failed", "gone": "killed",
        "other": "not installed",
    }  # fmt: skip
    good = rows["mine.good"]
    assert 0.3 < good["pruned"]["flops"] / good["dense"]["flops"] <= 0.6
    assert good["neurons_removed"] > 0
    assert good["left"] == [["7", "its outputs are the model's outputs"]]
    assert rows["mine.tight"]["reason"].startswith("flops: 0.6 was asked")
    assert "no route to host" in rows["mine.online"]["reason"]
    assert rows["mine.broken"]["reason"] == "RuntimeError: not like this"
    assert rows["mine.gone"]["reason"].startswith("exit code 9")
    assert rows["mine.other"]["reason"] == "pip install no_such_package"
    assert json.loads((tmp_path / "out" / "zoo.json").read_text())["networks"] == rows
    text = (tmp_path / "out" / "zoo.md").read_text()
    assert text.count("\n") == len(rows) + 2


def test_what_finds_no_end_is_ended_and_the_rest_resumed(zoo: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    rows = zoo("mine.endless", seconds=8.0, output=tmp_path)
    assert rows["mine.endless"] == {"outcome": "no end", "reason": "it takes more than 8 s"}
    more = zoo("mine.endless", "mine.other", output=tmp_path, resume=True)
    assert more["mine.endless"] == rows["mine.endless"]
    assert more["mine.other"]["outcome"] == "not installed"


def test_the_zoo_has_every_classifier_of_torchvision_and_no_name_twice() -> None:
    names = [entry.name for entry in entries()]
    assert len(names) == len(set(names))
    assert {f"torchvision.{name}" for name in torchvision_names()} <= set(names)
    for package, count in (("timm", 40), ("monai", 10), ("segmentation_models_pytorch", 10), ("ultralytics", 10)):
        assert sum(name.startswith(f"{package}.") for name in names) == count


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["torchvision.resnet81"], "NETWORK: expected a network of the zoo (--list) or a pattern, found 'torchvision."),
        (["timm.*", "--flops", "1.5"], "--flops: expected a share above 0 and below 1, found 1.5"),
        (["timm.*", "--seconds", "0"], "--seconds: expected a number above 0, found 0"),
    ],
)
def test_bad_input(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "zoo", *arguments, "--output", str(tmp_path / "zoo")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()


def test_a_folder_with_rows_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, more in (("{}", []), ("{", ["--resume"]), ('{"networks": {"a": 1}}', ["--resume"])):
        (tmp_path / "zoo.json").write_text(content)
        assert main(["bench", "zoo", "torchvision.alexnet", "--output", str(tmp_path), *more]) == 2
        assert "zoo.json" in capsys.readouterr().err
        assert (tmp_path / "zoo.json").read_text() == content


def test_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "zoo", "--list", "monai.*"]) == 0
    assert capsys.readouterr().out.split() == [entry.name for entry in entries() if entry.package == "monai"]
    assert "monai" not in sys.modules


@pytest.mark.slow
def test_a_network_of_torchvision(tmp_path: Path) -> None:
    assert main(["bench", "zoo", "torchvision.mnasnet0_5", "--output", str(tmp_path / "zoo")]) == 0
    row = json.loads((tmp_path / "zoo" / "zoo.json").read_text())["networks"]["torchvision.mnasnet0_5"]
    assert row["outcome"] == "pruned"
