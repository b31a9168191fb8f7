"""Optimizers that go on through a prune, compared with optimizers built anew for the pruned network."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from dnr_plugin.network.graph import build_graph
from dnr_plugin.pruning.optimizer import follow_optimizer

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 4, (8,), generator=torch.Generator().manual_seed(2))
GONE = [1, 4, 5]

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.1),
}


def _net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3), nn.Flatten(),
        nn.Linear(96, 4),
    )  # fmt: skip


def _prune(model: nn.Module, layer: str = "0", gone: list[int] = GONE) -> None:
    graph = build_graph(model, X[:1])
    root = model.get_submodule(layer)
    graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, gone).prune()


def _train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _sliced(name: str, value: Tensor, gone: list[int] = GONE) -> Tensor:
    """What pruning layer 0 of `_net` leaves of a tensor of parameter ``name``, by indexing alone."""
    kept = [k for k in range(8) if k not in gone]
    if name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        return value[kept]
    return value[:, kept] if name == "3.weight" else value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_sliced_as_the_weights_are(name: str) -> None:
    """State planted as a function of the original weights is still that function of the weights that were kept."""
    model = _net()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    _train(model, optimizer, 1)
    for parameter in model.parameters():
        for number, (key, value) in enumerate(sorted(optimizer.state[parameter].items())):
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                optimizer.state[parameter][key] = parameter.detach() * (number + 2) + 1
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    steps = {key: optimizer.state[p].get("step") for key, p in model.named_parameters()}
    with follow_optimizer(optimizer, model):
        _prune(model)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert set(optimizer.state) == set(model.parameters())
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, _sliced(key, before[key]))
        assert optimizer.state[parameter].get("step") == steps[key]
        checked = 0
        for number, (_, value) in enumerate(sorted(optimizer.state[parameter].items())):
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                assert torch.equal(value, parameter.detach() * (number + 2) + 1)
                checked += 1
        assert checked == {"sgd": 1, "adam": 2, "adamw": 3}[name]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_the_network_had_always_been_small(name: str) -> None:
    """Against a small network with sliced weights and a state dict sliced by hand: equal to the last bit."""
    model = _net()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    _train(model, optimizer)
    names = [key for key, _ in model.named_parameters()]
    small = _net(5)
    weights = {}
    for key, value in model.state_dict().items():
        cut = value.dim() and key.startswith("1.")
        kept = [k for k in range(8) if k not in GONE]
        weights[key] = value[kept].clone() if cut else _sliced(key, value).clone()
    small.load_state_dict(weights)
    reference = OPTIMIZERS[name](list(small.parameters()))
    saved = copy.deepcopy(optimizer.state_dict())
    for index, state in saved["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = _sliced(names[index], value).contiguous()
    reference.load_state_dict(saved)
    with follow_optimizer(optimizer, model):
        _prune(model)
    assert _train(model, optimizer) == _train(small, reference)
    for ours, theirs in zip(model.parameters(), small.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_goes_on_as_with_dead_channels() -> None:
    """Dead channels get no gradient, so that SGD moves the others as if they were gone.

    Zero filters, BatchNorm weight and bias 0 (ReLU's gradient at 0 is 0): input 0 and gradient 0 all along. The
    consumer's weights for them get no gradient either, and no weight decay reaches anything that matters.
    """
    model = _net().double()
    with torch.no_grad():
        for layer in (model[0], model[1]):
            layer.weight[GONE] = 0.0
            layer.bias[GONE] = 0.0
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    x = X.double()

    def train(net: nn.Module, opt: Optimizer) -> list[float]:
        losses = []
        for _ in range(3):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(net(x), Y)
            loss.backward()
            opt.step()
            losses.append(float(loss.detach()))
        return losses

    train(model, optimizer)
    pruned, follower = copy.deepcopy((model, optimizer))
    with follow_optimizer(follower, pruned):
        graph = build_graph(pruned, x[:1])
        graph.get_pruning_group(pruned[0], graph.get_pruner_of_module(pruned[0]).prune_out_channels, GONE).prune()
    assert pruned[0].out_channels == 5
    assert train(pruned, follower) == pytest.approx(train(model, optimizer), rel=1e-12)
    for (key, ours), theirs in zip(pruned.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, _sliced(key, theirs), rtol=1e-10, atol=1e-13)


def test_the_trap() -> None:
    """Without `follow_optimizer` an optimizer made before the prune trains nothing that was pruned, in silence."""
    model = _net()
    optimizer = SGD(model.parameters(), lr=0.1)
    _prune(model)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    _train(model, optimizer)
    untouched = {key for key, value in model.named_parameters() if torch.equal(value, before[key])}
    assert untouched == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}


def test_parameter_groups_and_schedulers_go_on() -> None:
    """Options and order of the groups stay; a scheduler made before changes the rate after."""
    model = _net()
    parameters = dict(model.named_parameters())
    first, second = ["3.weight", "0.bias"], [k for k in parameters if k not in ("3.weight", "0.bias")]
    optimizer = SGD(
        [
            {"params": [parameters[k] for k in first], "lr": 0.5, "weight_decay": 0.1},
            {"params": [parameters[k] for k in second]},
        ],
        lr=0.2,
        momentum=0.9,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    with follow_optimizer(optimizer, model):
        _prune(model)
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    now = dict(model.named_parameters())
    for group, names in zip(optimizer.param_groups, (first, second), strict=True):
        assert [id(p) for p in group["params"]] == [id(now[k]) for k in names]
    _train(model, optimizer, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.02])
    before = now["0.weight"].detach().clone()
    _train(model, optimizer, 1)
    assert not torch.equal(now["0.weight"], before)


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_gradients_and_flags_follow(with_optimizer: bool) -> None:
    """Gradients are sliced, absent ones stay absent, frozen parameters stay frozen, others are the same objects."""
    model = _net()
    model[1].weight.requires_grad_(False)
    nn.functional.cross_entropy(model(X), Y).backward()
    model[0].bias.grad = None
    untouched = model[5].weight
    gradients = {key: None if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    with follow_optimizer(SGD(model.parameters(), lr=0.1) if with_optimizer else None, model):
        _prune(model)
    assert model[5].weight is untouched
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    for key, parameter in model.named_parameters():
        if gradients[key] is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, _sliced(key, gradients[key]))


def test_channels_last_weights() -> None:
    """Positions are logical, whatever the memory layout."""
    model = _net().to(memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    _train(model, optimizer, 1)
    before = {key: optimizer.state[p]["momentum_buffer"].clone() for key, p in model.named_parameters()}
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    with follow_optimizer(optimizer, model):
        _prune(model)
    for key, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["momentum_buffer"], _sliced(key, before[key]))
        assert torch.equal(p.grad, _sliced(key, gradients[key]))
    _train(model, optimizer, 1)


def test_two_prunes_in_one_context() -> None:
    """Positions compose: outputs of one layer and of the next, and the same layer twice."""
    model = _net()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    _train(model, optimizer, 1)
    before = optimizer.state[model[3].weight]["momentum_buffer"].clone()
    with follow_optimizer(optimizer, model):
        _prune(model, "0", [1, 4, 5])
        _prune(model, "3", [0, 2])
        _prune(model, "0", [0])  # now the original channels 2, 3, 6 and 7
    after = optimizer.state[model[3].weight]["momentum_buffer"]
    assert torch.equal(after, before[[1, 3, 4, 5]][:, [2, 3, 6, 7]])
    _train(model, optimizer, 1)


def test_an_exception_inside_restores() -> None:
    """What was pruned before the error is followed; gradients, flags and the optimizer are in order."""
    model = _net()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    _train(model, optimizer, 1)
    gradients = {key: p.grad for key, p in model.named_parameters()}
    with pytest.raises(KeyError), follow_optimizer(optimizer, model):
        raise KeyError
    assert all(p.grad is gradients[key] for key, p in model.named_parameters())

    def prune_and_fail() -> None:
        with follow_optimizer(optimizer, model):
            _prune(model)
            raise KeyError

    with pytest.raises(KeyError):
        prune_and_fail()
    assert all(torch.equal(p.grad, _sliced(key, gradients[key])) for key, p in model.named_parameters())
    assert set(optimizer.state) == set(model.parameters())
    _train(model, optimizer, 1)


def test_sixteen_bit_parameters_follow_as_well() -> None:
    model = _net().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(X.to(torch.bfloat16)).float().square().mean().backward()
    optimizer.step()
    expected = optimizer.state[model[0].weight]["momentum_buffer"][1:].clone()
    with follow_optimizer(optimizer, model):
        graph = tp.DependencyGraph().build_dependency(model, X[:1].to(torch.bfloat16))
        graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [0]).prune()
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], expected)


def test_criteria_that_read_gradients_read_the_real_ones() -> None:
    """Taylor ranks inside the context as it does outside."""

    def pruned(follow: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = _net()
        nn.functional.cross_entropy(model(X), Y).backward()
        pruner = tp.pruner.BasePruner(model, X[:1], tp.importance.TaylorImportance(), pruning_ratio=0.5)
        with follow_optimizer(None, model) if follow else contextlib.nullcontext():
            pruner.step()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(pruned(True), pruned(False), strict=True))


def test_factored_state_is_refused_before_anything_changes() -> None:
    """Adafactor keeps rows and columns of a weight, which no position describes."""
    model = _net()
    optimizer = Adafactor(model.parameters())
    _train(model, optimizer, 1)
    gradients = {key: p.grad for key, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"Adafactor.*weight.*cannot follow"), follow_optimizer(optimizer, model):
        raise AssertionError
    assert all(p.grad is gradients[key] for key, p in model.named_parameters())


def test_parameters_changed_otherwise_are_named_and_the_rest_is_in_order() -> None:
    """A new weight in place of an old one is no prune."""
    model = _net()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    _train(model, optimizer, 1)
    kept = model[5].weight.grad
    with pytest.raises(RuntimeError, match=r"^0\.weight: replaced"), follow_optimizer(optimizer, model):
        model[0].weight = nn.Parameter(torch.randn(8, 3, 3, 3))
    assert model[5].weight.grad is kept
    assert model[0].weight.grad is None


class Around(Optimizer):
    """The usual shape of SAM and Lookahead: the groups are shared, the state stays inside."""

    def __init__(self, parameters: Any, base: Callable[..., Optimizer]) -> None:
        super().__init__(parameters, {})
        self.inner = base(self.param_groups)
        self.param_groups = self.inner.param_groups
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_wraps_goes_on_as_well(name: str) -> None:
    """Its steps are those of the wrapped one alone."""
    results = []
    for wrap in (lambda make, p: make(p), lambda make, p: Around(p, make)):
        model = _net()
        optimizer = wrap(OPTIMIZERS[name], [*model.parameters()])
        _train(model, optimizer)
        with follow_optimizer(optimizer, model):
            _prune(model)
        inner = getattr(optimizer, "inner", optimizer)
        assert set(inner.state) == set(model.parameters())
        results.append(_train(model, optimizer))
    assert results[0] == results[1]
    assert isinstance(optimizer, Around)
    assert {p.shape for p in optimizer.slow} == {p.shape for p in model.parameters()}
    assert all(slow.shape == p.shape and p in set(model.parameters()) for p, slow in optimizer.slow.items())


def test_lbfgs_moves_all_parameters_and_is_refused_once_it_has_a_history() -> None:
    """It keeps a list of the parameters, and its history is one flat vector of all of them."""
    model = _net()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    with follow_optimizer(optimizer, model):
        _prune(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(closure)
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still <= {"0.bias"}  # which the BatchNorm behind it takes away
    with pytest.raises(ValueError, match="LBFGS: expected state of the shape of"), follow_optimizer(optimizer, model):
        pass


def test_state_in_lists_and_dicts_is_sliced() -> None:
    model = _net()
    optimizer = SGD(model.parameters(), 0.1)
    weight = model[0].weight
    optimizer.state[weight] = {"pair": [weight.detach() * 2, {"inner": weight.detach() * 3}], "step": 4}
    with follow_optimizer(optimizer, model):
        _prune(model)
    state = optimizer.state[model[0].weight]
    assert torch.equal(state["pair"][0], model[0].weight * 2)
    assert torch.equal(state["pair"][1]["inner"], model[0].weight * 3)
    assert state["step"] == 4
