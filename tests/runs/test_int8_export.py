"""A run's network in 8 bits: it is as accurate, smaller, and what the table says, or it is not there."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import refused
from helpers.common import TINY

from dnr_plugin import load_pruned, save_pruned
from dnr_plugin.cli.main import main
from dnr_plugin.data.registry import load_data
from dnr_plugin.models.build import build_model
from dnr_plugin.models.export import OnnxModel
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.recipe.sections import ModelOptions
from dnr_plugin.runs import int8_export
from dnr_plugin.runs.int8_export import Exported, Int8Export, export_int8
from dnr_plugin.runs.run import run_recipe
from dnr_plugin.training.evaluation import evaluate

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    run_recipe(load_recipe(folder / "tiny.yaml"), folder / "run", device="cpu")
    return folder / "run"


@dataclass
class Done:
    """What a command left: its file, what it measured and what it printed."""

    file: Path
    told: Int8Export
    printed: tuple[str, str]


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    told, printed = [], (io.StringIO(), io.StringIO())
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed[0]), redirect_stderr(printed[1]):
        patch.setattr(int8_export, "export_int8", lambda *a, **b: told.append(export_int8(*a, **b)) or told[0])
        patch.setattr(int8_export, "LIMIT", 1.0)  # a network that has hardly learnt is torn between classes
        assert main(_export(run, file.parent)) == 0
    return Done(file, told[0], (printed[0].getvalue(), printed[1].getvalue()))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a test that fails to export must leave nothing."""
    (tmp_path / "place").mkdir()
    yield tmp_path / "place"
    assert not list((tmp_path / "place").iterdir())


def _export(run: Path, place: Path, *more: str) -> list[str]:
    return ["export", str(run), "--format", "onnx", "--int8", "--output", str(place / "model.onnx"), *more]


@torch.no_grad()
def test_the_file_is_alone_smaller_and_what_the_table_says(run: Path, exported: Done) -> None:
    assert [path.name for path in exported.file.parent.iterdir()] == ["model.onnx"]
    dense, pruned, quantised = exported.told.networks
    assert quantised.size == exported.file.stat().st_size < pruned.size < dense.size
    recipe, report = load_recipe(run / "recipe.yaml"), json.loads((run / "report.json").read_text())
    images = load_data(recipe.data, recipe.seed).test
    models = (load_pruned(run), OnnxModel(exported.file))
    before, after = (evaluate(model, images, batch_size=7) for model in models)
    assert (dense.accuracy, pruned.accuracy, quantised.accuracy) == (report["dense"]["accuracy"], before, after)
    scores, rounded = (torch.cat([model(x) for x, _ in images.batches(60)]) for model in models)
    assert (scores - rounded).norm() < 0.4 * (scores - scores.mean(0)).norm()


def test_weights_are_of_7_bits_scaled_by_channel(exported: Done) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(exported.file).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    dequantised = {node.output[0]: node.input for node in graph.node if node.op_type == "DequantizeLinear"}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 21
    for layer in layers:
        weight, scale, _ = (values[name] for name in dequantised[layer.input[1]])
        assert weight.dtype == "int8"
        assert 60 <= abs(weight.astype(int)).max() <= 64
        assert scale.shape == (weight.shape[0],)
        assert values[dequantised[layer.input[0]][2]].dtype == "uint8"
    assert not any(node.op_type == "BatchNormalization" for node in graph.node)


def test_the_batch_size_is_free(exported: Done) -> None:
    model, images = OnnxModel(exported.file), torch.randn(5, 3, 16, 16)
    together = model(images)
    assert together.shape == (5, 10)
    assert torch.equal(torch.cat([model(image[None]) for image in images]), together)


def test_the_command_prints_one_table(exported: Done) -> None:
    out, err = exported.printed
    assert err == ""
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["dense", "pruned", "pruned, int8"]
    assert "1 ReduceMean in float32, the other operators in 8 bits; calibrated on 128 training images" in out
    assert "Accuracy on its 60 test images" in out
    assert out.endswith(f"Written to {exported.file}\n")


def test_a_network_that_pruning_made_slower_is_told() -> None:
    def notes(pruned: float) -> str:
        times = {"dense": 0.2, "pruned": pruned, "pruned, int8": 0.1}
        networks = [Exported(name, 100, 0.9, [seconds] * 5, [seconds] * 5) for name, seconds in times.items()]
        return " ".join(Int8Export("run", networks, 64, 60, {}).notes())

    assert "all operators in 8 bits" in notes(0.1)
    assert "prune.round_to" not in notes(0.1)
    assert "slower than the dense one" in notes(0.3) and "prune.round_to" in notes(0.3)


def test_what_loses_accuracy_is_not_written(
    run: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.9, 0.5])
    monkeypatch.setattr(int8_export, "quantise", lambda source, target, images: shutil.copy(source, target))
    monkeypatch.setattr(int8_export, "evaluate", lambda *_, **__: next(accuracies))
    assert main(_export(run, place)) == 1
    assert capsys.readouterr().err == (
        "dnr: int8: expected at most 2 points of accuracy lost on the 60 test images, found 90.00 % before and 50.00 % "
        "in 8 bits; nothing was written\n"
    )


def test_a_disk_that_is_full_is_one_line(
    run: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(int8_export, "write_checked", full)
    assert main(_export(run, place)) == 1
    assert capsys.readouterr().err == f"dnr: {place / 'model.onnx'}: cannot be written: No space left on device\n"


def test_without_a_recipe_there_are_no_images(tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pruned(build_model(ModelOptions(name="resnet20", width=4), 10), tmp_path / "saved")
    assert refused(capsys, *_export(tmp_path / "saved", place)) == (
        "dnr: --int8: expected a run's folder, whose recipe says what images to calibrate with, found no recipe.yaml "
        f"in {tmp_path / 'saved'}\n"
    )


def test_images_that_are_gone_are_named_with_the_recipe(
    run: Path, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(run, tmp_path / "run")
    recipe = yaml.safe_load((moved / "recipe.yaml").read_text())
    recipe["data"] |= {"name": "imagefolder", "root": str(tmp_path / "gone")}
    (moved / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    message = refused(capsys, *_export(moved, place))
    line = 1 + next(n for n, text in enumerate((moved / "recipe.yaml").read_text().splitlines()) if "root:" in text)
    assert message == (
        f"dnr: {moved / 'recipe.yaml'}:{line}: data.root: expected a folder with train and val (or test) in it, found "
        f"no folder {tmp_path / 'gone'}\n"
    )


def test_what_cannot_be_used_is_refused(
    run: Path, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_format = [word if word != "onnx" else "torch" for word in _export(run, place)]
    assert refused(capsys, *torch_format) == "dnr: --int8: expected --format onnx, found torch\n"
    expected = "dnr: --input: expected nothing with --int8, which takes the run's images, found 3x16x16\n"
    assert refused(capsys, *_export(run, place, "--input", "3x16x16")) == expected
    assert "--output: expected a file in a folder that exists" in refused(capsys, *_export(run, place / "no"))
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "recipe.yaml", tmp_path / "begun")
    assert "found no architecture.json" in refused(capsys, *_export(tmp_path / "begun", place))
    imported = importlib.import_module

    def without_onnx(name: str) -> Any:
        if name == "onnx":
            raise ImportError(name)
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", without_onnx)
    assert 'pip install "dnr_plugin[export]", found no onnx' in refused(capsys, *_export(run, place))
