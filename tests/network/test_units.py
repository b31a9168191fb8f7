"""Neurons that can only go together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnr_plugin.network.dependencies import units
from dnr_plugin.network.graph import all_groups, build_graph
from dnr_plugin.network.units import joined, ties


class Gate(nn.Module):
    """Maximum of the two halves of a convolution's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).chunk(2, 1)
        return self.b(torch.maximum(first, second)).mean((2, 3))


def groups(model: nn.Module) -> dict[str, Tensor]:
    graph = build_graph(model, torch.randn(2, 3, 8, 8))
    names = {module: name for name, module in model.named_modules()}
    return {names[group[0].dep.target.module]: units(group) for group in all_groups(graph)[0]}


def test_halves_of_a_gate_go_together() -> None:
    assert groups(Gate())["a"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_plain_layer_has_units_of_one_neuron() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    assert groups(model)["0"].tolist() == [0, 1, 2, 3, 4]


def test_offsets_of_blocks_go_together() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 2, 1))
    assert groups(model)["0"].tolist() == [0, 1, 0, 1, 0, 1]


def test_ties_are_asked_for_once_and_anew_once_a_layer_shrank() -> None:
    model = Gate()
    graph = build_graph(model, torch.randn(2, 3, 8, 8))
    prune = graph.get_pruner_of_module(model.a).prune_out_channels
    group = graph.get_pruning_group(model.a, prune, [*range(8)])
    assert ties(group) is ties(group)
    graph.get_pruning_group(model.a, prune, [1, 5]).prune()
    graph = build_graph(model, torch.randn(2, 3, 8, 8))
    group = graph.get_pruning_group(model.a, graph.get_pruner_of_module(model.a).prune_out_channels, [*range(6)])
    assert ties(group).tolist() == [0, 1, 2, 0, 1, 2]


def test_numberings_are_joined_to_their_closure() -> None:
    first, second = torch.tensor([0, 0, 2, 3, 4, 5]), torch.tensor([0, 1, 1, 2, 3, 3])
    assert joined(first, second).tolist() == [0, 0, 0, 3, 4, 4]
    assert joined(second, first).unique(return_inverse=True)[1].tolist() == [0, 0, 0, 1, 2, 2]
