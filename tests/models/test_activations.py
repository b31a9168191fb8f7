"""Activations replaced in any network against the same network written anew, and what is left named."""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from helpers.common import assume
from torch import Tensor, fx, nn

from dnr_plugin.errors import InputError
from dnr_plugin.models.activations import choice
from dnr_plugin.models.activations.recording import activation_summary as summary
from dnr_plugin.models.activations.recording import left_activations
from dnr_plugin.models.activations.replacing import apply_spec, replace_activations
from dnr_plugin.models.build import build_model, rebuild
from dnr_plugin.models.saved import load_pruned, save_pruned
from dnr_plugin.network.cost import flop_report
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.sections import ModelOptions
from dnr_plugin.reports.run_report import facts

# Written out, not taken from the package or from PyTorch's own.
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.2 * x),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
}
TYPES = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class Written(nn.Module):
    """An activation by its formula, which no replacement knows."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return FORMULAS[self.name](x)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean()


class Calls(nn.Module):
    """Calls of every kind; ``act`` writes the same network with another activation."""

    def __init__(self, act: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.act = act
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 8, 3, padding=1)
        self.gate = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.act is not None:
            act = self.act
            x = act(self.bn(self.a(x)))
            x = act(self.b(x))
            x = act(_centred(act(_centred(act(self.c(x))))))
            x = act(_centred(act(_centred(act(_centred(act(self.d(x))))))))
            return self.fc(act(x.mean((2, 3)) * torch.sigmoid(self.gate(x.mean((2, 3))))))
        x = F.relu(self.bn(self.a(x)))
        x = self.b(x)
        x.relu_()  # the result is dropped: only the write counts
        x = _centred(torch.relu(self.c(x)))
        x = _centred(F.leaky_relu(x, 0.3))
        x = F.hardswish(x)
        x = _centred(F.gelu(self.d(x)))
        x = _centred(F.silu(x, inplace=True))
        x = _centred(F.relu6(x))
        x = x.relu()
        x = x.mean((2, 3))
        return self.fc(torch.ops.aten.relu(x * torch.sigmoid(self.gate(x))))


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert difference(ours, theirs) <= 1e-4


@functools.cache
def _network(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=6)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(images(8, size))  # with statistics of their own, deep networks let something through
    return model.eval()


def network(name: str, size: int) -> nn.Module:
    return copy.deepcopy(_network(name, size))


def by_hand(model: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """A copy whose modules of these types are replaced by name, the plain way."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if type(module) in kinds:
            parent, _, key = path.rpartition(".")
            setattr(model.get_submodule(parent), key, Written(name))
    return model


# What each network has, and the size of the images it is run on.
MODULES: dict[str, tuple[tuple[type[nn.Module], ...], int]] = {
    "resnet18": ((nn.ReLU,), 32),
    "mobilenet_v3_small": ((nn.ReLU, nn.Hardswish), 32),
    "mobilenet_v2": ((nn.ReLU6,), 32),
    "squeezenet1_1": ((nn.ReLU,), 48),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("architecture", MODULES)
def test_modules_of_torchvisions_networks(architecture: str, name: str) -> None:
    kinds, size = MODULES[architecture]
    model = network(architecture, size)
    keys, types = list(model.state_dict()), {path: type(m) for path, m in model.named_modules()}
    before, expected = model(images(size=size)), by_hand(model, name, kinds)(images(size=size))
    done = replace_activations(model, name, 0.2, example=images(1, size))
    assert_close(model(images(size=size)), expected)
    if name != "relu" or kinds != (nn.ReLU,):
        assume(difference(before, expected) > 1e-2, "the unchanged network would pass")
    assert list(model.state_dict()) == keys and done.functional == []
    same = [path for path, kind in types.items() if kind is TYPES[name]]
    assert sorted([*done.modules, *same]) == sorted(path for path, kind in types.items() if kind in kinds)
    for path, module in model.named_modules():
        assert type(module) is (TYPES[name] if path in done.modules else types[path])
    gates = [f"{path} (Hardsigmoid)" for path, kind in types.items() if kind is nn.Hardsigmoid]
    assert done.left == gates and len(gates) == (9 if architecture == "mobilenet_v3_small" else 0)


def test_a_shared_module_stays_shared_and_modes_stay() -> None:
    model = network("resnet18", 32).train()
    model.layer1.eval()
    shared = nn.ReLU()
    model.layer2[0].relu = model.layer2[1].relu = shared
    done = replace_activations(model, "silu", example=images(1))
    assert model.layer2[0].relu is model.layer2[1].relu and model.layer2[0].relu is not shared
    assert len(done.modules) == 8
    assert not model.layer1[0].relu.training and model.layer2[0].relu.training and model.relu.training


def _densenet() -> nn.Module:
    return torchvision.models.DenseNet(4, (2, 2), 8, 2, num_classes=5)


@pytest.mark.parametrize("name", ["leaky_relu", "gelu"])
def test_the_function_call_of_densenet(name: str) -> None:
    torch.manual_seed(0)
    model = _densenet().eval()
    written = by_hand(model, name, (nn.ReLU,))
    x = FORMULAS[name](written.features(images()))  # torchvision's forward, with the formula for F.relu
    expected = written.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))
    done = replace_activations(model, name, 0.2, example=images(1))
    assert done.functional == [""] and len(done.modules) == 1 + 2 * 4 + 1
    assert_close(model(images()), expected)
    assert type(model).__name__ == "DenseNet" and isinstance(model, torchvision.models.DenseNet)


def test_the_function_calls_of_googlenet_also_those_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    reference = copy.deepcopy(model)
    done = replace_activations(model, "silu", example=images(1, 64))
    assert "conv1" in done.functional and "inception3a.branch2.1" in done.functional
    assert {"aux1", "aux1.conv", "aux2", "aux2.conv"} <= set(done.functional), "called in training mode only"
    torch.manual_seed(1)
    ours = model(images(2, 64))
    with monkeypatch.context() as patch:
        patch.setattr(F, "relu", lambda x, inplace=False: FORMULAS["silu"](x))
        torch.manual_seed(1)
        theirs = reference(images(2, 64))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other)


@pytest.mark.parametrize("name", TYPES)
def test_every_kind_of_call(name: str) -> None:
    torch.manual_seed(0)
    model = Calls().eval()
    expected = Calls(FORMULAS[name]).eval()
    expected.load_state_dict(model.state_dict())
    assert difference(model(images()), expected(images())) > 1e-2
    done = replace_activations(model, name, 0.2, example=images(1))
    assert done.functional == [""] and done.modules == [] and done.left == ["the model (sigmoid)"]
    mine, other = images().requires_grad_(), images().requires_grad_()
    ours, theirs = model(mine), expected(other)
    assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_close(mine.grad, other.grad)
    for (key, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert p.grad is not None and float(p.grad.abs().max()) > 0, key
        assert_close(p.grad, q.grad)


class Child(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + F.hardtanh(x) + torch.tanh(x)


def test_calls_of_nested_modules_are_redirected_once() -> None:
    """Parent, child and a swapped module all redirect; the activation must come out once, the tanh untouched."""

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child, self.act = Child(), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.child(x)) + self.act(x + 1)

    x = images()
    for name, formula in FORMULAS.items():
        model = Parent()
        done = replace_activations(model, name, 0.2, example=x)
        assert done.functional == ([] if name == "relu" else ["child", ""])
        inner = formula(x) + F.hardtanh(x) + torch.tanh(x)
        assert_close(model(x), formula(inner) + formula(x + 1))
        assert_close(model.child(x), inner)
        assert done.left == ["child (hardtanh)", "child (tanh)"]


class HardSwish(nn.Module):
    """As MobileNetV3 is often written: the gate is a ReLU6, a module here and a call there."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.act = nn.ReLU6(), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gate(x + 3) / 6
        return F.relu6(self.act(x)) * F.relu6(x + 3.0) / 6


def test_the_gate_of_a_hard_sigmoid_written_by_hand_stays() -> None:
    x, model = images(), nn.Sequential(HardSwish())
    done = replace_activations(model, "silu", example=x)
    assert (done.modules, done.functional, done.kept) == (["0.act"], ["0"], ["0.gate"])
    assert done.left == ["0 (relu6)", "0.gate (ReLU6)"]
    silu, y = FORMULAS["silu"], x * (x + 3).clamp(0, 6) / 6
    assert_close(model(x), silu(silu(y)) * (y + 3).clamp(0, 6) / 6)
    again = nn.Sequential(HardSwish())
    apply_spec(again, json.loads(json.dumps(done.spec)))
    assert torch.equal(again(x), model(x))


def _convnext() -> nn.Module:
    config = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([config(8, 16, 1), config(16, None, 2)], layer_scale=1.0, num_classes=5)


GATED: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], list[str]]] = {
    "ConvNeXt": (_convnext, nn.GELU, []),
    "attention": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5),
        nn.GELU,
        [f"encoder.layers.encoder_layer_{i}.self_attention (softmax)" for i in range(2)],
    ),
    "squeeze and excitation": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), torchvision.ops.SqueezeExcitation(8, 4)),
        nn.ReLU,
        ["1.scale_activation (Sigmoid)"],
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_gates_and_normalisation_stay_and_are_named(name: str) -> None:
    torch.manual_seed(0)
    build, kind, left = GATED[name]
    model = build().eval()
    if name == "attention":
        nn.init.normal_(model.heads[0].weight)  # torchvision's is zero
    before, expected = model(images()), by_hand(model, "leaky_relu", (kind,))(images())
    done = replace_activations(model, "leaky_relu", 0.2, example=images(1))
    assert_close(model(images()), expected)
    assume(difference(before, expected) > 1e-3, "the unchanged network would pass")
    assert done.left == left


def test_fused_attention_layers_compute_the_new_activation() -> None:
    """In eval mode and without gradients PyTorch takes a path of its own, which knows ReLU and GELU only."""
    torch.manual_seed(0)
    for act in (nn.ReLU(), F.relu):
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=act, batch_first=True).eval()
        x = torch.randn(2, 3, 8)
        replace_activations(layer, "leaky_relu", 0.2, example=x)
        with torch.no_grad():
            fused = layer(x)
            attended = layer.norm1(x + layer.self_attn(x, x, x)[0])
            hidden = layer.linear2(FORMULAS["leaky_relu"](layer.linear1(attended)))
        assert_close(fused, layer.norm2(attended + hidden))


def test_looking_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_densenet(), nn.Dropout(0.5)).train()
    model[0].features.denseblock1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, example, state = [m.training for m in model.modules()], images(1), torch.get_rng_state()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    replace_activations(model, "gelu", example=example)
    left_activations(model, example, "gelu")
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(example, images(1))
    assert [m.training for m in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_compute_the_same_and_stand_alone(copied: str) -> None:
    torch.manual_seed(0)
    model = _densenet().eval()
    replace_activations(model, "gelu", example=images(1))
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert type(other) is type(model) and list(other.state_dict()) == list(model.state_dict())
    expected = model(images())
    assert torch.equal(other(images()), expected)
    replace_activations(other, "relu", example=images(1))
    assert torch.equal(model(images()), expected), "the original keeps its own activation"
    assert torch.equal(other.eval()(images()), by_hand_relu(model)(images()))


def by_hand_relu(model: nn.Module) -> nn.Module:
    plain = _densenet().eval()
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_replica_redirects_in_its_own_module() -> None:
    """DataParallel copies modules shallowly."""
    model = Calls().eval()
    replace_activations(model, "silu", example=images(1))
    replica = model._replicate_for_data_parallel()
    replica.fc = nn.Linear(8, 5, bias=False)
    with torch.no_grad():
        replica.fc.weight.copy_(model.fc.weight * 2)
    assert_close(replica(images()), 2 * model(images()))


def test_replacing_twice_is_replacing_once() -> None:
    torch.manual_seed(0)
    model = Calls().eval()
    once = copy.deepcopy(model)
    replace_activations(model, "gelu", example=images(1))
    replace_activations(model, "leaky_relu", 0.2, example=images(1))
    replace_activations(once, "leaky_relu", 0.2, example=images(1))
    assert torch.equal(model(images()), once(images()))
    assert type(model) is type(once)


@pytest.mark.parametrize("network", ["calls", "densenet"])
def test_pruning_and_counting(network: str) -> None:
    torch.manual_seed(0)
    model = Calls().eval() if network == "calls" else _densenet().eval()
    dense = flop_report(model, images(1))
    replace_activations(model, "silu", example=images(1))
    report = flop_report(model, images(1))
    assert report.flops == dense.flops and report.params == dense.params
    assert [layer.name for layer in report.layers] == [layer.name for layer in dense.layers]
    magnitude = tp.importance.MagnitudeImportance(p=1)
    plan = plan_removal(model, images(1), magnitude, "neuron_sparsity", 0.4, limits=Limits(max_pruning_ratio=0.7))
    prune_neurons(model, images(1), plan.removals)
    assert flop_report(model, images(1)).flops < 0.9 * dense.flops
    model(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert left_activations(model, images(1), "silu") == (["the model (sigmoid)"] if network == "calls" else [])


# With a layer to take channels from.
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"name": "torchvision.mobilenet_v3_small", "activation": "gelu"}, "features.0.0"),
    (
        {"name": "torchvision.googlenet", "kwargs": {"init_weights": False}, "activation": "silu"},
        "conv2.conv",
    ),
    ({"name": "resnet20", "width": 4, "activation": "leaky_relu", "negative_slope": 0.3}, "layer1.0.conv1"),
]


@pytest.mark.parametrize(("options", "layer"), OPTIONS)
def test_a_pruned_network_is_saved_and_loaded_to_the_bit(options: dict[str, Any], layer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(ModelOptions(**options), 5)
    assert rebuild(json.loads(json.dumps(model.dnr_builder))).dnr_builder == model.dnr_builder
    before = model.get_submodule(layer).out_channels
    prune_neurons(model, images(1), {layer: [0, 2]})
    assert model.get_submodule(layer).out_channels == before - 2
    save_pruned(model.eval(), tmp_path)
    loaded = load_pruned(tmp_path)
    assert torch.equal(loaded(images()), model(images()))
    assert summary(loaded, images(1)) == summary(model, images(1))
    assert summary(loaded, images(1))["name"] == options["activation"]


def test_a_model_of_ones_own_is_saved_with_its_spec(tmp_path: Path) -> None:
    model = network("squeezenet1_1", 48)
    spec = replace_activations(model, "silu", example=images(1, 48)).spec
    builder = {"name": "torchvision.squeezenet1_1", "kwargs": {"num_classes": 6}}
    with pytest.raises(ValueError, match="differ"):
        save_pruned(model, tmp_path, builder)
    save_pruned(model, tmp_path, builder | {"activation": spec})
    assert torch.equal(load_pruned(tmp_path)(images(2, 48)), model(images(2, 48)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "architecture: activation: expected a mapping of functional, kept, name, negative_slope, found None"),
        ({"name": "gelu", "code": 1}, "architecture: activation: expected a mapping of"),
        ({"name": "tanh"}, "architecture: model.activation: expected one of relu, leaky_relu, silu, gelu"),
        ({"name": "leaky_relu", "negative_slope": -1}, "expected a number of at least 0, found -1"),
        ({"name": "leaky_relu", "negative_slope": True}, "expected a number of at least 0, found True"),
        ({"name": "gelu", "functional": "conv1"}, "architecture: activation.functional: expected names of modules"),
        ({"name": "gelu", "functional": ["nowhere"]}, "expected names of modules, found 'nowhere'"),
        ({"name": "gelu", "kept": [3]}, "architecture: activation.kept: expected names of modules, found [3]"),
    ],
)
def test_malformed_specs_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        rebuild({"name": "torchvision.squeezenet1_1", "kwargs": {"num_classes": 3}, "activation": spec})
    assert message in str(caught.value) and "\n" not in str(caught.value)


class InPlace(nn.Module):
    """The shortcut reads what the ReLU wrote, or the result is dropped: only the write counts."""

    def __init__(self, dropped: bool) -> None:
        super().__init__()
        self.dropped, self.act, self.conv = dropped, nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.dropped:
            self.act(y)
            return y
        return self.act(y) + y


@pytest.mark.parametrize("dropped", [True, False])
def test_in_place_modules_whose_input_is_read_again_are_refused(dropped: bool) -> None:
    model = InPlace(dropped)
    with pytest.raises(InputError, match=r"model\.activation: expected activations whose result is used"):
        replace_activations(model, "gelu", example=images(1))
    assert type(model.act) is nn.ReLU and model.act.inplace
    replace_activations(model, "relu", example=images(1))  # nothing to replace


def test_what_cannot_be_replaced_is_refused_and_leaves_the_model_alone() -> None:
    scripted = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())), nn.ReLU())
    patched = nn.Sequential(Child(), nn.ReLU())
    patched[0].forward = lambda x: F.relu(x)
    graph = nn.Sequential(fx.symbolic_trace(Child()), nn.ReLU())
    for model, message in [
        (scripted, "expected modules of Python, found that 0 is scripted"),
        (patched, "found a patched forward in 0"),
        (graph, "found a graph of torch.fx in 0"),
        (nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "expected a network that runs on the example, found RuntimeError"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            replace_activations(model, "gelu", example=images(1))
        assert "\n" not in str(caught.value) and type(model[1]) is nn.ReLU
    hidden = [f"{name} (scripted, cannot be seen)" for name in ("0", "0.0", "0.1")]
    assert left_activations(scripted, images(1)) == [*hidden, "1 (ReLU)"]
    with pytest.raises(InputError, match=r"model\.activation: expected one of relu, .*, found 'elu'"):
        replace_activations(nn.ReLU(), "elu", example=images(1))


def test_left_activations_names_modules_and_calls() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prelu, self.leaky, self.tanh_gelu = nn.PReLU(), nn.LeakyReLU(0.3), nn.GELU(approximate="tanh")

        def forward(self, x: Tensor) -> Tensor:
            x = self.tanh_gelu(self.leaky(self.prelu(x)))
            x = x * torch.sigmoid(x) + x.clamp(min=0) + x.clamp(min=1e-5)
            return F.softmax(F.leaky_relu(F.leaky_relu(x, 0.1), 0.3), dim=1)

    called = ["the model (sigmoid)", "the model (clamp)", "the model (leaky_relu)", "the model (softmax)"]
    modules = ["prelu (PReLU)", "leaky (LeakyReLU)", "tanh_gelu (GELU)"]
    assert left_activations(Many(), images(1)) == called + modules
    assert left_activations(Many(), images(1), "leaky_relu", 0.3) == [*called, modules[0], modules[2]]
    assert left_activations(Many(), images(1), "gelu") == called + modules
    model = Many()
    done = replace_activations(model, "gelu", example=images(1))
    assert done.left == ["the model (sigmoid)", "the model (clamp)", "the model (softmax)", "prelu (PReLU)"]
    assert done.modules == ["leaky", "tanh_gelu"] and done.functional == [""]


def test_summary_of_built_networks() -> None:
    example = images(1)
    chosen = build_model(ModelOptions(name="torchvision.mobilenet_v3_small", activation="silu"), 5)
    found = summary(chosen, example)
    assert found["name"] == "silu" and found["left"][0] == "features.1.block.1.scale_activation (Hardsigmoid)"
    assert found["places"] == sum(type(m) is nn.SiLU for m in chosen.modules()) and len(found["left"]) == 9
    plain = build_model(ModelOptions(name="torchvision.squeezenet1_1"), 5)
    assert "activation" not in plain.dnr_builder
    found = summary(plain, images(1, 48))
    assert found["name"] is None and len(found["left"]) == 26 and found["left"][0] == "features.1 (ReLU)"
    assert summary(build_model(ModelOptions(name="resnet20", width=2), 5), example) == {
        "name": "relu",
        "places": 19,
        "left": [],
    }
    leaky = build_model(ModelOptions(name="mlp", activation="leaky_relu"), 5)
    assert summary(leaky, example) == {"name": "leaky_relu", "negative_slope": 0.01, "places": 2, "left": []}


def test_every_hidden_type_has_its_function() -> None:
    """What `_HIDDEN` derives from the types' names is a function of PyTorch."""
    assert all(callable(getattr(F, name)) for name in choice.HIDDEN)
    assert len(choice.HIDDEN) == len(choice.HIDDEN_TYPES)


def test_a_report_counts_what_is_left() -> None:
    report = {
        "target": {"kind": "flops", "requested": 0.5, "achieved": 0.5},
        "dead": {"neurons": 0, "of": 1},
        "exact_removal": {"neurons": 0},
        "sparsity": {"neuron": 0.5, "weight": 0.5},
        "seconds": {"train": 1, "prune": 1, "finetune": 1},
        "skipped": [], "unsupported_ops": {}, "seed": 0, "device": "CPU", "recipe": {}, "kept": {"flops": 0.5},
    }  # fmt: skip
    left = ["a.fc (Sigmoid)", "b.fc (Sigmoid)", "the model (softmax)"]
    for name, start in (("gelu", "Activations other than gelu: "), (None, "Activations, left as they are: ")):
        found = facts(report | {"activation": {"name": name, "places": 2, "left": left}})
        assert f"{start}2 Sigmoid, 1 softmax." in found
    for without in ({}, {"activation": {"name": "relu", "places": 2, "left": []}}):
        assert not [line for line in facts(report | without) if line.startswith("Activations")]
