"""What a dependency group's neurons feed, and what is found in the way, on networks small enough to tell by eye."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from helpers.networks import Residual, images, make
from torch import Tensor, nn

from dnr_plugin.errors import InputError
from dnr_plugin.network.calling import tensors
from dnr_plugin.network.dependencies import (
    channel_groups,
    inexact_reason,
    isomorphism_class,
    output_layers,
    uses,
)
from dnr_plugin.network.graph import build_graph

Pair = namedtuple("Pair", "features logits")


def names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def groups(model: nn.Module, x: Any = None) -> dict[str, tp.dependency.Group]:
    graph = build_graph(model, images(1) if x is None else x)
    return {names(model)[group[0].dep.target.module]: group for group in graph.get_all_groups()}


def found_uses(model: nn.Module, group: tp.dependency.Group) -> dict[str, tuple[list[int], list[int]]]:
    return {names(model)[use.module]: (use.channels.tolist(), use.neurons.tolist()) for use in uses(group)}


def test_tracing_restores_the_mode_of_every_module() -> None:
    model = make("plain").train()
    model.bn.eval()
    model.c.eval()
    before = {name: module.training for name, module in model.named_modules()}
    build_graph(model, images(1))
    output_layers(model, images(1))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2
    tp.DependencyGraph().build_dependency(model, images(1))
    assert not any(module.training for module in model.modules())  # what would happen otherwise


def test_tracing_keeps_buffers_gradients_and_random_state() -> None:
    model = make("plain").train()
    model(images()).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    mean = model.bn.running_mean.clone()
    build_graph(model, images(1))
    output_layers(model, images(1))
    assert torch.equal(model.bn.running_mean, mean)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("frozen", ["all", "a"])
def test_frozen_layers_are_seen_and_stay_frozen(frozen: str) -> None:
    expected = {name: found_uses(model, g) for model in [make("plain")] for name, g in groups(model).items()}
    model = make("plain")
    (model if frozen == "all" else model.a).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        found = {name: found_uses(model, group) for name, group in groups(model).items()}
        assert {names(model)[m] for m in output_layers(model, images(1))} == {"fc"}
    assert found == expected
    assert [p.requires_grad for p in model.parameters()] == before


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.conv.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.conv(x)
        raise KeyError("no\nsuch thing")


def test_a_model_that_cannot_be_traced_is_an_input_error() -> None:
    """One line with the reason; modes, flags and hooks are as before."""
    model = Picky().train()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match="Picky fails with KeyError: ") as caught:
        build_graph(model, torch.randn(1, 3, 64, 64))
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())


def test_inputs_may_be_a_sequence_or_a_dict() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(F.relu(self.a(x) + self.b(y)))

    model, x = Two(), torch.randn(2, 3)
    for inputs in ((x, x), [x, x], {"x": x, "y": x}):
        group = next(g for g in groups(model, inputs).values() if len(uses(g)))
        assert found_uses(model, group) == {"fc": ([0, 1, 2, 3], [0, 1, 2, 3])}
        assert {names(model)[m] for m in output_layers(model, inputs)} == {"fc"}


def test_uses_of_a_flatten() -> None:
    """Each of the 8 neurons has 2 x 2 positions, channel-major."""
    model = make("plain")
    found = groups(model)
    assert found_uses(model, found["c"]) == {"fc": (list(range(32)), [k // 4 for k in range(32)])}
    assert found_uses(model, found["a"]) == {"b": (list(range(8)), list(range(8)))}
    assert found_uses(model, found["fc"]) == {}


def test_uses_of_a_concatenation() -> None:
    """d2 reads [stem 6, d1 4]; fc reads [d2 4, stem 6, d1 4]."""
    model = make("concat")
    found = groups(model)
    six, four = list(range(6)), list(range(4))
    assert found_uses(model, found["stem"]) == {"d1": (six, six), "d2": (six, six), "fc": ([4, 5, 6, 7, 8, 9], six)}
    assert found_uses(model, found["d1"]) == {"d2": ([6, 7, 8, 9], four), "fc": ([10, 11, 12, 13], four)}
    assert found_uses(model, found["d2"]) == {"fc": (four, four)}


def test_uses_of_a_residual_stream() -> None:
    """One group for stem, a2 and b2; read by a1, b1 and the classifier."""
    model = make("residual")
    found = groups(model)
    assert len(found) == 4
    stream = next(g for name, g in found.items() if name in ("stem", "a2", "b2"))
    eight = list(range(8))
    assert found_uses(model, stream) == dict.fromkeys(("a1", "b1", "fc"), (eight, eight))
    assert found_uses(model, found["a1"]) == {"a2": (eight, eight)}


@pytest.mark.parametrize(("name", "blocks"), [("a", 3), ("g", 3), ("b", 1)])
def test_uses_and_blocks_of_a_grouped_convolution(name: str, blocks: int) -> None:
    model = make("grouped")
    group = groups(model)[name]
    n = len(group[0].idxs)
    consumer = {"a": "g", "g": "b", "b": "fc"}[name]
    assert found_uses(model, group) == {consumer: (list(range(n)), list(range(n)))}
    assert channel_groups(group) == blocks


def test_uses_of_a_partial_group_are_positions_among_its_own_neurons() -> None:
    model = make("plain")
    graph = build_graph(model, images(1))
    group = graph.get_pruning_group(model.c, tp.prune_conv_out_channels, [6, 2])
    assert found_uses(model, group) == {"fc": ([24, 25, 26, 27, 8, 9, 10, 11], [0, 0, 0, 0, 1, 1, 1, 1])}


def test_a_depthwise_convolution_hands_on_and_uses_nothing() -> None:
    model = make("mobile")
    found = groups(model)
    inner = next(g for name, g in found.items() if name in ("expand", "depthwise"))
    assert found_uses(model, inner) == {"project": (list(range(12)), list(range(12)))}
    assert channel_groups(inner) == 1


class Mixed(nn.Module):
    """Something between two convolutions."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(3, 8, 1), between, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def channels_last_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("between", "reason", "blocks"),
    [
        (nn.ReLU(), None, 1),
        (nn.BatchNorm2d(8), None, 1),
        (nn.MaxPool2d(2), None, 1),
        (nn.GroupNorm(2, 8), "GroupNorm mixes its channels", 2),
        (nn.GroupNorm(1, 8), "GroupNorm mixes its channels", 1),
        (channels_last_norm, "layer_norm mixes its channels", 1),
        (lambda x: x.softmax(1), "softmax mixes its channels", 1),
        (nn.Softmax(1), "softmax mixes its channels", 1),
        (lambda x: F.normalize(x, dim=1), "a norm mixes its channels", 1),
    ],
)
def test_what_makes_removal_inexact(between: Callable[[Tensor], Tensor], reason: str | None, blocks: int) -> None:
    torch.manual_seed(0)
    model = Mixed(between).eval()
    group = groups(model)["a"]
    assert inexact_reason(group) == reason
    assert channel_groups(group) == blocks


def test_a_layer_norm_module_makes_removal_inexact() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    assert inexact_reason(groups(model, torch.randn(2, 3))["0"]) == "LayerNorm mixes its channels"


class Outputs(nn.Module):
    def __init__(self, returned: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.depth = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 1, groups=6)
        self.fc = nn.Linear(6, 2)
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.depth(self.b(F.relu(self.bn(self.a(x))))))
        return self.returned(features, self.fc(features.mean((2, 3))))


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (lambda f, y: y, {"fc"}),
        (lambda f, y: F.log_softmax(y, 1), {"fc"}),
        (lambda f, y: (f, y), {"fc", "b", "depth"}),
        (lambda f, y: Pair(f, y), {"fc", "b", "depth"}),
        (lambda f, y: {"logits": y, "deep": [{"features": f}], "loss": None, "size": 3}, {"fc", "b", "depth"}),
        (lambda f, y: {"logits": y, "argmax": y.argmax(1)}, {"fc"}),
        (lambda f, y: f, {"b", "depth"}),
    ],
)
def test_output_layers(returned: Callable[[Tensor, Tensor], Any], expected: set[str]) -> None:
    """Whatever reaches an output without passing a consumer; a depthwise convolution is none."""
    model = Outputs(returned).train()
    assert {names(model)[module] for module in output_layers(model, images(2))} == expected
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("returned", [lambda f, y: None, lambda f, y: y.tolist(), lambda f, y: y.detach()])
def test_a_model_without_tensor_outputs_is_an_input_error(returned: Callable[[Tensor, Tensor], Any]) -> None:
    model = Outputs(returned)
    with pytest.raises(InputError, match="expected outputs that are tensors, found none from Outputs"):
        output_layers(model, images(1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tensors_are_found_in_order() -> None:
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    assert [t.numel() for t in tensors({"x": [a, None, (b, "text")], "y": Pair(c, 7)})] == [1, 2, 3]


def test_isomorphism_classes_tell_like_from_unlike() -> None:
    torch.manual_seed(0)
    model = Residual()
    found = groups(model)
    stream = next(g for name, g in found.items() if name in ("stem", "a2", "b2"))
    assert isomorphism_class(found["a1"]) == isomorphism_class(found["b1"])
    assert len({isomorphism_class(g) for g in (found["a1"], found["fc"], stream)}) == 3
    again = groups(Residual(width=4))  # the class does not depend on widths
    assert isomorphism_class(again["a1"]) == isomorphism_class(found["a1"])
    assert isomorphism_class(groups(make("plain"))["a"]) != isomorphism_class(groups(make("plain"))["b"])
