"""How models are called, and what is left of a call."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.network.calling import copied, kept_modes, mapped, output_difference, part_of

Pair = namedtuple("Pair", ["first", "second"])


class Caching(nn.Module):
    """Keeps a grid, and the size that it is for, as detection heads keep their anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.grid, self.size, self.calls = torch.empty(0), None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.size != x.shape[2:]:
            self.grid, self.size = torch.arange(x.shape[2] * x.shape[3]).view(x.shape[2:]) * 1.0, x.shape[2:]
        self.features = self.conv(x)
        return self.features + self.grid


def test_a_cache_comes_back_as_a_whole() -> None:
    model, x = Caching(), torch.randn(2, 3, 4, 4)
    expected = model(x).detach()
    fresh: Any = Caching()
    fresh.load_state_dict(model.state_dict())
    with kept_modes(fresh):
        fresh.eval()
        fresh(x)
    assert fresh.training
    assert (fresh.grid.numel(), fresh.size, fresh.calls) == (0, None, 0)
    assert not hasattr(fresh, "features")
    assert torch.equal(copied(fresh)(x), expected)


def test_numbers_that_change_alone_stay() -> None:
    """What a prune inside does to a layer's sizes is no cache."""
    model = nn.Linear(4, 4)
    with kept_modes(model):
        model.out_features = 3
    assert model.out_features == 3


def test_outputs_of_other_shapes_differ_without_bound() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 3)
    assert output_difference([a], [b]) == output_difference([a], [a, a]) == (math.inf, math.inf)
    assert output_difference([a, a[:0]], [a + 0.5, a[:0]]) == (0.5, 0.5)
    assert output_difference([a[:0]], [a[:0]]) == (0.0, 0.0)


def test_inputs_of_every_form_are_mapped() -> None:
    a = torch.arange(4.0)
    inputs = Pair({"x": a, "flag": True}, [a, (a, None)])
    first = part_of(inputs, slice(1))
    assert isinstance(first, Pair)
    assert first.first["flag"] is True
    assert [t.tolist() for t in (first.first["x"], first.second[0], first.second[1][0])] == [[0.0]] * 3
    assert mapped(Tensor.double, inputs).second[1][0].dtype == torch.float64
