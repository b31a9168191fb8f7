"""Saving and loading without pickle: equal to the bit in a new process, and nothing in a file runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers.networks import rounding
from safetensors.torch import load_file
from torch import nn

from dnr_plugin.errors import InputError
from dnr_plugin.files import atomic_write
from dnr_plugin.models.build import build_model
from dnr_plugin.models.saved import build, describe, load_pruned, save_pruned
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.sections import ModelOptions
from dnr_plugin.runs.run_folder import load_checkpoint_state


def _pruned(model: nn.Module, size: int = 32) -> nn.Module:
    """Half of the neurons removed by the weights' magnitude."""
    import torch_pruning as tp

    example = torch.randn(1, 3, size, size)
    magnitude = tp.importance.MagnitudeImportance(p=1)
    plan = plan_removal(model, example, magnitude, "neuron_sparsity", 0.4, limits=Limits(max_pruning_ratio=0.7))
    prune_neurons(model, example, plan.removals)
    return model.eval()


LOAD = """
import sys, torch
from dnr_plugin import load_pruned
torch.set_num_threads(int(sys.argv[4]))  # sums depend on how they are split
torch.save(load_pruned(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"name": "resnet18", "width": 8}, 32),
        ({"name": "vgg16_bn", "width": 8}, 32),
        ({"name": "mlp", "hidden": [20, 10]}, 32),
        ({"name": "torchvision.mobilenet_v2"}, 64),
        ({"name": "torchvision.densenet121"}, 64),
        ({"name": "torchvision.resnext50_32x4d"}, 64),
        ({"name": "torchvision.convnext_tiny"}, 64),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else str(value),
)
def test_reloaded_in_a_new_process_outputs_are_equal_to_the_bit(
    tmp_path: Path, options: dict[str, Any], size: int
) -> None:
    torch.manual_seed(1)
    model = _pruned(build_model(ModelOptions(**options), 10), size)
    save_pruned(model, tmp_path / "saved")
    images = torch.randn(2, 3, size, size)
    torch.save(images, tmp_path / "in.pt")
    arguments = [tmp_path / "saved", tmp_path / "in.pt", tmp_path / "out.pt", str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True)
    with torch.no_grad():
        expected = model(images)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["architecture.json", "model.safetensors"]


def test_an_imported_model_needs_its_builder_named(tmp_path: Path) -> None:
    model = _pruned(torchvision.models.resnet18(num_classes=7), 64)
    with pytest.raises(ValueError, match="builder: expected"):
        save_pruned(model, tmp_path)
    with pytest.raises(ValueError, match=r"torchvision.resnet34 makes another model: 'layer1.2' differ|differ"):
        save_pruned(model, tmp_path, {"name": "torchvision.resnet34", "kwargs": {"num_classes": 7}})
    assert not any(tmp_path.iterdir())
    save_pruned(model, tmp_path, {"name": "torchvision.resnet18", "kwargs": {"num_classes": 7}})
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(load_pruned(tmp_path)(images), model(images))


def test_a_builder_of_ones_own_is_imported_only_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_net.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    model = _pruned(build_model(ModelOptions(name="small_net:net"), 4, image_size=8), 8)
    save_pruned(model, tmp_path / "saved")
    with pytest.raises(InputError, match="allow_import"):
        load_pruned(tmp_path / "saved")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_pruned(tmp_path / "saved", allow_import=True)(images), model(images))


def test_modes_flags_and_buffers_survive(tmp_path: Path) -> None:
    model = build_model(ModelOptions(name="resnet20", width=4), 5)
    model.train()(torch.randn(8, 3, 32, 32))
    save_pruned(_pruned(model), tmp_path)
    loaded = load_pruned(tmp_path)
    assert not loaded.training
    assert int(loaded.state_dict()["bn1.num_batches_tracked"]) == 1
    for (name, old), (_, new) in zip(model.named_modules(), loaded.named_modules(), strict=True):
        assert repr(old) == repr(new), name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "found no model.safetensors"),
        (lambda folder: (folder / "architecture.json").unlink(), "found no architecture.json"),
        (lambda folder: (folder / "architecture.json").write_text("{"), "found damage"),
        (lambda folder: (folder / "architecture.json").write_text("[]"), "expected a mapping, found list"),
        (lambda folder: (folder / "architecture.json").write_text("{}"), "expected a description of format 1"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 5), "found damage"),
        (
            lambda folder: _edit(folder, lambda a: a["tensors"]["conv1.weight"].update(shape=[1, 3, 3, 3])),
            "as model.safetensors has it",
        ),
        (lambda folder: _edit(folder, lambda a: a["modules"].update(nowhere={"in_channels": 3})), "does not fit"),
        (
            lambda folder: _edit(folder, lambda a: a["tensors"]["conv1.weight"].update(dtype="nn")),
            "conv1.weight: expected",
        ),
        (lambda folder: _edit(folder, lambda a: a["tensors"].pop("conv1.weight")), "found others"),
        (lambda folder: _flip(folder / "model.safetensors"), "found other bytes"),
        (lambda folder: _edit(folder, lambda a: a["modules"].update(conv1={"out_channels": 3})), "says"),
        (lambda folder: _edit(folder, lambda a: a["modules"].update(conv1={"stride": [10**12, 1]})), "out of range"),
        (lambda folder: _edit(folder, lambda a: a.update(split_attention=["conv1"])), "no attention that can be split"),
        (lambda folder: (folder / "architecture.json").write_text("[" * 100_000), "found damage"),
        (lambda folder: _edit(folder, lambda a: a["builder"].update(name="os:system")), "would run its code"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    save_pruned(build_model(ModelOptions(name="resnet20", width=4), 5), tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_pruned(tmp_path)
    assert "\n" not in str(caught.value)


def _flip(file: Path) -> None:
    """One bit of the last tensor."""
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)


def _edit(folder: Path, change: Any) -> None:
    architecture = json.loads((folder / "architecture.json").read_text())
    change(architecture)
    (folder / "architecture.json").write_text(json.dumps(architecture))


def test_describing_and_building_again_is_the_identity() -> None:
    model = _pruned(build_model(ModelOptions(name="resnet18", width=8), 10))
    architecture = json.loads(json.dumps(describe(model)))
    assert describe(build(architecture)) == architecture


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"stage": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail() -> None:
        with atomic_write(file) as stream:
            stream.write("new, but not all of it")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_model_saved_by_0_1_0_loads() -> None:
    """Pruned, with activations replaced; outputs are those of the machine that saved it, up to rounding."""
    folder = Path(__file__).parent / "saved_by_0.1.0"
    model, expected = load_pruned(folder), load_file(folder / "outputs.safetensors")
    scores = model(expected["images"]).detach()
    assert float((scores - expected["scores"]).norm()) < rounding(72, 20) * float(expected["scores"].norm())
