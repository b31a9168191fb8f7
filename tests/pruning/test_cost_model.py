"""Predicted costs against those of networks that were really pruned."""

from __future__ import annotations

import random

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dnr_plugin.network.cost import count_params, flop_report
from dnr_plugin.network.dependencies import channel_groups, units
from dnr_plugin.network.graph import build_graph
from dnr_plugin.pruning.cost_model import CostModel, effect_per_unit
from dnr_plugin.pruning.removal import prune_neurons


def _conv(first: int, second: int, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(first, second, 3, padding=1, **options), nn.BatchNorm2d(second), nn.ReLU())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = _conv(3, 12), _conv(12, 10), _conv(10, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.b(self.a(x))).mean((2, 3)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _conv(3, 8), _conv(3, 6), _conv(14, 9)
        self.fc = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))


def _bottleneck() -> nn.Module:
    block = torchvision.models.mobilenetv2.InvertedResidual(8, 8, 1, 3)
    return nn.Sequential(_conv(3, 8), block, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 5))


class Columns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(3).permute(2, 0, 1)


class Last(nn.Module):
    """What comes out of a recurrent layer at the last step, through a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 5)

    def forward(self, outputs: tuple[Tensor, object]) -> Tensor:
        return self.fc(outputs[0][-1])


NETS = {
    "plain": lambda: nn.Sequential(_conv(3, 8), _conv(8, 12), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(12, 5)),
    "residual": Residual,
    "grouped": lambda: nn.Sequential(
        _conv(3, 8), _conv(8, 12, groups=4), _conv(12, 6), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(6, 5)
    ),
    "depthwise": _bottleneck,
    "concat": Concat,
    "flatten": lambda: nn.Sequential(_conv(3, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 7), nn.Linear(7, 5)),
    "group norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5)
    ),
    "transposed": lambda: nn.Sequential(_conv(3, 6), nn.ConvTranspose2d(6, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    "recurrent": lambda: nn.Sequential(
        _conv(3, 8),
        nn.AdaptiveAvgPool2d((8, 1)),
        Columns(),
        nn.LSTM(8, 6, 2, bidirectional=True, proj_size=3),
        Last(6),
    ),
    "adaptive pool": lambda: nn.Sequential(_conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
}


def _effects(model: nn.Module, x: Tensor, draw: random.Random) -> tuple[CostModel, dict[str, list[int]]]:
    """A cost model after random removals, in whole channel groups, from all hidden groups; and the removals."""
    names = {module: name for name, module in model.named_modules()}
    cost = CostModel(model, flop_report(model, x))
    removals: dict[str, list[int]] = {}
    groups = list(build_graph(model, x).get_all_groups())
    last = list(model.modules())[-1]  # the outputs of every net above
    for group in groups:
        if any(dep.target.module is last and len(group) == 1 for dep, _ in group) or group[0].dep.target.module is last:
            continue
        blocks, size = channel_groups(group), len(group[0].idxs)
        offsets = draw.sample(range(size // blocks), draw.randint(1, size // blocks - 1))
        gone = [block * (size // blocks) + offset for block in range(blocks) for offset in offsets]
        effect = effect_per_unit(group, names, units(group), range(size // blocks))
        for _ in range(len(offsets)):  # in portions, as the planner does
            cost.remove(effect)
        removals[names[group[0].dep.target.module]] = gone
    return cost, removals


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETS)
def test_predictions_equal_the_pruned_network(name: str, seed: int) -> None:
    """Parameters always; FLOPs but for adaptive pooling, which is held constant."""
    torch.manual_seed(seed)
    model, x = NETS[name](), torch.randn(1, 3, 8, 8)
    cost, removals = _effects(model, x, random.Random(seed))
    assert removals
    before = count_params(model)
    prune_neurons(model, x, removals)
    report = flop_report(model, x)
    assert count_params(model) < before
    assert cost.params == pytest.approx(count_params(model), abs=1e-6)
    constant = sum(len(gone) for gone in removals.values()) * 64 if name in ("adaptive pool", "recurrent") else 0
    assert cost.flops - constant == pytest.approx(report.flops, abs=1e-5)


def test_nothing_removed_is_the_report() -> None:
    """The starting point is the measured total, also of operations the model does not predict."""
    model, x = torchvision.models.resnet18(num_classes=10), torch.randn(1, 3, 32, 32)
    report = flop_report(model, x)
    cost = CostModel(model, report)
    assert (cost.flops, cost.params) == (report.flops, report.params)


def test_bare_parameters_shrink_with_the_group() -> None:
    """A per-channel scale outside of every layer is counted along."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
            self.scale = nn.Parameter(torch.randn(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.conv(x) * self.scale).relu().mean((2, 3)))

    model, x = Scaled(), torch.randn(1, 3, 8, 8)
    names = {module: name for name, module in model.named_modules()}
    group = next(group for group in build_graph(model, x).get_all_groups() if group[0].dep.target.module is model.conv)
    cost = CostModel(model, flop_report(model, x))
    effect = effect_per_unit(group, names, units(group), range(len(group[0].idxs)))
    cost.remove({key: 3 * count for key, count in effect.items()})
    prune_neurons(model, x, {"conv": [0, 4, 5]})
    assert model.scale.numel() == 5
    assert cost.params == pytest.approx(count_params(model))


@pytest.mark.parametrize("name", NETS)
def test_what_would_be_saved_is_what_a_removal_takes(name: str) -> None:
    """And asking takes nothing."""
    torch.manual_seed(0)
    model, x = NETS[name](), torch.randn(1, 3, 8, 8)
    report, graph = flop_report(model, x), build_graph(model, x)
    names, cost = {module: name for name, module in model.named_modules()}, CostModel(model, report)
    for group in list(graph.get_all_groups())[:2]:
        effect = effect_per_unit(group, names, units(group), range(int(units(group).max()) + 1))
        before = cost.flops, cost.params
        saved = cost.saved(effect)
        assert (cost.flops, cost.params) == before
        assert cost.saved(effect) == saved
        cost.remove(effect)
        assert (before[0] - cost.flops, before[1] - cost.params) == pytest.approx(saved)
