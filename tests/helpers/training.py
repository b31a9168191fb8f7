"""Small networks that train under `DyingNeuronDynamics`, step by step."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_plugin.dynamics.check import Check
from dnr_plugin.dynamics.dynamics import DyingNeuronDynamics
from dnr_plugin.dynamics.timetable import Timetable
from dnr_plugin.models.build import build_model
from dnr_plugin.network.cost import flop_report
from dnr_plugin.pruning.groups import prunable_layers
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.pruning.targets import TARGETS, baseline
from dnr_plugin.recipe.sections import ModelOptions
from dnr_plugin.scoring.importance import DyingNeuronImportance
from helpers.networks import images, make

BATCH = 16


def watching(model: nn.Module, when: Timetable, size: int = 8, **options: Any) -> DyingNeuronDynamics:
    settings: dict[str, Any] = {"min_samples": BATCH, "importance": DyingNeuronImportance(share=1.0), **options}
    return DyingNeuronDynamics(model, images(1, size=size), when=when, **settings)


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def batch(step: int, size: int = 8, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(BATCH, 3, size, size, generator=generator)
    return x, torch.randint(0, 5, (BATCH,), generator=generator)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, size: int = 8) -> None:
    x, y = batch(step, size)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def run(
    model: nn.Module, dynamics: DyingNeuronDynamics, optimizer: torch.optim.Optimizer, steps: range, size: int = 8
) -> list[Check]:
    model.train()
    found = []
    for step in steps:
        learn(model, optimizer, step, size)
        check = dynamics.step()
        if check is not None:
            found.append(check)
    return found


def kill(bn: nn.BatchNorm2d, channels: list[int]) -> None:
    with torch.no_grad():
        bn.weight[channels], bn.bias[channels] = 0.0, -10.0


def wake(bn: nn.BatchNorm2d, channels: list[int]) -> None:
    with torch.no_grad():
        bn.weight[channels], bn.bias[channels] = 1.0, 1.0


def lively(model: nn.Module) -> nn.Module:
    """Nothing dies of itself."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(1.0)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.fill_(0.5)
    return model


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def evaluated(model: nn.Module, size: int = 8) -> Tensor:
    """Outputs in eval mode; the mode is restored."""
    model.eval()
    with torch.no_grad():
        out: Tensor = model(images(8, seed=77, size=size))
    model.train()
    return out


def row(check: Check, layer: str) -> Any:
    (found,) = [row for row in check.layers if row.layer == layer]
    return found


def widths(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


def everything_dead() -> nn.Module:
    torch.manual_seed(0)
    model = build_model(ModelOptions(name="resnet18", width=4), 5, 3, 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            kill(module, list(range(module.num_features)))
    return model


def one_step(model: nn.Module, example: Tensor, kind: str, limits: Limits) -> float:
    """The most that a single removal step changes a target's measure."""
    dense = baseline(model, example)
    found_groups = prunable_layers(model, example, limits, {})
    layers, neurons = found_groups.layers, found_groups.neurons
    most = 0.0
    for layer, part in ((one, part) for one in layers for part in one.parts):
        trial, gone = copy.deepcopy(model), layer.neurons(part.units[: part.portions[0]])
        prune_neurons(trial, example, {layer.name: gone})
        report = flop_report(trial, example)
        found = TARGETS[kind]().measure(report.flops, report.params, neurons - len(gone), dense)
        most = max(most, abs(found - TARGETS[kind]().measure(dense.report.flops, dense.report.params, neurons, dense)))
    return most


def assert_accounts(found: list[Check]) -> None:
    for check in found:
        assert set(check.removed) <= {r.layer for r in check.layers}
        for r in check.layers:
            assert r.removed == len(check.removed.get(r.layer, ()))
            assert min(r.dead, r.died, r.reactivated, r.candidates, r.nominated, r.restored, r.removed) >= 0
            assert r.died <= r.dead <= r.neurons and r.candidates <= r.neurons - r.removed
    for before, after in pairwise(found):
        for r, s in zip(before.layers, after.layers, strict=True):
            assert r.layer == s.layer
            assert s.neurons == r.neurons - r.removed
            assert s.candidates == r.candidates + s.nominated - s.restored - s.removed, (after.number, s)
            assert s.dead >= s.died and s.reactivated <= r.dead


def pruned_by(model: nn.Module, when: Timetable, steps: int, **options: Any) -> list[Check]:
    optimizer = sgd(model)
    with watching(model, when, optimizer=optimizer, **options) as dynamics:
        return run(model, dynamics, optimizer, range(steps))


def half_dead() -> nn.Module:
    """No BatchNorm, so that two ranks learn what one does on both batches. a1's neuron 3 is dead, and neuron 5 fires
    only on images with a bright first channel, which one rank alone sees."""
    model = lively(make("residual"))
    with torch.no_grad():
        model.a1.weight[[3, 5]], model.a1.bias[3] = 0.0, -10.0
        model.stem.weight[0], model.stem.bias[0] = 0.0, 0.0
        model.stem.weight[0, 0, 1, 1] = 1.0
        model.a1.weight[5, 0, 1, 1], model.a1.bias[5] = 1.0, -8.0
    return model.train()


def of_rank(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step, rank=rank)
    x[:, 0] += 9.0 * rank
    return x, y


RANKED = Timetable(2, until=12)


def ranks_report(dynamics: DyingNeuronDynamics, found: list[Check], model: nn.Module) -> dict[str, Any]:
    return {
        "removed": [dict(check.removed) for check in found],
        "dead": {name: history.dead for name, history in dynamics.histories.items()},
        "histograms": {name: history.histogram.sum() for name, history in dynamics.histories.items()},
        "weights": [p.detach().clone() for p in model.parameters()],
    }
