"""Patches are what a kernel covers, at every position, whatever the padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_plugin.network.kinds import consumer, kind_of

CONVOLUTIONS: dict[str, Any] = {
    "plain": (nn.Conv2d, {"kernel_size": 3}),
    "zeros": (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    "stride": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0)}),
    "dilation": (nn.Conv2d, {"kernel_size": (2, 3), "dilation": (3, 2), "padding": (2, 3)}),
    "both": (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "stride": 2, "padding": 2}),
    "reflect": (nn.Conv2d, {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"}),
    "circular": (nn.Conv2d, {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "circular", "stride": 2}),
    "replicate": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"}),
    "same": (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}),
    "same, circular": (nn.Conv2d, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    "valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid", "stride": 2}),
    "pointwise": (nn.Conv2d, {"kernel_size": 1, "stride": 2}),
    "grouped": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 2}),
    "1d": (nn.Conv1d, {"kernel_size": 4, "stride": 2, "padding": 3, "dilation": 2}),
    "1d, same": (nn.Conv1d, {"kernel_size": 4, "padding": "same"}),
    "3d": (nn.Conv3d, {"kernel_size": (2, 3, 1), "stride": (1, 2, 1), "padding": (0, 1, 0)}),
    "3d, circular": (nn.Conv3d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
}


def example(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    kind, options = CONVOLUTIONS[name]
    module = kind(4, 6, **options)
    sizes = {nn.Conv1d: (13,), nn.Conv2d: (9, 11), nn.Conv3d: (4, 6, 5)}[kind]
    return module, torch.randn(3, 4, *sizes)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weights_times_patches_are_the_outputs(name: str) -> None:
    """At all positions in an order of its own, for each group of channels."""
    module, a = example(name)
    expected = module(a)
    assert kind_of(module).output_size(a) == list(expected.shape[2:])
    where = torch.randperm(math.prod(expected.shape[2:]), generator=torch.Generator().manual_seed(1))
    found = consumer(module).rows(a, where)
    assert found.shape == (3 * len(where), 4 * consumer(module).taps)
    products = [
        x @ w.T
        for x, w in zip(found.chunk(module.groups, 1), module.weight.flatten(1).chunk(module.groups), strict=True)
    ]
    rows = expected.flatten(2)[:, :, where].transpose(1, 2).flatten(0, 1)  # the places of one sample together
    torch.testing.assert_close(torch.cat(products, 1) + module.bias, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "zeros", "stride", "dilation", "both", "pointwise"])
def test_patches_are_those_of_unfold(name: str) -> None:
    module, a = example(name)
    unfolded = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)
    found = consumer(module).rows(a, torch.arange(unfolded.shape[2]))
    assert torch.equal(found, unfolded.transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("name", ["reflect", "circular", "replicate", "same", "1d", "3d"])
def test_patches_are_those_of_a_loop(name: str) -> None:
    """Value by value."""
    module, a = example(name)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(a, module._reversed_padding_repeated_twice, mode)
    sizes = kind_of(module).output_size(a)
    place = math.prod(sizes) * 2 // 3
    index = torch.tensor([place]) if len(sizes) == 1 else torch.stack(torch.unravel_index(torch.tensor(place), sizes))
    expected = []
    for sample in range(len(a)):
        for channel in range(4):
            for tap in range(consumer(module).taps):
                at = torch.stack(torch.unravel_index(torch.tensor(tap), module.kernel_size)).flatten()
                there = index * torch.tensor(module.stride) + at * torch.tensor(module.dilation)
                expected.append(padded[(sample, channel, *there.tolist())])
    assert torch.equal(consumer(module).rows(a, torch.tensor([place])), torch.stack(expected).view(3, -1))


@pytest.mark.parametrize(
    ("module", "taps_of"), [(nn.Conv1d(2, 2, 5), 5), (nn.Conv3d(2, 2, (1, 2, 3)), 6), (nn.Linear(2, 2), 1)], ids=str
)
def test_taps(module: nn.Module, taps_of: int) -> None:
    assert consumer(module).taps == taps_of


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(4, 2, 3), (2, 4, 5, 6), (2, 4, 30)),
        (nn.Conv2d(4, 2, 3), (4, 5, 6), (1, 4, 30)),
        (nn.Linear(4, 2), (3, 4), (3, 4, 1)),
        (nn.Linear(4, 2), (4,), (1, 4, 1)),
        (nn.Linear(4, 2), (3, 5, 4), (3, 4, 5)),
        (nn.MultiheadAttention(4, 2), (5, 3, 4), (3, 4, 5)),
    ],
    ids=str,
)
def test_channels_come_second(module: nn.Module, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert consumer(module).by_channel(torch.randn(shape)).shape == expected
