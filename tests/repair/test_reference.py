"""What repair is fitted to: layers that compute what their weights say, images in every form that models take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnr_plugin import prune_neurons, repair_network
from dnr_plugin.network.calling import eval_outputs

REMOVED = {"a": [0, 3, 5]}


class Small(nn.Module):
    """Two convolutions and a classifier; subclasses call it in other ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class Views(Small):
    """Two views of each sample, one batch behind the other."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        first, second = self.features(torch.cat([x, y])).chunk(2)
        return self.head(first + second)


class Frames(Small):
    """Frames folded into the batch, [N, T, 3, H, W]."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x.flatten(0, 1)).view(*x.shape[:2], -1).mean(1))


class Named(Small):
    def forward(self, *, image: Tensor) -> Any:
        return {"scores": super().forward(image)}


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pruned(dense: nn.Module, example: Any) -> nn.Module:
    model = copy.deepcopy(dense)
    prune_neurons(model, example, REMOVED)
    return model


def distance(model: nn.Module, dense: nn.Module, inputs: Any) -> float:
    pairs = zip(eval_outputs(model, inputs), eval_outputs(dense, inputs), strict=True)
    return max(float((a - b).square().mean()) for a, b in pairs)


def test_inputs_of_every_form_are_repaired_on() -> None:
    plain, views, named = Small().eval(), Views().eval(), Named().eval()
    many, other = images(64, 3, 8, 8), images(64, 3, 8, 8, seed=1)
    for dense, example, batches in (
        (plain, many[:1], [(many[:32], torch.zeros(32)), (many[32:], torch.zeros(32))]),
        (named, {"image": many[:1]}, [{"image": many, "label": torch.zeros(64)}]),
        (views, (many[:1], other[:1]), [(many, other, torch.zeros(64))]),
    ):
        model = pruned(dense, example)
        inputs = {"image": many} if isinstance(example, dict) else (many, other)[: len(example)]
        inputs = inputs if dense is not plain else many
        before = distance(model, dense, inputs)
        assert before > 1e-4
        repairs = repair_network(model, dense, example, REMOVED, batches)
        assert distance(model, dense, inputs) < before
        fitted = {repair.layer for repair in repairs if repair.damping is not None}
        assert fitted == ({"head"} if dense is views else {"b", "head"}) or "b" in fitted


@pytest.mark.parametrize(("make", "shapes"), [(Frames, [(5, 3, 8, 8)]), (Views, [(3, 8, 8), (3, 8, 8)])])
def test_layers_with_other_numbers_of_images_are_named(make: type[Small], shapes: list[tuple[int, ...]]) -> None:
    dense = make().eval()
    inputs = tuple(images(32, *shape, seed=k) for k, shape in enumerate(shapes))
    example = tuple(a[:2] for a in inputs)
    model = pruned(dense, example)
    repairs = {repair.layer: repair.left for repair in repair_network(model, dense, example, REMOVED, [inputs])}
    assert repairs["a"] == repairs["b"] == "its outputs are not one for each image"
    assert repairs["head"] is None


def test_a_wrapped_model_is_repaired() -> None:
    dense = Small().eval()
    many = images(64, 3, 8, 8)
    model = pruned(dense, many[:1])
    before = distance(model, dense, many)
    repair_network(nn.DataParallel(model), nn.DataParallel(dense), many[:1], REMOVED, many)
    assert distance(model, dense, many) < before


@pytest.mark.parametrize("hooked", ["a", "b", "norm"])
def test_a_layer_that_a_hook_changes_is_left_and_named(hooked: str) -> None:
    """Its weights are not what makes its outputs, so that a fit of them would fit something else."""
    dense = Small().eval()
    many = images(64, 3, 8, 8)
    handle = dense.get_submodule(hooked).register_forward_hook(lambda module, args, output: output * 1.5 + 0.2)
    model = copy.deepcopy(dense)
    layer = {"norm": "a"}.get(hooked, hooked)
    repairs = {repair.layer: repair for repair in repair_network(model, dense, many[:1], {}, many)}
    assert "a hook" in str(repairs[layer].left)
    assert {name for name, repair in repairs.items() if repair.left is not None} == {layer}
    assert distance(model, dense, many) == 0.0
    handle.remove()


def test_too_few_images_are_named() -> None:
    dense = Small().eval()
    nn.init.constant_(dense.norm.bias, 1.0)  # what is removed has a mean, which a fit makes up for in any case
    few = images(40, 3, 8, 8)
    model = pruned(dense, few[:1])
    with pytest.warns(
        UserWarning, match="repair: .* layers .*b.* were fitted at no more places .* more than 40 images"
    ):
        repairs = repair_network(model, dense, few[:1], REMOVED, few, rows=40)
    assert [repair.few for repair in repairs if repair.layer == "b"] == [True]
    model = pruned(dense, few[:1])
    repairs = repair_network(model, dense, few[:1], REMOVED, images(256, 3, 8, 8))
    assert not any(repair.few for repair in repairs)


@pytest.mark.parametrize("seed", range(4))
def test_few_images_do_not_make_others_worse(seed: int) -> None:
    """Eight images for layers of 72 weights an output: whatever is learnt from them must not cost the others much."""
    dense = Small().eval()
    many = images(200, 3, 8, 8, seed=10 + seed)
    model = pruned(dense, many[:1])
    before = distance(model, dense, many[8:])
    repair_network(model, dense, many[:1], REMOVED, many[:8])
    assert distance(model, dense, many[8:]) < before


def test_a_grouped_layer_that_became_depthwise_is_named() -> None:
    """With one channel left in each group it mixes none any more."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(),
        nn.Linear(64, 3),
    ).eval()  # fmt: skip
    many = images(64, 3, 8, 8)
    removals = {"0": [0, 2, 4], "2": [0, 2, 4]}
    model = copy.deepcopy(dense)
    prune_neurons(model, many[:1], removals)
    assert (model[2].in_channels, model[2].out_channels, model[2].groups) == (3, 3, 3)
    before = distance(model, dense, many)
    repairs = {repair.layer: repair for repair in repair_network(model, dense, many[:1], removals, many)}
    assert repairs["2"].left == "it has one channel in each of its groups by now, and mixes none"
    assert repairs["4"].damping is not None
    assert distance(model, dense, many) < before


class Looped(Small):
    """Takes its images one by one at first, as detectors do, and adds what it has computed by then."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Any:
        x = torch.stack([image * 2.0 + 0.1 for image in x])
        y = self.norm(self.a(x)).relu()
        return self.head(self.b(y + self.c(y)).relu().mean((2, 3)))


def test_calls_whose_number_depends_on_the_images_are_not_taken_for_others() -> None:
    dense = Looped().eval()
    many = images(64, 3, 8, 8)
    removals = {"b": [0]}
    model = copy.deepcopy(dense)
    prune_neurons(model, many[:1], removals)
    before = distance(model, dense, many)
    repairs = {repair.layer: repair for repair in repair_network(model, dense, many[:1], removals, many)}
    assert repairs["c"].left == "what it is added to is computed in calls whose number depends on the images"
    assert repairs["head"].damping is not None
    assert distance(model, dense, many) < before
