"""What is planned is removed, what is removed was dead or worth least, and the target is just reached."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch_pruning as tp
import torchvision
from helpers.every_group import HIDDEN, SIZES, Net, X, chain, conv, images, lively, plant
from torch import Tensor, nn

from dnr_plugin.errors import InputError
from dnr_plugin.network.batchnorm import recalibrate_batchnorm
from dnr_plugin.network.calling import output_difference
from dnr_plugin.network.cost import count_params
from dnr_plugin.pruning.dead_neurons import remove_dead_neurons
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.pruning.removal import prune_neurons


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _vgg() -> nn.Module:
    model = torchvision.models.vgg16_bn(num_classes=10)
    model.classifier = nn.Sequential(  # the original one holds 120 M parameters
        nn.Linear(512 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)
    )
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 32),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 64),
    "vgg16_bn": (_vgg, 32),
    "densenet121": (lambda: torchvision.models.densenet121(num_classes=10), 64),
    "resnext50": (lambda: torchvision.models.resnext50_32x4d(num_classes=10), 64),
}


@pytest.mark.parametrize(
    "name",
    ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])],
)
def test_planted_dead_neurons_are_found_and_removed(name: str) -> None:
    """These and no others; the outputs stay, on calibration and on held-out images."""
    build, size = MODELS[name]
    torch.manual_seed(0)
    data, held_out = images(96, size), images(32, size, seed=1)
    model = lively(build(), data)
    planted = plant(model, data[:1], 0.3, seed=4)
    recalibrate_batchnorm(model, data.split(32))
    with torch.no_grad():
        before = model(held_out)
    params = count_params(model)
    report = remove_dead_neurons(model, data[:1], data.split(32), min_samples=96)
    assert report.removed == planted
    assert report.neurons == report.zero == report.dead == sum(map(len, planted.values()))
    assert (report.constant, report.left) == (0, [])
    assert report.max_rel_diff <= 1e-5
    with torch.no_grad():
        _, held = output_difference([before], [model(held_out)])
    print(f"\n{name}: planted {report.neurons} of {report.of}, relative {report.max_rel_diff:.1e}, held out {held:.1e}")
    assert held <= 1e-5
    assert (report.params_before, report.params_after) == (params, count_params(model))
    assert report.params_after < 0.7 * params


def test_small_net_with_every_kind_of_group() -> None:
    """Plain, residual, grouped, depthwise and linear neurons, zero at 30 %."""
    data = images(64)
    model = lively(Net(), data)
    planted = plant(model, X, 0.3, seed=1)
    assert planted.keys() == SIZES.keys()
    report = remove_dead_neurons(model, X, [(batch, None) for batch in data.split(16)], min_samples=64)
    assert report.removed == planted
    assert report.samples == 64
    assert report.max_rel_diff <= 1e-6


def test_ignored_dead_neurons_stay() -> None:
    """Of the layer itself, and of those whose neurons it reads."""
    data = images(64)
    model = lively(Net(), data)
    planted = plant(model, X, 0.3, seed=1)
    report = remove_dead_neurons(model, X, data.split(16), min_samples=64, ignored=["a.*"])
    assert report.removed == {name: gone for name, gone in planted.items() if name not in ("a.0", "b.0")}
    assert report.of == HIDDEN


def _silence(model: nn.Sequential, gone: list[int], bias: float, weight: float = 0.0) -> None:
    lively(model, images(64))
    with torch.no_grad():
        model[1].weight[gone], model[1].bias[gone] = weight, bias


@pytest.mark.parametrize("exact", [True, False])
def test_constants(exact: bool) -> None:
    """Folded in front of a valid convolution; left and named in front of a zero-padded one."""
    model = chain(nn.Conv2d(8, 4, 3, padding=0 if exact else 1), nn.Flatten(), nn.Linear(144 if exact else 256, 5))
    _silence(model, [2, 6], 0.7)
    data = images(64)
    before = model(data).detach()
    report = remove_dead_neurons(model, X, data.split(16), min_samples=64)
    if exact:
        assert report.removed == {"0": [2, 6]}
        assert (report.neurons, report.zero, report.constant, report.left) == (2, 0, 2, [])
        assert output_difference([before], [model(data).detach()])[1] <= 1e-6
    else:
        assert report.removed == {}
        assert [(name, count) for name, count, _ in report.left] == [("0", 2)]
        assert report.left[0][2].startswith("constant")


@pytest.mark.parametrize("act", [nn.LeakyReLU, nn.SiLU])
def test_silent_but_varying_neurons_stay(act: type[nn.Module]) -> None:
    """The negative side of a leaky activation never fires, and yet says a little."""
    model = chain(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 5), act=act)
    _silence(model, [1], -12.0 if act is nn.SiLU else -6.0, weight=0.9)
    before = copy.deepcopy(model.state_dict())
    report = remove_dead_neurons(model, X, images(64).split(16), min_samples=64)
    assert (report.neurons, report.dead) == (0, 1)
    assert [(name, count) for name, count, _ in report.left] == [("0", 1)]
    assert "not constant" in report.left[0][2]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_channels_that_a_normalisation_mixes_stay() -> None:
    """A zero channel takes part in the mean of its GroupNorm group."""
    model = chain(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 5), norm=nn.GroupNorm(2, 8))
    with torch.no_grad():
        model[1].bias.fill_(1.0)
        for channel in (1, 5):
            model[1].weight[channel] = model[1].bias[channel] = 0.0
    report = remove_dead_neurons(model, X, images(64).split(16), min_samples=64)
    assert report.removed == {}
    assert report.left == [("0", 2, "removal is not exact: GroupNorm mixes its channels")]


def test_layer_norm_channels_stay() -> None:
    """The same over all channels, in a network of linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].bias.fill_(1.0)
        model[1].weight[3] = model[1].bias[3] = 0.0
    data = torch.randn(64, 6)
    report = remove_dead_neurons(model, data[:1], data.split(16), min_samples=64)
    assert report.removed == {}
    assert report.left == [("0", 1, "removal is not exact: LayerNorm mixes its channels")]


def test_a_layer_that_is_dead_altogether_keeps_one_channel() -> None:
    """And says so."""
    model = chain(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    _silence(model, list(range(8)), 0.0)
    report = remove_dead_neurons(model, X, images(64).split(16), min_samples=64)
    assert len(report.removed["0"]) == 7
    assert model[0].out_channels == 1
    assert ("0", 1, "the layer keeps one") in report.left


def test_channel_groups_that_are_partly_dead_stay() -> None:
    """A grouped convolution loses the same offset of every group or none."""
    model = chain(nn.Conv2d(8, 4, 3, groups=2), nn.Flatten(), nn.Linear(144, 5))
    _silence(model, [0, 1, 4], 0.0)
    data = images(64)
    before = model(data).detach()
    report = remove_dead_neurons(model, X, data.split(16), min_samples=64)
    assert (report.removed, report.dead) == ({"0": [0, 4]}, 3)
    assert report.left == [("0", 1, "their channel groups are not dead as a whole")]
    assert output_difference([before], [model(data).detach()])[1] <= 1e-6


class Returned(nn.Module):
    """A feature map that is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = conv(3, 8), conv(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        y = self.second(x)
        return {"features": y, "logits": self.fc(y.mean((2, 3)))}


def test_outputs_are_never_pruned() -> None:
    """Dead or not: features that the model returns keep their channels."""
    model = Returned()
    lively(model, images(64))
    with torch.no_grad():
        for block in (model.first, model.second):
            block[1].weight[[0, 1]] = block[1].bias[[0, 1]] = 0.0
    report = remove_dead_neurons(model, X, images(64).split(16), min_samples=64)
    assert report.removed == {"first.0": [0, 1]}
    assert report.of == 8
    plan = plan_removal(model, X, tp.importance.MagnitudeImportance(p=1), "params", 0.8)
    assert set(plan.removals) == {"first.0"}
    assert dict(plan.skipped) == {
        "second.0": "its outputs are the model's outputs", "fc": "its outputs are the model's outputs"
    }  # fmt: skip


def test_everything_else_stays_as_it_was() -> None:
    """Modes, hooks, gradients, frozen parameters, and the optimizer, which trains on."""
    data = images(64)
    model = lively(Net(), data)
    plant(model, X, 0.3, seed=1)
    model.train()
    model.b.eval()
    modes = [module.training for module in model.modules()]
    model.fc.weight.requires_grad_(False)
    seen: list[int] = []
    model.a.register_forward_hook(lambda *_: seen.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.eval()
    model(data[:8]).square().mean().backward()
    model.train()
    model.b.eval()
    optimizer.step()
    gradient = model.wide[0].weight.grad.clone()
    bias = model.fc.bias
    # the step moved nothing that was planted: the gradients of dead neurons are zero
    report = remove_dead_neurons(model, X, data.split(16), min_samples=64, optimizer=optimizer)
    assert report.neurons > 0
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()].count(1) == 1
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.fc.bias is bias
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["fc.weight"]
    kept_out = [k for k in range(32) if k not in report.removed["depthwise.0"]]
    kept_in = [k for k in range(24) if k not in report.removed["grouped.0"]]
    assert torch.equal(model.wide[0].weight.grad, gradient[kept_out][:, kept_in])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    before = model.wide[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.wide[0].weight, before)


def test_refusals() -> None:
    """Too few samples, none at all, values that are not finite, names that fit nothing: nothing is changed."""
    data = images(64)
    model = lively(Net(), data)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"at least 1536 samples.*found 64"):
        remove_dead_neurons(model, X, data.split(16))
    with pytest.raises(InputError, match="at least one batch"):
        remove_dead_neurons(model, X, [])
    with pytest.raises(InputError, match=r"stem\.00.*did you mean 'stem\.0'"):
        remove_dead_neurons(model, X, data.split(16), min_samples=64, ignored=["stem.00"])
    broken = data.clone()
    broken[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        remove_dead_neurons(model, X, broken.split(16), min_samples=64)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Mixing(nn.Module):
    """A channel that dies behind an operation in which it still matters, though no list of layers names that."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 5)
        self.mix = mix
        with torch.no_grad():
            self.norm.bias.fill_(1.0)
            self.norm.weight[2] = self.norm.bias[2] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.mix(self.conv(x).relu())).relu().flatten(1))


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h - h.mean(1, keepdim=True),
        lambda h: h * torch.sigmoid(h.sum(1, keepdim=True)),
        lambda h: nn.functional.group_norm(h, 2),
    ],
    ids=["minus the mean", "gate on the sum", "group_norm"],
)
def test_channels_that_matter_before_they_die_stay(mix: Callable[[Tensor], Tensor]) -> None:
    report = remove_dead_neurons(Mixing(mix).eval(), X, images(64).split(32), min_samples=64)
    assert report.dead == 1
    assert report.removed == {}
    assert report.max_abs_diff == 0.0
    assert [(layer, number) for layer, number, _ in report.left] == [("conv", 1)]


def test_a_harmless_operation_does_not_keep_them() -> None:
    report = remove_dead_neurons(Mixing(torch.tanh).eval(), X, images(64).split(32), min_samples=64)
    assert report.removed == {"conv": [2]}


def test_the_memory_format_is_kept() -> None:
    model = lively(Net(), images(64)).to(memory_format=torch.channels_last)
    prune_neurons(model, X, {"a.0": [0, 3], "hidden": [1]})
    assert model.a[0].weight.shape[0] == 18
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.weight.shape[1] > 1:
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            assert not module.weight.is_contiguous()
