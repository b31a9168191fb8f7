"""Groups are those of Torch-Pruning, found quicker; what has no end is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

from dnr_plugin.network.calling import call
from dnr_plugin.network.graph import all_groups, build_graph

X = torch.randn(2, 3, 64, 64)


class Mixed(nn.Module):
    """Split, concatenation, a grouped convolution, a sum and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 8, 1, groups=2)
        self.d, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, v = nn.functional.adaptive_avg_pool2d(self.a(x), 4).chunk(2, 1)
        y = self.c(torch.cat([self.b(u), v], 1))
        result: Tensor = self.fc((y + self.d(y)).flatten(1))
        return result


def content(groups: list[tp.dependency.Group]) -> list[list[tuple[Any, ...]]]:
    return [
        [(str(item.dep), [*item.idxs], [*item.root_idxs]) for item in group.items]
        for group in groups
    ]  # fmt: skip


MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "densenet121": lambda: torchvision.models.densenet121(num_classes=4),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=4),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=4),
    "mixed": Mixed,
}


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_those_of_torch_pruning(name: str) -> None:
    model = MODELS[name]().eval()
    ours, theirs = build_graph(model, X), tp.DependencyGraph().build_dependency(model, X, forward_fn=call)
    groups, failed = all_groups(ours)
    assert not failed
    expected = [*theirs.get_all_groups()]
    assert content(groups) == content(expected)
    for group in groups[:12]:
        root, some = group[0].dep.target.module, [*range(0, len(group[0].idxs), 3)]
        one, other = (
            graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, some)
            for graph in (ours, theirs)
        )
        assert content([one]) == content([other])


@pytest.mark.parametrize("name", ["densenet121", "squeezenet"])
def test_groups_follow_widths_that_change(name: str) -> None:
    """A graph that has shrunk something gives the groups that one gives that is built anew."""
    model = MODELS[name]().eval()
    graph = build_graph(model, X)
    for group in all_groups(graph)[0][:3]:
        root = group[0].dep.target.module
        graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, [0, 2]).prune()
    assert len(model(X)) == 2
    assert content(all_groups(graph)[0]) == content(all_groups(build_graph(model, X))[0])


def test_an_operation_that_cannot_be_followed_costs_the_groups_that_pass_it_alone() -> None:
    """ShuffleNet's shuffle is a division by zero in Torch-Pruning; the inner layers of its blocks do not pass it."""
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=4).eval()
    groups, failed = all_groups(build_graph(model, X))
    names = {module: name for name, module in model.named_modules()}
    prunable = {names.get(dep.target.module) for group in groups for dep, _ in group}
    assert {f"stage3.{k}.branch2.0" for k in range(8)} <= prunable
    assert {names[root] for root, _ in failed} >= {f"stage3.{k}.branch2.5" for k in range(1, 8)}
    assert all(reason.startswith("Torch-Pruning ") for _, reason in failed)


class Doubled(nn.Module):
    """Every channel beside every other, again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.adaptive_avg_pool2d(self.b(self.a(x).relu()), 4).flatten(2)
        result: Tensor = self.fc((y @ (y.transpose(1, 2) @ y)).flatten(1))
        return result


def test_a_root_whose_group_has_no_end_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Doubled().eval()
    monkeypatch.setattr("dnr_plugin.network.graph._MEMBERS", 2)
    first = all_groups(build_graph(model, X))[1]
    assert {reason for _, reason in first} == {"Torch-Pruning multiplies its channels without end"}
    monkeypatch.undo()
    assert all_groups(build_graph(model, X))[1] == first
