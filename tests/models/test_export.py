"""Exported files: they compute what the model computes, for any batch size, or are not there."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dnr_plugin import load_pruned, plan_removal, prune_neurons, save_pruned
from dnr_plugin.cli.main import main
from dnr_plugin.errors import InputError, RunError
from dnr_plugin.models import export
from dnr_plugin.models.build import build_model
from dnr_plugin.models.export import export_model
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.recipe.sections import ModelOptions


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow ResNet-18 for images of 16 pixels that lost a third of its neurons."""
    import torch_pruning as tp

    torch.manual_seed(0)
    model = build_model(ModelOptions(name="resnet18", width=8), 10, 3, 16)
    example = torch.randn(1, 3, 16, 16)
    magnitude = tp.importance.MagnitudeImportance(p=1)
    plan = plan_removal(model, example, magnitude, "neuron_sparsity", 0.3, limits=Limits())
    prune_neurons(model, example, plan.removals)
    folder = tmp_path_factory.mktemp("saved")
    save_pruned(model, folder)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a test that fails to export must leave nothing."""
    yield tmp_path
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _needs_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


def test_torch_reads_what_was_exported(saved: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = place / "model.pt2"
    assert main(["export", str(saved), "--format", "torch", "--output", str(file)]) == 0
    captured = capfd.readouterr()
    assert captured.out.startswith(f"Written to {file}; on random images in batches of 1 and 3 its outputs differ")
    assert captured.err == ""
    images = torch.randn(5, 3, 16, 16)
    assert torch.allclose(torch.export.load(file).module()(images), load_pruned(saved)(images), atol=1e-5)
    assert [path.name for path in place.iterdir()] == ["model.pt2"]


def test_onnxruntime_reads_what_was_exported(saved: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _needs_onnx()
    import onnxruntime

    file = place / "model.onnx"
    assert main(["export", str(saved), "--format", "onnx", "--output", str(file)]) == 0
    captured = capfd.readouterr()
    assert captured.out.count("\n") == 1
    assert captured.err == ""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 16, 16)
    (scores,) = session.run(None, {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(scores), load_pruned(saved)(images), atol=1e-5)
    assert [path.name for path in place.iterdir()] == ["model.onnx"]


def test_the_shape_can_be_given(saved: Path, place: Path) -> None:
    assert export_model(saved, place / "wide.pt2", format="torch", shape="3x24x32") <= export.LIMIT
    images = torch.randn(2, 3, 24, 32)
    found = torch.export.load(place / "wide.pt2").module()(images)
    assert torch.allclose(found, load_pruned(saved)(images), atol=1e-5)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    saved: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def only_others(name: str) -> Any:
        if name == missing:
            raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", only_others)
    assert main(["export", str(saved), "--format", "onnx", "--output", str(place / "model.onnx")]) == 2
    assert capsys.readouterr().err == (
        f'dnr: --format: expected onnx with its packages: pip install "dnr_plugin[export]", found no {missing}\n'
    )
    assert not list(place.iterdir())


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_wrong_outputs_leave_no_file(
    saved: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    write, read = export.FORMATS["torch"]

    def wrongly(file: Path) -> export.Runner:
        module = read(file)
        # off in the last batch only
        return lambda images: module(images) + (wrong * 10 if len(images) == 3 else 0)

    monkeypatch.setitem(export.FORMATS, "torch", (write, wrongly))
    assert main(["export", str(saved), "--format", "torch", "--output", str(place / "model.pt2")]) == 1
    assert "expected the outputs of the model within 0.0001 of the largest, found" in capsys.readouterr().err
    assert not list(place.iterdir())


def test_a_model_that_cannot_be_exported_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Control flow that depends on the images has no graph."""
    (place / "choosy.py").write_text(
        "from torch import nn\n"
        "class Choosy(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(48, 10), nn.Linear(48, 10)\n"
        "    def forward(self, x):\n"
        "        x = x.flatten(1)\n"
        "        return self.a(x) if x.sum() > 0 else self.b(x)\n"
    )
    monkeypatch.chdir(place)
    save_pruned(build_model(ModelOptions(name="choosy:Choosy"), 10), place / "saved")
    command = ["export", str(place / "saved"), "--format", "torch", "--output", str(place / "model.pt2")]
    assert main(command) == 2
    assert "choosy:Choosy" in capfd.readouterr().err
    assert main([*command, "--allow-import", "--input", "3x4x4"]) == 1
    message = capfd.readouterr().err
    assert message.startswith(f"dnr: {place / 'saved'}: torch cannot express this model: ")
    assert message.count("\n") == 1
    assert not (place / "model.pt2").exists()


def test_what_cannot_be_used_is_refused(saved: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine.pt2").write_text("precious")
    for folder, file, more, expected in (
        (saved, place / "new.pt2", ["--input", "3x16"], "--input: expected CxHxW such as 3x224x224, found '3x16'"),
        (saved, place / "new.pt2", ["--input", "4x16x16"], "model: expected a network that takes images of 1x4x16x16"),
        (saved, place / "mine.pt2", [], f"--output: expected a new file, found {place / 'mine.pt2'}, which exists"),
        (saved, place / "no" / "new.pt2", [], "--output: expected a file in a folder that exists, found "),
        (place, place / "new.pt2", [], "expected a folder with architecture.json and model.safetensors"),
    ):
        assert main(["export", str(folder), "--format", "torch", "--output", str(file), *more]) == 2
        message = capsys.readouterr().err
        assert expected in message
        assert message.count("\n") == 1
    with pytest.raises(InputError, match=r"--format: expected one of onnx, torch, found 'torhc'.*torch"):
        export_model(saved, place / "new.pt2", format="torhc")
    assert (place / "mine.pt2").read_text() == "precious"
    assert [path.name for path in place.iterdir()] == ["mine.pt2"]


def test_a_folder_that_cannot_be_written_is_refused(saved: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Access rights do not bind root, so the answer of the system is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="--output: expected a folder that can be written to"):
        export_model(saved, place / "model.pt2", format="torch")


def test_a_disk_that_is_full_is_one_line(saved: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export.FORMATS, "torch", (full, full))
    with pytest.raises(RunError, match=r"model\.pt2: cannot be written: No space left on device"):
        export_model(saved, place / "model.pt2", format="torch")
    assert not list(place.iterdir())
