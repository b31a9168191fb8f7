"""What a network costs, against other counters and against sums done by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dnr_plugin.network import cost
from dnr_plugin.network.calling import one_sample
from dnr_plugin.network.cost import count_params, flop_report, latencies, steadied
from dnr_plugin.network.kinds import kind_of

warnings.filterwarnings("ignore", category=FutureWarning)


class Tiny(nn.Module):
    """A convolution, BatchNorm and a linear layer, small enough to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.bn(self.conv(x)).relu(), 4).flatten(1))


class Functional(nn.Module):
    """Holds parameters of its own beside submodules, and multiplies by one outside of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.gate = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.inner(x)).mean((2, 3)) * self.scale
        return x @ self.mix + F.linear(x, self.mix)


class Two(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) + self.b(right)


class Shared(nn.Module):
    """One module under three names, and one parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.left = nn.Sequential(self.first, nn.ReLU())
        self.right = nn.Sequential(self.first, nn.ReLU())
        self.out, self.tied = nn.Linear(4, 2), nn.Linear(4, 2)
        self.tied.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.right(self.left(self.first(x)))
        return self.out(x) + self.tied(x)


@pytest.mark.parametrize(("name", "tolerance"), [("resnet18", 0.005), ("mobilenet_v2", 0.05)])
def test_totals_agree_with_other_counters(name: str, tolerance: float) -> None:
    """torch's flop counter and Torch-Pruning's count nearly the same operations."""
    model = getattr(torchvision.models, name)(num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    report = flop_report(model, x)
    with FlopCounterMode(display=False) as counter:
        model(x)
    macs, params = tp.utils.count_ops_and_params(model, x)
    assert report.flops == pytest.approx(counter.get_total_flops() / 2, rel=tolerance)
    assert report.flops == pytest.approx(macs, rel=tolerance)
    assert report.params == params == sum(p.numel() for p in model.parameters())


def test_counts_of_a_tiny_net_by_hand() -> None:
    """conv 3*2*9*64, BatchNorm 2*3*64 (eval mode, affine), linear 12*5."""
    report = flop_report(Tiny(), torch.randn(1, 2, 8, 8))
    rows = {row.name: row for row in report.layers}
    assert {name: row.flops for name, row in rows.items()} == {"conv": 3 * 2 * 9 * 64, "bn": 2 * 3 * 64, "fc": 60}
    assert {name: row.params for name, row in rows.items()} == {"conv": 57, "bn": 6, "fc": 65}
    assert (rows["conv"].type, rows["conv"].in_channels, rows["conv"].out_channels) == ("Conv2d", 2, 3)
    assert report.flops == 3456 + 384 + 60
    assert report.params == 128


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Tiny(), (2, 8, 8)),
        (Functional(), (3, 8, 8)),
        (Shared(), (4,)),
        (torchvision.models.squeezenet1_1(num_classes=3), (3, 64, 64)),
        (torchvision.models.convnext_tiny(num_classes=3), (3, 32, 32)),
    ],
    ids=["tiny", "functional", "shared", "squeezenet", "convnext"],
)
def test_rows_sum_to_the_totals(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Nothing is counted twice or lost between the rows, whoever owns the parameters and operations."""
    report = flop_report(model, torch.randn(2, *shape))
    assert sum(row.flops for row in report.layers) == report.flops > 0
    assert sum(row.params for row in report.layers) == report.params == sum(p.numel() for p in model.parameters())
    assert len({row.name for row in report.layers}) == len(report.layers)


def test_operations_outside_of_layers_belong_to_the_module_that_runs_them() -> None:
    """The two products with a bare parameter appear in the root's row."""
    report = flop_report(Functional(), torch.randn(1, 3, 8, 8))
    root = next(row for row in report.layers if row.name == "")
    assert (root.flops, root.params) == (2 * 16, 4 + 16)


def test_shared_parameters_are_counted_once() -> None:
    """A module under three names runs three times but has one set of parameters; so has a tied weight."""
    report = flop_report(Shared(), torch.randn(1, 4))
    assert report.params == count_params(Shared()) == 20 + 10 + 2
    assert report.flops == 3 * 16 + 8 + 8
    assert {row.name: row.params for row in report.layers} == {"first": 20, "out": 10, "tied": 2}


def test_batch_size_of_the_example_does_not_matter() -> None:
    """Four images cost, per sample, what one does."""
    model = Functional()
    assert flop_report(model, torch.randn(4, 3, 8, 8)) == flop_report(model, torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("form", [list, tuple, dict])
def test_forms_of_inputs(form: type) -> None:
    """Several inputs come as a list, a tuple or by keyword, in any order."""
    left, right = torch.randn(3, 4), torch.randn(3, 2)
    inputs = {"right": right, "left": left} if form is dict else form([left, right])
    report = flop_report(Two(), inputs)
    assert {row.name: (row.flops, row.params) for row in report.layers} == {"a": (12, 15), "b": (6, 9)}
    assert report.flops == 18
    assert report.uncalled == []


def test_one_sample_keeps_what_is_no_tensor() -> None:
    """Only tensors are cut, also inside nested containers."""
    nested = one_sample({"x": [torch.zeros(3, 2), (torch.zeros(2, 1), "name")], "n": 4})
    assert [t.shape[0] for t in (nested["x"][0], nested["x"][1][0])] == [1, 1]
    assert (nested["x"][1][1], nested["n"]) == ("name", 4)


def test_model_is_left_as_it_was() -> None:
    """In train mode, with frozen BatchNorm among it: modes, statistics, gradients and hooks stay."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4)).train()
    model[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        flop_report(model, torch.randn(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == [True, True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_operators_without_a_count_are_named() -> None:
    """So are modules that the forward pass does not reach."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unused = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            x = F.hardtanh(self.conv(x)) + x
            return F.gelu(F.max_pool2d(x + 1, 2) * 2)

    report = flop_report(Net(), torch.randn(1, 3, 8, 8))
    expected = {"aten::add": 2, "aten::hardtanh": 1, "aten::max_pool2d": 1, "aten::mul": 1, "aten::gelu": 1}
    assert report.unsupported_ops == expected
    assert report.uncalled == ["unused"]
    assert sum(row.params for row in report.layers) == report.params == 84 + 56


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv1d(2, 3, 1), (2, 3)),
        (nn.Linear(4, 5), (4, 5)),
        (nn.BatchNorm1d(6), (6, 6)),
        (nn.GroupNorm(2, 4), (4, 4)),
        (nn.MultiheadAttention(8, 2), (8, 8)),
        (nn.LayerNorm([3, 7]), (7, 7)),
        (nn.ReLU(), (0, 0)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_channels(module: nn.Module, expected: tuple[int, int]) -> None:
    """Each kind of layer tells its inputs and outputs."""
    assert kind_of(module).channels == expected


def test_rounds_are_scaled_to_the_median_round() -> None:
    """So that a round that is slow for all calls does not count for more."""
    assert steadied([[1.0, 2.0, 3.0], [1.0, 2.0, 9.0]]) == [[2.0, 2.0, 1.0], [2.0, 2.0, 3.0]]


def test_latencies_are_taken_in_turn() -> None:
    """Warm-up and measurement alternate between the models; modes come back, gradients are off."""
    calls: list[tuple[str, bool, bool]] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.fc, self.name = nn.Linear(2, 2), name

        def forward(self, x: Tensor) -> Tensor:
            calls.append((self.name, self.training, torch.is_grad_enabled()))
            return self.fc(x)

    first, second = Named("a").train(), Named("b").eval()
    times = latencies([first, second], torch.randn(2, 2), seconds=0.0, warmup=2)
    assert [name for name, _, _ in calls] == ["a", "b"] * 7
    assert not any(training or grads for _, training, grads in calls)
    assert len(times) == 2
    assert all(seconds > 0 for seconds in times)
    assert (first.training, first.fc.training, second.training) == (True, True, False)


def test_latencies_are_medians_and_restore_modes_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow round does not count; a model that fails leaves the others in their mode."""
    # one reading for the end, then before each round one for the deadline, one for its start and one for its stop
    ticks = iter([0.0] + [tick for length in (1.0, 3.0, 2.0, 1.0, 9.0) for tick in (0.0, 0.0, length)] + [0.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    assert latencies([nn.Linear(1, 1)], torch.ones(1, 1), seconds=-1.0, warmup=0) == [2.0]
    monkeypatch.undo()

    broken = nn.Linear(3, 3)
    model = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError):
        latencies([model, broken], torch.ones(1, 2), seconds=0.0)
    assert model.training


def test_a_larger_model_takes_longer() -> None:
    """Loosely: a hundredfold matrix product is slower."""
    small, large = nn.Linear(512, 8), nn.Sequential(nn.Linear(512, 4096), nn.Linear(4096, 512))
    before, after = latencies([small, large], torch.randn(16, 512), seconds=0.2)
    assert after > before


def test_modules_that_only_look_like_layers_have_no_channels() -> None:
    """A ResNet often keeps its running ``self.in_channels``."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_channels = 64
            self.scale = nn.Parameter(torch.ones(3, 1, 1))
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x * self.scale)

    model = Backbone()
    assert kind_of(model).channels == (0, 0)
    rows = {layer.name: layer for layer in flop_report(model, torch.randn(1, 3, 2, 2)).layers}
    assert (rows[""].params, rows["conv"].in_channels, rows["conv"].out_channels) == (3, 3, 4)
