"""Marks: which neurons each input channel of a consumer carries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnr_plugin.network.probe import Mark, carriers, codes, read_marks


@pytest.mark.parametrize("count", [2, 3, 6, 7, 70, 71, 1000])
def test_no_code_holds_another(count: int) -> None:
    table = codes(count)
    assert len(table) == count
    assert table.shape[1] <= 2 * math.log2(count) + 4
    assert (table.sum(1) == table.shape[1] // 2).all()
    held = (~table[:, None] | table[None]).all(2)
    assert torch.equal(held, torch.eye(count, dtype=torch.bool))


class Net(nn.Module):
    """A convolution, something on the way, and what reads it."""

    def __init__(self, way: Any, reader: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.way, self.b = nn.Conv2d(3, 6, 3, padding=1), way, reader or nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.way(self.a(x)))


def carried(model: nn.Module, **more: Any) -> list[int | None] | None:
    """For each channel that b reads the neuron of a that it carries."""
    marks = {"a": Mark(torch.arange(6), torch.arange(6))}
    read = read_marks(model, torch.randn(2, 3, 4, 4), marks, codes(6), **more)
    assert read is not None
    seen = read["b"]
    return None if seen is None else [*carriers(codes(6), seen)]


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (nn.ReLU(), [0, 1, 2, 3, 4, 5]),
        (lambda x: x.flip(1), [5, 4, 3, 2, 1, 0]),
        (lambda x: x.roll(2, 1), [4, 5, 0, 1, 2, 3]),
        (nn.ChannelShuffle(2), [0, 3, 1, 4, 2, 5]),
        (lambda x: x + x.mean(1, keepdim=True), [None] * 6),  # each channel carries several
        (nn.GroupNorm(1, 6), [0, 1, 2, 3, 4, 5]),  # which mixes, and hands on meanwhile
    ],
)
def test_channels_are_followed(way: Any, expected: list[int | None]) -> None:
    assert carried(Net(way)) == expected


def test_positions_of_a_flattened_map_carry_its_channels() -> None:
    model = Net(nn.Flatten(), nn.Linear(96, 2))
    assert carried(model) == [k // 16 for k in range(96)]
    model = Net(lambda x: x.permute(0, 2, 3, 1).flatten(1), nn.Linear(96, 2))
    assert carried(model) == [k % 6 for k in range(96)]


def test_what_mixes_samples_is_said() -> None:
    assert carried(Net(lambda x: x - x.mean(0, keepdim=True))) is None


def test_the_model_stays_as_it_is() -> None:
    model = Net(nn.BatchNorm2d(6)).train()
    calls: list[int] = []
    handle = model.a.register_forward_hook(lambda *_: calls.append(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert carried(model, training=True) == [0, 1, 2, 3, 4, 5]
    assert model.training
    assert not calls
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    handle.remove()


def test_a_model_that_fails_on_marks_tells_nothing() -> None:
    def choosy(x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("not finite")
        return x

    assert (
        read_marks(Net(choosy), torch.randn(2, 3, 4, 4), {"a": Mark(torch.arange(6), torch.arange(6))}, codes(6))
        is None
    )
