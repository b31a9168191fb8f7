"""What is one thing before a prune is one thing after it: shared parameters, averages of weights, compiled models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dnr_plugin import (
    DyingNeuronDynamics,
    DyingNeuronImportance,
    Observer,
    Timetable,
    flop_report,
    follow_optimizer,
    plan_removal,
    prune_neurons,
    recalibrate_batchnorm,
    remove_dead_neurons,
    repair_network,
    save_pruned,
    split_attention,
)
from dnr_plugin.errors import InputError
from dnr_plugin.network.graph import all_groups, build_graph, group_of

pytestmark = pytest.mark.filterwarnings(
    r"ignore:.*torch\.(jit|ao)\..* deprecated", r"ignore:torch\.quantize_per_tensor", "ignore:Please use quant_min"
)

X = torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def net(dead: tuple[int, ...] = (1, 4), constant: tuple[int, ...] = (6,)) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    settle(model, dead, constant)
    return model.eval()


@torch.no_grad()
def settle(model: nn.Sequential, dead: tuple[int, ...] = (1, 4), constant: tuple[int, ...] = (6,)) -> None:
    for neurons, value in ((dead, -1.0), (constant, 0.5)):
        model[1].weight[list(neurons)] = 0.0
        model[1].bias[list(neurons)] = value


class Tied(nn.Module):
    """Two convolutions with one weight, beside a pair that shares nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.free = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.free(self.stem(x).relu()).relu()
        out: Tensor = self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))
        return out


def test_layers_that_share_a_parameter_are_left_and_named() -> None:
    model = Tied().eval()
    with torch.no_grad():
        for layer in (model.stem, model.free, model.a):
            layer.bias[:2] = -100.0
    before, parameters = model(X), sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    report = remove_dead_neurons(model, X[:1], [X], min_samples=1, optimizer=optimizer)
    assert report.removed == {"stem": [0, 1]}
    assert {reason for _, reason in report.skipped if "share" in reason} == {"a and b share a parameter"}
    assert model.b.weight is model.a.weight
    assert sum(p.numel() for p in model.parameters()) < parameters
    assert [*optimizer.param_groups[0]["params"]] == [*model.parameters()]
    assert torch.allclose(model(X), before, atol=1e-5)
    with pytest.raises(
        InputError, match="removals: expected neurons that can go from a alone, found that a and b share"
    ):
        prune_neurons(model, X[:1], {"stem": [0], "a": [0]})
    assert model.stem.out_channels == 6


def test_a_pruner_of_torch_pruning_leaves_them_as_well() -> None:
    model = Tied().eval()
    importance = DyingNeuronImportance()
    with importance.observe(model), torch.no_grad():
        model(X)
    with pytest.warns(UserWarning, match="a and b share a parameter"):
        tp.pruner.BasePruner(model, X[:1], importance, pruning_ratio=0.5, ignored_layers=[model.fc]).step()
    assert (model.stem.out_channels, model.a.out_channels, model.free.out_channels) == (4, 8, 8)
    assert model.b.weight is model.a.weight


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_average_of_the_weights_loses_the_same_neurons(wrapped: bool) -> None:
    model = net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)

    for _ in range(3):
        step()
    settle(model)
    settle(average.module)
    model.eval(), average.eval()
    before = average(X)
    assert not torch.allclose(model(X), before, atol=1e-3)
    follower = average if wrapped else average.module
    report = remove_dead_neurons(model, X[:1], [X], min_samples=1, optimizer=optimizer, followers=[follower])
    assert report.removed == {"0": [1, 4, 6]}
    assert report.constant == 1
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    assert torch.allclose(average(X), before, atol=1e-5)
    step()


def test_what_fails_in_a_follower_leaves_all_as_they_were() -> None:
    model, other = net(), nn.Sequential(*[*net()][:7], nn.Linear(8, 5), nn.Linear(5, 5))
    other[3] = nn.Conv2d(12, 8, 3, groups=2)
    states = [copy.deepcopy(m.state_dict()) for m in (model, other)]
    with pytest.raises((InputError, RuntimeError)):
        prune_neurons(model, X[:1], {"0": [0]}, followers=[other])
    for m, state in zip((model, other), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in m.state_dict().items())


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_are_pruned_as_the_model_itself(in_place: bool) -> None:
    plain = net()
    compiled: Any = net()
    if in_place:
        compiled.compile(backend="eager")
    else:
        compiled = torch.compile(compiled, backend="eager")
    with torch.no_grad():
        before = compiled(X)
    plans = []
    for model in (plain, compiled):
        importance = DyingNeuronImportance()
        with importance.observe(model), torch.no_grad():
            model(X)
        plans.append(plan_removal(model, X[:1], importance, "flops", 0.6).removals)
    assert plans[0] == plans[1]
    assert flop_report(compiled, X).flops == flop_report(plain, X).flops
    report = remove_dead_neurons(compiled, X[:1], [X], min_samples=1)
    assert report.removed == {"0": [1, 4, 6]}
    with torch.no_grad():
        assert torch.allclose(compiled(X), before, atol=1e-5)


def quantisation() -> Any:
    return pytest.importorskip("torch.ao.quantization", reason="torch has none any more")


def _scripted(model: nn.Module) -> Any:
    return torch.jit.script(model)


def _traced(model: nn.Module) -> Any:
    return torch.jit.trace(model, X)


def _exported(model: nn.Module) -> Any:
    return torch.export.export(model, (X,)).module()


def _quantised(model: nn.Module) -> Any:
    return quantisation().quantize_dynamic(model, {nn.Linear})


def _quantised_whole(model: nn.Module) -> Any:
    ao = quantisation()
    model = nn.Sequential(ao.QuantStub(), *model, ao.DeQuantStub()).eval()
    model.qconfig = ao.get_default_qconfig(torch.backends.quantized.engine)
    prepared = ao.prepare(model)
    prepared(X)
    return ao.convert(prepared)


def _in_integers(model: Any) -> Any:
    """As bitsandbytes and others keep the weights of what is still an `nn.Linear`."""
    model[7].weight = nn.Parameter(torch.ones(5, 8, dtype=torch.int8), requires_grad=False)
    return model


def _wrapped(model: nn.Module) -> Any:
    return nn.DataParallel(torch.jit.script(model))


FROZEN = [_scripted, _traced, _exported, _quantised, _quantised_whole, _in_integers, _wrapped]


def _dynamics(model: Any) -> None:
    DyingNeuronDynamics(model, X[:1], when=Timetable(check_every=2, warmup=2, until=20))


def _followed(model: Any) -> None:
    with follow_optimizer(None, model):
        pass


def _observe(model: Any) -> None:
    with DyingNeuronImportance().observe(model):
        pass


PUBLIC: dict[str, Callable[[Any], Any]] = {
    "remove_dead_neurons": lambda model: remove_dead_neurons(model, X[:1], [X], min_samples=1),
    "plan_removal": lambda model: plan_removal(model, X[:1], tp.importance.MagnitudeImportance(), "flops", 0.5),
    "prune_neurons": lambda model: prune_neurons(model, X[:1], {"0": [0]}),
    "prune_neurons, a follower": lambda model: prune_neurons(net(), X[:1], {"0": [0]}, followers=[model]),
    "flop_report": lambda model: flop_report(model, X),
    "observe": _observe,
    "Observer": Observer,
    "DyingNeuronDynamics": _dynamics,
    "repair_network": lambda model: repair_network(model, net(), X[:1], {}, X),
    "repair_network, dense": lambda model: repair_network(net(), model, X[:1], {}, X),
    "recalibrate_batchnorm": lambda model: recalibrate_batchnorm(model, [X]),
    "split_attention": lambda model: split_attention(model, X[:1]),
    "follow_optimizer": _followed,
}


@pytest.mark.parametrize("function", PUBLIC)
@pytest.mark.parametrize("freeze", FROZEN, ids=lambda function: function.__name__.strip("_"))
def test_what_cannot_be_changed_is_refused_in_one_line(freeze: Callable[[nn.Module], Any], function: str) -> None:
    model = freeze(net())
    if function == "recalibrate_batchnorm" and freeze in (_quantised, _quantised_whole, _in_integers):
        pytest.skip("what BatchNorm is left in it computes in floats")
    with pytest.raises(InputError) as caught:
        PUBLIC[function](model)
    (problem,) = caught.value.problems
    assert problem.startswith("model: expected ")
    assert "\n" not in problem


@pytest.mark.parametrize("freeze", FROZEN, ids=lambda function: function.__name__.strip("_"))
def test_what_cannot_be_changed_is_not_saved(freeze: Callable[[nn.Module], Any], tmp_path: Any) -> None:
    with pytest.raises(InputError, match=r"^model: expected "):
        save_pruned(freeze(net()), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("freeze", [_scripted, lambda part: torch.jit.trace(part, torch.rand(1, 8, 8, 8))])
def test_flops_of_a_scripted_part_are_refused_in_one_line(freeze: Callable[[nn.Module], Any]) -> None:
    """Nobody can look into it; what needs no FLOPs goes on working."""
    model = net()
    model[4] = freeze(nn.Sequential(nn.ReLU()).eval())
    with pytest.raises(InputError, match=r"^model: expected modules as they were written, found 4, .* made from$"):
        flop_report(model, X)
    report = remove_dead_neurons(model, X[:1], [X], min_samples=1)
    assert report.removed["0"] == [1, 4, 6]


def test_what_will_be_quantised_still_computes_in_floats() -> None:
    """Networks of `torchvision.models.quantization`, and what is trained for quantisation."""
    model = torchvision.models.quantization.resnet18(weights=None, quantize=False)
    plain = flop_report(torchvision.models.resnet18(weights=None), torch.rand(1, 3, 32, 32))
    assert flop_report(model, torch.rand(1, 3, 32, 32)).flops == plain.flops
    model.train().qconfig = quantisation().get_default_qat_qconfig(torch.backends.quantized.engine)
    aware = quantisation().prepare_qat(model)
    assert flop_report(aware, torch.rand(1, 3, 32, 32)).flops == plain.flops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_sixteen_bits_fold_what_32_bits_fold(dtype: torch.dtype | None) -> None:
    """Constant neurons; None: autocast around the call."""
    model, x = net(), X
    if dtype is not None:
        model, x = model.to(dtype), X.to(dtype)
    wide = copy.deepcopy(model).float()(X)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        report = remove_dead_neurons(model, x[:1], [x], min_samples=1)
    assert report.removed["0"] == [1, 4, 6]
    assert not report.left
    change = (copy.deepcopy(model).float()(X) - wide).abs().max() / wide.abs().max()
    assert float(change) < 0.02


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True).eval()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def corrected(model: nn.Module) -> None:
    importance = DyingNeuronImportance()
    with importance.observe(model), torch.no_grad():
        model(X)
    group = group_of(build_graph(model, X[:1]), model.get_submodule("0"), [0, 2])
    assert importance.repair(group) == {}


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (net, lambda model: remove_dead_neurons(model, X[:1], [X], min_samples=1)),
        (net, corrected),
        (net, lambda model: repair_network(model, net(constant=()), X[:1], {}, X)),
        (Attention, lambda model: split_attention(model, X[:1], [X])),
    ],
)
def test_weights_that_change_are_not_in_autocasts_cache(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], Any]
) -> None:
    """Under autocast casts of weights are kept until its context is left."""
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        model(X)
        change(model)
        within = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X), within)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sixteen_bits_see_what_mixes_channels(dtype: torch.dtype) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net()

        def forward(self, x: Tensor) -> Tensor:
            y = self.parts[:3](x)
            out: Tensor = self.parts[3:](y - y.amax(1, keepdim=True))
            return out

    model = Mixed().eval()
    with torch.no_grad():
        model.parts[1].bias[6] = 50.0  # a constant that is the largest everywhere
    model = model.to(dtype)
    report = remove_dead_neurons(model, X[:1].to(dtype), [X.to(dtype)], min_samples=1)
    assert 6 not in report.removed.get("parts.0", [])


def test_shared_parameters_are_told_from_shared_modules() -> None:
    """One module that runs twice is one layer."""
    model = net()
    graph = build_graph(nn.Sequential(model[:3], model[3:]), X[:1])
    assert len(all_groups(graph)[0]) == 3
