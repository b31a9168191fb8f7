"""What is asked of layers: patches at every position, whatever the padding; kinds, known and one's own."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_plugin.network import kinds
from dnr_plugin.network.kinds import consumer, is_batchnorm, is_consumer, kind_of, register_layer
from dnr_plugin.network.layer_kind import Consumer
from dnr_plugin.observation.observer import Observer
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.repair.network import repair_network

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


def test_patches_that_lie_in_the_padding_are_zero() -> None:
    """Whole ones too, on each side, where the padding is wider than the kernel."""
    module, a = nn.Conv2d(4, 6, 2, padding=3, dilation=2), torch.randn(2, 4, 3, 4)
    unfolded = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)
    found = consumer(module).rows(a, torch.arange(unfolded.shape[2]))
    assert torch.equal(found, unfolded.transpose(1, 2).flatten(0, 1))
    assert (found.view(2, -1, 16) == 0).all(2).any()


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


class Scaled(nn.Module):
    """A linear layer of one's own: each input has a scale as well."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.scale = nn.Parameter(torch.ones(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale) @ self.weight.T


class ScaledKind(Consumer):
    @property
    def channels(self) -> tuple[int, int]:
        return self.module.inputs, self.module.outputs

    def by_channel(self, a: Tensor) -> Tensor:
        return a.unsqueeze(-1)

    def norms(self) -> Tensor:
        return (self.module.weight * self.module.scale).detach().norm(dim=0).double()


def test_a_layer_type_of_ones_own_is_unknown_until_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    layer = Scaled(4, 3)
    assert not is_consumer(layer) and kind_of(layer).channels == (0, 0)
    assert kind_of(layer).unrepaired == "Scaled is not repaired"
    register_layer(Scaled, ScaledKind)
    observer = Observer(nn.Sequential(layer))
    with observer:
        observer.model(torch.tensor([[1.0, 0.0, -2.0, 3.0]]))
    assert observer.activities["0"].highest.tolist() == [1.0, 0.0, -2.0, 3.0]
    assert consumer(layer).norms().shape == (4,)
    assert type(kind_of(type("Narrow", (Scaled,), {})(4, 3))) is ScaledKind  # with its subclasses


class Standardised(nn.Conv2d):
    """What it computes is not what its weights say."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Activated(nn.BatchNorm2d):
    """A BatchNorm with its ReLU, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_a_subclass_with_a_forward_of_its_own_is_not_the_plain_layer() -> None:
    assert kind_of(Standardised(2, 2, 1)).unrepaired == "Standardised has a forward of its own"
    assert kind_of(nn.Conv2d(2, 2, 1)).unrepaired is None
    assert is_batchnorm(nn.BatchNorm2d(2)) and not is_batchnorm(Activated(2))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), Activated(8), Standardised(8, 8, 3), Activated(8), nn.Conv2d(8, 4, 1)
    ).eval()  # fmt: skip
    x, before = torch.randn(32, 3, 8, 8), copy.deepcopy(model.state_dict())
    expected = model(x)
    rows = repair_network(model, copy.deepcopy(model), x[:1], {}, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    dense = copy.deepcopy(model)
    prune_neurons(model, x[:1], {"0": [0, 1], "2": [3]})
    bare = float((model(x) - expected).norm().detach())
    rows = repair_network(model, dense, x[:1], {"0": [0, 1], "2": [3]}, x)
    assert {row.layer: row.left for row in rows if row.left} == {"2": "Standardised has a forward of its own"}
    assert float((model(x) - expected).norm().detach()) < bare


@pytest.mark.parametrize(
    ("module", "blocks", "channels", "scaling"),
    [
        (nn.Conv2d(6, 9, 3, groups=3), 3, (6, 9), "product"),
        (nn.Conv2d(6, 6, 3, groups=6), 1, (6, 6), "linear"),
        (nn.ConvTranspose2d(6, 6, 3, groups=6), 1, (6, 6), "linear"),
        (nn.Linear(4, 2), 1, (4, 2), "product"),
        (nn.MultiheadAttention(8, 2), 2, (8, 8), "square"),
        (nn.GroupNorm(2, 8), 2, (8, 8), "linear"),
        (nn.LayerNorm((3, 8)), 1, (8, 8), "linear"),
        (nn.BatchNorm1d(5), 1, (5, 5), "linear"),
        (nn.ReLU(), 1, (0, 0), "linear"),
    ],
    ids=str,
)
def test_what_is_asked_of_every_layer(
    module: nn.Module, blocks: int, channels: tuple[int, int], scaling: str
) -> None:  # fmt: skip
    kind = kind_of(module)
    assert (kind.blocks, kind.channels, kind.scaling) == (blocks, channels, scaling)
    assert kind.consumes == is_consumer(module) == (scaling != "linear")
