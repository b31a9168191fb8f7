"""The benchmark of sensitivity: a curve for each layer, from a dense network that a benchmark of criteria may share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.benchmarks import NARROW, SET
from helpers.commands import refused

from dnr_plugin.cli.main import main
from dnr_plugin.models.build import build_model
from dnr_plugin.pruning.groups import prunable_layers
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.recipe.load import load_recipe

FEW = ["--set", "prune.repair_samples=64"]


@pytest.mark.drawn
def test_a_curve_for_each_layer_from_a_network_trained_once(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bench"
    assert main(["bench", "criteria", str(tiny), *SET, "--output", str(folder), *NARROW, "--criteria", "l1"]) == 0
    trained = (folder / "dense" / "seed=0" / "checkpoint.pt").read_bytes()
    assert main(["bench", "sensitivity", str(tiny), *SET, "--output", str(folder), *FEW, "--shares", "0.75,0.25"]) == 0
    assert f"Written to {folder}" in capsys.readouterr().out
    assert (folder / "dense" / "seed=0" / "checkpoint.pt").read_bytes() == trained
    result = json.loads((folder / "sensitivity.json").read_text())
    assert result["score"] == "redundancy"
    assert result["dense"] == json.loads((folder / "criteria.json").read_text())["dense"]["by_seed"]["0"]
    recipe = load_recipe(tiny, SET[1::2])
    model = build_model(recipe.model, 10, 3, 16)
    layers = prunable_layers(model, torch.randn(1, 3, 16, 16), Limits(), {}).layers
    assert [row["layer"] for row in result["layers"]] == [layer.name for layer in layers]
    for row, layer in zip(result["layers"], layers, strict=True):
        assert row["neurons"] == layer.size
        first, second = row["points"]
        assert first["share"] == pytest.approx(round(0.25 * layer.size) / layer.size)
        assert second["share"] == pytest.approx(round(0.75 * layer.size) / layer.size)
        assert all(0.0 <= point[way] <= 1.0 for point in row["points"] for way in ("removed", "repaired"))
    text = (folder / "sensitivity.md").read_text()
    assert "| layer | neurons | 25 % gone | 75 % gone |" in text and text.count("\n| ") == len(layers) + 1
    assert (folder / "sensitivity.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shares", "0.5,1"], "--shares: expected shares of a layer above 0 and below 1, found '1'"),
        (["--shares", "half"], "--shares: expected shares of a layer above 0 and below 1, found 'half'"),
        (["--set", "prune={mode: watch}"], "prune.mode: expected after_training for this benchmark, found watch"),
    ],
)
def test_a_bad_argument_gets_its_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in refused(capsys, "bench", "sensitivity", str(tiny), "--output", str(tmp_path / "b"), *arguments)
    assert not (tmp_path / "b").exists()
