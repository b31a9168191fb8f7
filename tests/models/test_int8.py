"""What of an ONNX file can be had in 8 bits is, and what cannot is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError, RunError
from dnr_plugin.models.build import build_model
from dnr_plugin.models.export import OnnxModel, write_model
from dnr_plugin.models.int8 import counted, quantise
from dnr_plugin.network.batchnorm import recalibrate_batchnorm
from dnr_plugin.recipe.sections import ModelOptions

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


class Summed(nn.Module):
    """A linear layer in Einstein's notation, which has no kernel in 8 bits, after one that has."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.weight = first, nn.Parameter(torch.randn(10, 48))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nc,oc->no", self.first(x.flatten(1)), self.weight)


def _written(model: nn.Module, side: int, folder: Path) -> Path:
    write_model(model.eval(), torch.zeros(1, 3, side, side), folder / "float.onnx", "onnx", "model")
    return folder / "float.onnx"


def test_what_stays_in_floats_is_counted(tmp_path: Path) -> None:
    images = torch.randn(64, 3, 4, 4)
    source = _written(Summed(nn.Linear(48, 48)), 4, tmp_path)
    left = quantise(source, tmp_path / "int8.onnx", images.split(16))
    assert left == {"Einsum": 1}
    assert counted(left) == "1 Einsum"
    exact, rounded = OnnxModel(source)(images), OnnxModel(tmp_path / "int8.onnx")(images)
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


def test_a_network_without_anything_to_quantise_is_refused(tmp_path: Path) -> None:
    source = _written(Summed(nn.Identity()), 4, tmp_path)
    with pytest.raises(RunError, match=r"expected a Conv, Gemm or MatMul .* none among 1 Einsum"):
        quantise(source, tmp_path / "int8.onnx", [torch.randn(4, 3, 4, 4)])


def test_images_that_cannot_be_read_stay_an_input_error(tmp_path: Path) -> None:
    def unreadable() -> Iterator[Tensor]:
        yield torch.randn(4, 3, 4, 4)
        raise InputError("data.root: expected an image, cannot read x.png")

    source = _written(Summed(nn.Linear(48, 48)), 4, tmp_path)
    with pytest.raises(InputError, match=r"cannot read x\.png"):
        quantise(source, tmp_path / "int8.onnx", unreadable())


def test_what_onnxruntime_makes_of_no_images_is_one_line(tmp_path: Path) -> None:
    source = _written(Summed(nn.Linear(48, 48)), 4, tmp_path)
    with pytest.raises(RunError, match=r"^int8: ONNX Runtime cannot quantise this model: No data is collected"):
        quantise(source, tmp_path / "int8.onnx", [])


def _separable() -> nn.Module:
    """As in MobileNets: depthwise and pointwise convolutions, with BatchNorm and an activation of two operators."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.SiLU(),
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_model(ModelOptions(name="mlp", hidden=[32, 16]), 10, 3, 16),
        lambda: build_model(ModelOptions(name="resnet20", width=4, activation="gelu"), 10),
        _separable,
    ],
    ids=["mlp", "resnet20", "separable"],
)
def test_networks_compute_nearly_the_same_in_8_bits(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    images = torch.randn(64, 3, 16, 16)
    model = build()
    recalibrate_batchnorm(model, [images], 1)  # else activations fade from layer to layer
    source = _written(model, 16, tmp_path)
    left = quantise(source, tmp_path / "int8.onnx", images.split(16))
    assert not {"Conv", "Gemm", "MatMul"} & {*left}
    assert left.get("Gelu", 0) == sum(isinstance(module, nn.GELU) for module in model.modules())
    exact, rounded = OnnxModel(source)(images), OnnxModel(tmp_path / "int8.onnx")(images)
    assert (exact - rounded).norm() < 0.4 * (exact - exact.mean(0)).norm()  # untrained, which adds up
