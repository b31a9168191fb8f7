"""Runtimes run the network that they are given, refuse what they cannot run, and say what is missing."""

from __future__ import annotations

import importlib
import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError, RunError
from dnr_plugin.network import onnx_runtime
from dnr_plugin.network.calling import call_as_it_is, eval_outputs
from dnr_plugin.network.cost import latencies
from dnr_plugin.network.runtimes import RUNTIMES, check_runtime, runtime_of

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small(width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(36 * width, 5)
    )


class Two(nn.Module):
    """Takes two inputs, which it treats unlike, and gives two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(a).relu(), self.second(b) - self.first(a)


@pytest.fixture
def onnx() -> None:
    """Skips where ONNX Runtime is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


@pytest.fixture
def inductor_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are taken and run as they are: inductor takes seconds for the first of them."""
    dynamo = importlib.import_module("torch._dynamo")
    monkeypatch.setattr(dynamo, "lookup_backend", lambda name: lambda graph, given: graph.forward)


def same_outputs(model: nn.Module, inputs: Any, name: str) -> None:
    runtime = RUNTIMES[name]
    prepared = runtime.prepared(model, runtime.inputs(inputs))
    assert model.training
    with torch.no_grad():
        found = call_as_it_is(prepared, inputs)
    expected = eval_outputs(model, inputs)
    found = [found] if isinstance(found, Tensor) else [*found]
    assert len(found) == len(expected)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert len(latencies([prepared, prepared], inputs, seconds=0.0, warmup=1)) == 2
    assert model.training


INPUTS = {"tensor": X, "sequence": (X[:, 0, 0, :4], X[:, 1, 0, :4]), "dict": {"b": X[:, 1, 0, :4], "a": X[:, 0, 0, :4]}}


@pytest.mark.usefixtures("onnx")
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_onnx_runtime_computes_the_same(inputs: Any) -> None:
    same_outputs(small() if isinstance(inputs, Tensor) else Two(), inputs, "onnxruntime")


@pytest.mark.usefixtures("inductor_skipped")
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_compiled_networks_compute_the_same(inputs: Any) -> None:
    same_outputs(small() if isinstance(inputs, Tensor) else Two(), inputs, "compiled")


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    check_runtime("compiled")
    same_outputs(small(), X, "compiled")


@pytest.mark.usefixtures("inductor_skipped")
def test_every_network_is_compiled() -> None:
    """torch compiles few networks that share their code, and then runs further ones as they are, without a word."""
    kept = [RUNTIMES["compiled"].prepared(small(width), X) for width in range(1, 11)]
    assert [prepared.graphs for prepared in kept] == [1] * 10
    latencies([kept[0], kept[-1]], X, seconds=0.0)
    assert [prepared.graphs for prepared in kept] == [1] * 10  # and none anew


class Broken(nn.Module):
    """Is compiled in two parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.usefixtures("inductor_skipped")
@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch compiles no more than eight networks with a break; the ninth is an error",
)
def test_every_part_of_a_network_is_compiled() -> None:
    assert [RUNTIMES["compiled"].prepared(Broken(width), X).graphs for width in range(1, 11)] == [2] * 10


@pytest.mark.usefixtures("inductor_skipped")
def test_what_is_not_compiled_is_told() -> None:
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RunError, match=r"^torch\.compile compiled nothing of this model"),
    ):
        RUNTIMES["compiled"].prepared(small(), X)


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str) -> Any:
        def compiles(graph: Any, given: Any) -> Any:
            raise ValueError("no such thing\nand more")

        return compiles

    monkeypatch.setattr(importlib.import_module("torch._dynamo"), "lookup_backend", failing)
    with pytest.raises(RunError, match=r"^torch\.compile cannot compile this model: no such thing$"):
        RUNTIMES["compiled"].prepared(small(), X)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@pytest.mark.usefixtures("onnx")
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Branching(), r"^ONNX cannot express this model: "),
        (Drawing(), r"^in ONNX Runtime this model computes something else: outputs differ by \d+%$"),
    ],
)
def test_what_onnx_runtime_does_not_run_is_one_line(model: nn.Module, expected: str) -> None:
    with pytest.raises(RunError, match=expected) as error:
        RUNTIMES["onnxruntime"].prepared(model, X)
    assert "\n" not in str(error.value)


def normed(norm: nn.Module) -> nn.Module:
    """With statistics and scales of some kind."""
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5 if name == "running_var" else -1.0, 2.0)
    return nn.Sequential(norm, nn.ReLU())


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 9, 9)),
    (nn.Conv2d(4, 4, (4, 3), padding="same", groups=4), (2, 4, 9, 9)),
    (nn.Conv1d(4, 6, 3, padding="valid", bias=False), (2, 4, 9)),
    (nn.Conv3d(2, 3, 2, dilation=2, padding=(1, 2, 0)), (1, 2, 6, 6, 6)),
    (nn.Linear(4, 3), (5, 4)),
    (nn.Linear(4, 3, bias=False), (5, 4)),
    (nn.Linear(4, 3), (5, 7, 4)),
    (nn.Linear(4, 3, bias=False), (5, 7, 4)),
    (nn.GroupNorm(2, 6), (2, 6, 5, 5)),
    (nn.GroupNorm(3, 6, affine=False), (2, 6, 5, 5)),
    (nn.LayerNorm(6), (2, 3, 6)),
    (nn.LayerNorm(6, elementwise_affine=False), (2, 3, 6)),
    (normed(nn.BatchNorm2d(8)), (2, 8, 4, 4)),
    (normed(nn.BatchNorm1d(8, affine=False)), (2, 8, 4)),
    (normed(nn.InstanceNorm2d(8, affine=True)), (2, 8, 4, 4)),
    (normed(nn.InstanceNorm2d(8, track_running_stats=True)), (2, 8, 4, 4)),
]


@pytest.mark.usefixtures("onnx")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("layer", "sizes"), LAYERS, ids=lambda value: type(value).__name__)
def test_single_layers_compute_the_same(layer: nn.Module, sizes: tuple[int, ...]) -> None:
    x = torch.randn(sizes)
    with torch.no_grad():
        found, expected = RUNTIMES["onnxruntime"].layer(layer.eval(), sizes)(x), layer(x)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.usefixtures("onnx")
def test_the_profiler_times_a_layer_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its operators, but for what converts to blocks of channels and back; nothing takes no time."""
    runtime, sizes = RUNTIMES["onnxruntime"], (2, 16, 8, 8)
    layer = runtime.layer(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()).eval(), sizes)
    for _ in range(3):
        layer(torch.randn(sizes))
    named = [("session_run", 900), ("a_kernel_time", 20), ("b_kernel_time", 3)]
    events = [
        {"name": name, "dur": taken + call, "args": {"op_name": operator}}
        for call in range(3)
        for (name, taken), operator in zip(named, ("", "ReorderInput" if call == 2 else "Conv", "Relu"), strict=True)
    ]
    events[-1]["dur"] = 0
    monkeypatch.setattr(onnx_runtime, "read_json", lambda file: events)
    assert runtime.seconds(layer, [9.0] * 3) == pytest.approx([23e-6, 25e-6, 0.5e-6])


@pytest.mark.usefixtures("onnx")
def test_what_is_profiled_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runtime = RUNTIMES["onnxruntime"]
    layer = runtime.layer(nn.Linear(64, 64).eval(), (4, 64))
    for _ in range(3):
        layer(torch.randn(4, 64))
    assert all(0.0 < seconds < 1.0 for seconds in runtime.seconds(layer, [9.0] * 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def only_others(name: str) -> Any:
        if name == missing:
            raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", only_others)
    with pytest.raises(InputError) as error:
        check_runtime("onnxruntime", "prune.runtime")
    assert str(error.value) == (
        f"prune.runtime: expected a runtime that can be used here, found onnxruntime and no {missing}: "
        'pip install "dnr_plugin[export]"'
    )


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "c++42")
    with pytest.raises(InputError, match=r"^runtime: .* found compiled and no C\+\+ compiler: .* looks for c\+\+42"):
        check_runtime("compiled")
    check_runtime("eager")


def test_an_unknown_runtime_is_named() -> None:
    with pytest.raises(ValueError, match="runtime: expected one of eager, compiled, onnxruntime, found 'onnx-runtime'"):
        runtime_of("onnx-runtime")
