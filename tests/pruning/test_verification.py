"""Groups that cannot be taken as Torch-Pruning says are left alone and named; those that can are pruned."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dnr_plugin import (
    DyingNeuronDynamics,
    DyingNeuronImportance,
    InputError,
    Limits,
    TargetError,
    Timetable,
    flop_report,
    plan_removal,
    prune_neurons,
    remove_dead_neurons,
)
from dnr_plugin.pruning.groups import Survey, prunable_layers

X = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Layers by name, and what `way` makes of them."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.way = way
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def conv(first: int, second: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(first, second, kernel, padding=kernel // 2, **options)


def head(m: Any, x: Tensor) -> Tensor:
    return m.fc(x.relu().mean((2, 3)))  # type: ignore[no-any-return]


def kill(layer: nn.Module, neurons: list[int]) -> None:
    with torch.no_grad():
        layer.weight[neurons] = 0.0
        layer.bias[neurons] = -1.0


def observed(model: nn.Module, x: Tensor = X) -> DyingNeuronImportance:
    importance = DyingNeuronImportance()
    with importance.observe(model), torch.no_grad():
        model(x)
    return importance


def reasons(model: nn.Module, x: Tensor = X) -> dict[str, str]:
    return dict(prunable_layers(model, x[:1], Limits(), {}).skipped)


def gate(m: Any, x: Tensor) -> Tensor:
    u, v = m.a(x).chunk(2, 1)
    return head(m, m.b(torch.max(u, v)))


def gated() -> Net:
    torch.manual_seed(0)
    return Net(gate, a=conv(3, 32), b=conv(16, 24, 1), fc=nn.Linear(24, 5)).eval()


def test_tied_neurons_are_judged_scored_and_planned_together() -> None:
    model = gated()
    with torch.no_grad():
        model.b.weight[:, 0] *= 100.0
    importance = observed(model)
    group = next(g for g in Survey(model, X[:1]).groups if g[0].dep.target.module is model.a)
    verdict, scores = importance.verdict(group), importance(group)
    assert verdict is not None and scores is not None
    assert not verdict.dead.any()
    rank = scores.argsort().argsort()
    assert {int(rank[0]), int(rank[16])} == {30, 31}
    plan = plan_removal(model, X[:1], importance, "neuron_sparsity", 0.5)
    assert {k % 16 for k in plan.removals["a"] if k < 16} == {k % 16 for k in plan.removals["a"] if k >= 16}
    prune_neurons(model, X[:1], plan.removals, importance=importance, fold=True)
    assert model(X).shape == (48, 5)
    assert model.a.out_channels == 2 * model.b.in_channels == 32 - len(plan.removals["a"])


def test_a_pruner_takes_tied_neurons_as_it_takes_others() -> None:
    model = gated()
    importance = observed(model)
    tp.pruner.BasePruner(model, X[:1], importance, pruning_ratio=0.5, ignored_layers=[model.fc]).step()
    assert (model.a.out_channels, model.b.in_channels) == (16, 8)
    assert model(X).shape == (48, 5)


@pytest.mark.parametrize("planted", [[3], [3, 19], [3, 19, 5, 21]])
def test_tied_neurons_go_only_where_what_they_make_together_is_dead(planted: list[int]) -> None:
    model = Net(gate, a=conv(3, 32), b=conv(16, 24, 1), fc=nn.Linear(24, 5)).eval()
    kill(model.a, planted)
    model.way = lambda m, x: head(m, m.b(torch.max(*m.a(x).relu().chunk(2, 1))))
    with torch.no_grad():
        model.a.bias[[k for k in range(32) if k not in planted]] = 1.0
        model.b.bias.fill_(1.0)
        model.b.weight.mul_(0.1)
        before = model(X)
    report = remove_dead_neurons(model, X[:1], [X], min_samples=1)
    assert report.removed.get("a", []) == sorted(k for k in planted if (k + 16) % 32 in planted)
    assert torch.allclose(model(X), before, atol=1e-5)


def concatenated(m: Any, x: Tensor) -> Tensor:
    return head(m, m.c(m.d(torch.cat([m.a(x), m.b(x)], 1).relu())))


def test_no_layer_of_a_group_is_emptied() -> None:
    model = Net(concatenated, a=conv(3, 8), b=conv(3, 4), d=conv(12, 12, groups=12, bias=False), c=conv(12, 8),
                fc=nn.Linear(8, 5)).eval()  # fmt: skip
    kill(model.b, [0, 1, 2, 3])
    report = remove_dead_neurons(copy.deepcopy(model), X[:1], [X], min_samples=1)
    assert report.left == [("d", 1, "the layer keeps one")]
    assert len(report.removed["d"]) == 3
    plan = plan_removal(model, X[:1], observed(model), "neuron_sparsity", 0.8)
    prune_neurons(model, X[:1], plan.removals)
    assert min(model.a.out_channels, model.b.out_channels) >= 1
    for limits, least in ((Limits(round_to=4), 4), (Limits(max_pruning_ratio=0.5), 2)):
        layers = prunable_layers(model, X[:1], limits, {}).layers
        assert layers and least


def last(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.b(x).relu().permute(0, 2, 3, 1).flatten(1))  # type: ignore[no-any-return]


def flipped(m: Any, x: Tensor) -> Tensor:
    return head(m, m.c(m.b(x).relu().flip(1)))


def rolled(m: Any, x: Tensor) -> Tensor:
    return head(m, m.c(m.b(x).relu().roll(3, 1)))


def fixed(m: Any, x: Tensor) -> Tensor:
    y = m.b(x).relu()
    return head(m, m.c(torch.cat([m.e(y[:, :4]), y[:, 4:]], 1)))


def unshuffled(m: Any, x: Tensor) -> Tensor:
    return head(m, m.c(F.pixel_unshuffle(m.b(x).relu(), 2)))


def half_flipped(m: Any, x: Tensor) -> Tensor:
    return head(m, m.c(m.b(x).relu() + m.e(x).relu().flip(1)))


WRONG = {
    "channels last": (last, {"b": conv(3, 8), "fc": nn.Linear(8 * 256, 5)}, "b"),
    "flip": (flipped, {"b": conv(3, 8), "c": conv(8, 8), "fc": nn.Linear(8, 5)}, "b"),
    "roll": (rolled, {"b": conv(3, 8), "c": conv(8, 8), "fc": nn.Linear(8, 5)}, "b"),
    "flipped sum": (half_flipped, {"b": conv(3, 8), "e": conv(3, 8), "c": conv(8, 8), "fc": nn.Linear(8, 5)}, "b"),
    "fixed numbers": (fixed, {"b": conv(3, 8), "e": conv(4, 4), "c": conv(8, 8), "fc": nn.Linear(8, 5)}, None),
    "pixel unshuffle": (unshuffled, {"b": conv(3, 8), "c": conv(32, 8), "fc": nn.Linear(8, 5)}, "b"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_group_that_is_mapped_wrongly_is_left_and_the_others_go(name: str) -> None:
    way, layers, root = WRONG[name]
    torch.manual_seed(0)
    model = Net(lambda m, x: way(m, m.a(x).relu()), a=conv(3, 12), **copy.deepcopy(layers)).eval()
    first = model.b
    model.b = conv(12, first.out_channels)
    if hasattr(model, "e") and root == "b":
        model.e = conv(12, 8)
    named = reasons(model)
    assert "a" not in named
    assert named.keys() - {"fc"}
    if root is not None:
        assert root in named or "e" in named
    importance = observed(model)
    plan = plan_removal(model, X[:1], importance, "dead")
    assert set(plan.removals) <= {"a", "c"}
    kill(model.a, [0, 1])
    before = model(X)
    report = remove_dead_neurons(model, X[:1], [X], min_samples=1)
    assert report.removed["a"] == [0, 1]
    assert torch.allclose(model(X), before, atol=1e-4)


class TrainOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux, self.fc = conv(3, 16), conv(16, 16), conv(16, 5, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        z = head(self, self.b(y))
        return z + self.aux(y).mean((2, 3)) if self.training else z


def test_what_is_read_in_train_mode_alone_is_left() -> None:
    model = TrainOnly()
    named = reasons(model)
    assert named["a"] == "aux reads it, which runs in train mode alone"
    assert named["aux"] == "it is not called in eval mode, or under no_grad"
    kill(model.a, [0, 1]), kill(model.b, [2, 3])
    report = remove_dead_neurons(model, X[:1], [X], min_samples=1)
    assert report.removed == {"b": [2, 3]}
    assert ("a", named["a"]) in report.skipped
    model.train()(X).sum().backward()


def test_tensors_that_a_model_keeps_do_not_matter() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        m.features = m.a(x)
        return head(m, m.features)

    model = Net(way, a=conv(3, 16), fc=nn.Linear(16, 5)).eval()
    model.features = None
    flop_report(model, X[:1])
    copy.deepcopy(model)
    plan_removal(model, X[:1], observed(model), "neuron_sparsity", 0.5)
    assert model.features is None or model.features.is_leaf


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_computed_weights_are_named_and_nothing_is_half_done(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 5)).eval()  # fmt: skip
    wrap(model[2])
    with torch.no_grad():
        before = model(X)
    assert "is computed when it runs" in reasons(model)["0"]
    with pytest.raises(InputError, match="nothing was removed"):
        prune_neurons(model, X[:1], {"0": [0, 1]})
    with torch.no_grad():
        assert torch.equal(model(X), before)


@pytest.mark.parametrize("removals", [{"nought": [0]}, {"a": [99]}, {"a": [-1]}])
def test_what_is_not_there_cannot_be_removed(removals: dict[str, list[int]]) -> None:
    model = gated()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="removals: expected"):
        prune_neurons(model, X[:1], {"b": [0], **removals})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_and_optimizer_are_as_before_where_a_removal_fails() -> None:
    model = gated()
    optimizer, importance = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), observed(model)
    parameters = [*model.parameters()]
    with pytest.raises(InputError):
        prune_neurons(model, X[:1], {"b": [0, 1], "nought": [0]}, importance=importance, fold=True, optimizer=optimizer)
    assert all(p is q for p, q in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert plan_removal(model, X[:1], importance, "neuron_sparsity", 0.3).removals


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_layers_read_neurons_and_keep_their_own(kind: type[nn.Module], both: bool) -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.fc(m.r(m.a(x).relu())[0]).mean(1), a=nn.Linear(6, 24),
                r=kind(24, 8, batch_first=True, bidirectional=both),
                fc=nn.Linear(16 if both else 8, 5)).eval()  # fmt: skip
    x = torch.randn(32, 7, 6)
    kill(model.a, [0, 1, 2])
    with torch.no_grad():
        model.a.bias[3:] = 3.0
        before = model(x)
    report = remove_dead_neurons(model, x[:1], [x], min_samples=1)
    assert report.removed == {"a": [0, 1, 2]}
    assert ("r", "the hidden units of a recurrent layer are not pruned") in report.skipped
    assert torch.allclose(model(x), before, atol=1e-6)


@pytest.mark.parametrize("act", [nn.PReLU, lambda: nn.PReLU(16), lambda: nn.LeakyReLU(0.1, inplace=True)])
@pytest.mark.parametrize(
    "norm",
    [
        nn.Identity, lambda: nn.InstanceNorm2d(16, affine=True),
        lambda: nn.InstanceNorm2d(16, track_running_stats=True), lambda: nn.BatchNorm2d(16, affine=False),
        lambda: nn.GroupNorm(16, 16, affine=False),
    ],
)  # fmt: skip
def test_one_slope_and_norms_of_every_make(act: Callable[[], nn.Module], norm: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.o(torch.cat([y := m.act(m.n(m.a(x))), m.up(m.act2(m.b(y)))], 1)), a=conv(3, 16),
                n=norm(), act=act(), b=nn.Conv2d(16, 16, 3, 2, 1), act2=act(), up=nn.ConvTranspose2d(16, 16, 2, 2),
                o=nn.Conv2d(32, 2, 1)).eval()  # fmt: skip
    with torch.no_grad():
        model.a.weight[:4], model.a.bias[:4] = 0.0, 0.0
        before = model(X)
    report = remove_dead_neurons(model, X[:1], [X], min_samples=1)
    assert report.removed == {"a": [0, 1, 2, 3]}
    assert torch.allclose(model(X), before, atol=1e-5)
    assert all(not isinstance(m, nn.LeakyReLU) or m.inplace for m in model.modules())


def test_a_batch_of_one_stays_a_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True),
                          nn.Conv2d(8, 4, 1))  # fmt: skip
    assert [layer.name for layer in prunable_layers(model, X[:1], Limits(), {}).layers] == ["2", "0"]


def test_dynamics_take_no_live_neuron_of_a_gate() -> None:
    model = gated().train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    with DyingNeuronDynamics(model, X[:1], when=Timetable(check_every=2, warmup=2, until=8), optimizer=optimizer,
                             kind="dead", patience=0, min_samples=1) as dynamics:  # fmt: skip
        for _ in range(10):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
            dynamics.step()
    assert model.a.out_channels == 32


# Random networks


KINDS = ["plain", "residual", "concatenation", "depthwise", "grouped", "gate", "shared", "shuffle", "squeeze", "split"]


class Unit(nn.Module):
    """One of the ways in which networks put channels together; takes and gives ``width`` channels."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.kind = draw.choice(
            [
                "plain",
                "residual",
                "concatenation",
                "depthwise",
                "grouped",
                "gate",
                "shared",
                "shuffle",
                "squeeze",
                "split",
            ]
        )
        norm = draw.choice(
            [nn.BatchNorm2d, nn.Identity, lambda c: nn.InstanceNorm2d(c, affine=True), lambda c: nn.GroupNorm(2, c)]
        )
        self.act = draw.choice([nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.PReLU, lambda: nn.ReLU(inplace=True)])()
        inner = draw.choice([4, 8])
        self.norm = norm(width)
        if self.kind == "gate":
            self.a, self.b = conv(width, 2 * inner), conv(inner, width, 1)
        elif self.kind == "concatenation":
            self.a, self.b, self.c = conv(width, inner), conv(width, 4), conv(inner + 4, width)
        elif self.kind in ("depthwise", "grouped"):
            groups = width if self.kind == "depthwise" else 2
            self.a, self.b = conv(width, width, groups=groups), conv(width, width, 1)
        elif self.kind == "squeeze":
            self.a, self.b, self.c = conv(width, 4, 1), conv(4, width, 1), conv(width, width)
        elif self.kind == "shared":
            self.a = conv(width, width)
        elif self.kind == "split":
            self.a, self.b = conv(width, width), conv(width // 2, width // 2)
        else:
            self.a, self.b = conv(width, inner), conv(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "gate":
            u, v = self.a(x).chunk(2, 1)
            y = self.b(u * v.sigmoid())
        elif self.kind == "concatenation":
            y = self.c(torch.cat([self.a(x), self.b(x)], 1).relu())
        elif self.kind == "squeeze":
            y = self.c(x * self.b(self.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid())
        elif self.kind == "shared":
            y = self.a(self.a(x).relu())
        elif self.kind == "split":
            u, v = self.a(x).relu().split(x.shape[1] // 2, 1)
            y = torch.cat([self.b(u), v], 1)
        elif self.kind == "shuffle":
            y = self.b(self.a(x).relu())
            y = y.view(len(y), 2, -1, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        else:
            y = self.b(self.a(x).relu())
        y = self.act(self.norm(y))
        return x + y if self.kind in ("residual", "shared", "squeeze") else y


def random_network(seed: int) -> nn.Module:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width = draw.choice([8, 12])
    return nn.Sequential(
        conv(3, width), nn.ReLU(), *(Unit(draw, width) for _ in range(draw.randint(1, 3))), conv(width, 8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def check_random_network(seed: int) -> None:
    """Dead neurons go exactly, a target is met or refused by name, and what is left trains."""
    model, x, draw = random_network(seed), X[:16, :, :8, :8], random.Random(-seed - 1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and draw.random() < 0.5:
            kill(module, draw.sample(range(module.out_channels), max(1, module.out_channels // 4)))
    with torch.no_grad():
        before = model(x)
        pruned = copy.deepcopy(model)
        report = remove_dead_neurons(pruned, x[:1], [x], min_samples=1)
        assert float((pruned(x) - before).abs().max() / before.abs().max()) <= 1e-4
        names = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        survey = Survey(model, x[:1])
        grouped = {
            survey.names[d.target.module] for g in survey.groups for d, _ in g if d.target.module in survey.names
        }
        assert names <= grouped | {name for name, _ in report.skipped}
        plan_of = copy.deepcopy(model)
        importance = observed(plan_of, x)
        try:
            plan = plan_removal(plan_of, x[:1], importance, "params", 0.7)
        except TargetError as error:
            plan = error.plan
        prune_neurons(plan_of, x[:1], plan.removals, importance=importance, fold=True)
        share = sum(p.numel() for p in plan_of.parameters()) / sum(p.numel() for p in model.parameters())
        assert share == pytest.approx(plan.achieved)
    plan_of.train()(x).sum().backward()


@pytest.mark.parametrize("seed", range(50))
def test_random_networks(seed: int) -> None:
    check_random_network(seed)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_random_networks(hundred: int) -> None:
    for seed in range(100 * hundred + 50, 100 * hundred + 150):
        check_random_network(seed)


def selective(m: Any, x: Tensor) -> Tensor:
    """Two paths, weighed channel by channel by a softmax over the paths, as in a selective kernel."""
    paths = torch.stack([m.a(x).relu(), m.b(x).relu()], 1)
    weights = m.select(m.squeeze(paths.sum(1).mean((2, 3), keepdim=True)).relu())
    weights = weights.view(len(x), 2, -1, 1, 1).softmax(1)
    return head(m, m.c((paths * weights).sum(1)).relu())


def test_a_plan_of_paths_that_are_weighed_can_be_executed() -> None:
    """Torch-Pruning lists an index once for each that drew it in, which is not to be counted twice."""
    torch.manual_seed(0)
    model = Net(selective, a=conv(3, 16), b=conv(3, 16), squeeze=nn.Conv2d(16, 8, 1), select=nn.Conv2d(8, 32, 1),
                c=conv(16, 8), fc=nn.Linear(8, 5)).eval()  # fmt: skip
    plan = plan_removal(model, X[:1], observed(model), "flops", 0.5)
    prune_neurons(model, X[:1], plan.removals)
    assert model(X).shape == (48, 5)
    assert plan.achieved <= 0.5


class Boxes(nn.Module):
    """As many rows as positions that stand out, which in other features are others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = conv(3, 12), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x).relu())
        return out.permute(0, 2, 3, 1)[out[:, 0] > 0.0]


def test_outputs_whose_number_depends_on_the_features_do_not_condemn_a_group() -> None:
    model = Boxes().eval()
    assert [layer.name for layer in prunable_layers(model, X[:1], Limits(), {}).layers] == ["a"]
    with torch.no_grad():
        model.a.weight[:3], model.a.bias[:3] = 0.0, -1.0
    before = model(X)
    report = remove_dead_neurons(model, X[:1], [X], min_samples=1)
    assert report.removed == {"a": [0, 1, 2]}
    assert report.max_rel_diff < 1e-4
    assert torch.allclose(model(X), before, atol=1e-5)


def test_the_check_can_be_switched_off_altogether(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a plan measures the dense model by itself."""
    calls: list[int] = []

    def counted(*_: Any) -> dict[str, str]:
        calls.append(1)
        return {}

    monkeypatch.setattr("dnr_plugin.pruning.groups.verified", counted)
    model = gated()
    for verify in (False, True):
        plan_removal(model, X[:1], observed(model), "neuron_sparsity", 0.3, limits=Limits(verify=verify))
        assert bool(calls) is verify
