"""Plans reach their targets, no more, within their limits."""

from __future__ import annotations

import copy
import functools
import math
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_pruning as tp
from helpers.every_group import HIDDEN, SIZES, Net, X, chain, conv, images, lively, plant
from torch import Tensor, nn

from dnr_plugin.dynamics.dynamics import DyingNeuronDynamics
from dnr_plugin.dynamics.timetable import Timetable
from dnr_plugin.errors import InputError, TargetError
from dnr_plugin.network.calling import kept_modes, output_difference
from dnr_plugin.network.cost import count_params, flop_report
from dnr_plugin.network.graph import build_graph
from dnr_plugin.pruning import plan as planning
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.order import COUNTED_SCOPES
from dnr_plugin.pruning.plan import Plan, check_target, plan_removal, reachable
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.pruning.targets import TARGETS, baseline, target_of
from dnr_plugin.scoring.importance import DyingNeuronImportance


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


DATA = images(48)


def _observed(model: nn.Module, **options: Any) -> DyingNeuronImportance:
    importance = DyingNeuronImportance(**options)
    with torch.no_grad(), kept_modes(model), importance.observe(model):
        model.eval()
        model(DATA)
    return importance


def _measured(kind: str, model: nn.Module, before: nn.Module, hidden: int = 0, gone: int = 0) -> float:
    if kind == "neuron_sparsity":
        return gone / hidden
    if kind == "flops":
        return flop_report(model, X).flops / flop_report(before, X).flops
    ratio = count_params(model) / count_params(before)
    return ratio if kind == "params" else 1 - ratio


@pytest.mark.parametrize("round_to", [None, 4])
@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize(
    ("kind", "value"), [("flops", 0.55), ("params", 0.5), ("neuron_sparsity", 0.35), ("weight_sparsity", 0.6)]
)
def test_targets_are_just_reached(kind: str, value: float, scope: str, round_to: int | None) -> None:
    """Planned is applied, achieved is measured, and with the last step undone the target would be missed."""
    model = lively(Net(), DATA)
    importance, dense = _observed(model), copy.deepcopy(model)
    limits = Limits(round_to=round_to)
    plan = plan_removal(model, X, importance, kind, value, scope=scope, limits=limits)
    assert plan.neurons == plan.dense_neurons == HIDDEN
    prune_neurons(model, X, plan.removals)
    model(DATA)
    assert plan.achieved == pytest.approx(_measured(kind, model, dense, HIDDEN, plan.removed), abs=1e-9)
    kept = kind in ("flops", "params")
    assert plan.achieved <= value if kept else plan.achieved >= value
    # a plan for a value between this one and the last step before it takes that step less
    for slack in (0.005, 0.02, 0.16):
        weaker = plan_removal(
            dense, X, importance, kind, value + slack if kept else value - slack, scope=scope, limits=limits
        )
        if weaker.removed < plan.removed:
            break
    fewer = copy.deepcopy(dense)
    prune_neurons(fewer, X, weaker.removals)
    assert weaker.removed < plan.removed
    reached = _measured(kind, fewer, dense, HIDDEN, weaker.removed)
    assert reached > value if kept else reached < value
    for name, gone in weaker.removals.items():
        assert set(gone) <= set(plan.removals[name])  # plans for weaker targets are beginnings of those for stronger
    sizes = {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert min(sizes.values()) >= 1
    if round_to:
        shrunk = [sizes[name] for name in plan.removals if name in sizes]
        assert shrunk
        assert all(size % round_to == 0 for size in shrunk)
    assert model.grouped[0].in_channels % 4 == model.grouped[0].out_channels % 4 == 0


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("kind", ["flops", "params", "weight_sparsity", "neuron_sparsity"])
def test_one_neuron_less_misses_the_target(kind: str, scope: str) -> None:
    """Every single neuron (or channel group offset) put back from the last layer touched misses it: exact search.

    Steps are recovered by planning for what was achieved, loosened by a hair less than one step.
    """
    model = lively(Net(), DATA)
    importance = _observed(model)
    kept = kind in ("flops", "params")
    plan = plan_removal(model, X, importance, kind, 0.5, scope=scope)
    hair = 1e-6
    again = plan_removal(model, X, importance, kind, plan.achieved, scope=scope)
    assert again.removals == plan.removals
    tighter = plan_removal(model, X, importance, kind, plan.achieved + (-hair if kept else hair), scope=scope)
    # one step more for a hair more: a single layer, a single offset
    grown = {k: len(v) - len(plan.removals.get(k, [])) for k, v in tighter.removals.items()}
    assert sum(count > 0 for count in grown.values()) == 1
    assert sum(grown.values()) in (1, 4)
    # hence ``plan`` itself is one step short of ``tighter``, whose target it misses
    assert plan.achieved > tighter.requested if kept else plan.achieved < tighter.requested


@pytest.mark.parametrize("scope", COUNTED_SCOPES)
def test_where_layers_are_ranked_against_each_other_each_keeps_a_tenth_unless_asked(scope: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU(), nn.Conv2d(40, 40, 1), nn.ReLU(), nn.Flatten(),
                          nn.Linear(40 * 64, 2))  # fmt: skip
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[2].weight.mul_(1e-3)
    magnitude = tp.importance.MagnitudeImportance(normalizer=None)

    def smallest(limits: Limits) -> int:
        try:
            plan = plan_removal(model, X, magnitude, "neuron_sparsity", 0.96, scope=scope, limits=limits)
        except TargetError as error:
            plan = error.plan
        return min(40 - len(gone) for gone in plan.removals.values())

    assert smallest(Limits(max_pruning_ratio=1.0)) < 4
    assert smallest(Limits(max_pruning_ratio=0.75)) == 10
    assert smallest(Limits()) == (smallest(Limits(max_pruning_ratio=1.0)) if scope == "local" else 4)


def test_limits_hold_over_several_steps() -> None:
    """max_pruning_ratio and min_channels refer to the dense sizes, however often one prunes."""
    model = lively(Net(), DATA)
    limits = Limits(max_pruning_ratio=0.5, min_channels=3)
    dense = baseline(model, X)
    importance = _observed(model)
    furthest = reachable(model, X, "neuron_sparsity", limits, dense)
    for value in (0.2, 0.35, furthest):
        plan = plan_removal(model, X, importance, "neuron_sparsity", value, scope="global", limits=limits, dense=dense)
        prune_neurons(model, X, plan.removals, importance=importance)
        assert plan.achieved >= value - 1e-9
        model(DATA)
    assert (model.stem[0].out_channels, model.a[0].out_channels, model.wide[0].out_channels) == (
        12,
        10,
        16,
    )  # 3 of 4 in each block
    assert model.hidden.out_features == 12
    assert model.grouped[0].out_channels == 12  # 3 of 6 in each of the four groups
    assert plan.achieved == pytest.approx(furthest)
    with pytest.raises(TargetError):
        plan_removal(model, X, importance, "neuron_sparsity", furthest + 0.01, limits=limits, dense=dense)


@pytest.mark.parametrize("pattern", ["wide.0", "wide", "w*e.?"])
def test_ignored_layers_are_left_exactly_as_they_are(pattern: str) -> None:
    """Neither their outputs nor their inputs go."""
    model = lively(Net(), DATA)
    before = copy.deepcopy(model.wide.state_dict())
    limits = Limits(ignored=[pattern])
    plan = plan_removal(model, X, _observed(model), "neuron_sparsity", 0.3, limits=limits)
    prune_neurons(model, X, plan.removals)
    after = model.wide.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    # as root, the depthwise convolution stands for the outputs of ``wide``
    assert {"grouped.0", "depthwise.0"} <= dict(plan.skipped).keys()
    assert plan.removals.keys().isdisjoint({"grouped.0", "depthwise.0"})


def test_unknown_ignored_name() -> None:
    """With the nearest name."""
    for call in (
        lambda limits: plan_removal(Net(), X, tp.importance.MagnitudeImportance(), "flops", 0.9, limits=limits),
        lambda limits: check_target(Net(), X, "flops", 0.9, limits),
        lambda limits: check_target(Net(), X, "dead", 1.0, limits),
    ):
        with pytest.raises(InputError, match=r"prune\.ignored.*'hiden'.*did you mean 'hidden'"):
            call(Limits(ignored=["hiden"]))


@pytest.mark.parametrize("kind", ["flops", "params", "neuron_sparsity", "weight_sparsity"])
def test_unreachable_targets(kind: str) -> None:
    """Told beforehand by `check_target`, and by the plan, with the value that a plan does reach."""
    model = lively(Net(), DATA)
    importance, limits = _observed(model), Limits(round_to=4, max_pruning_ratio=0.7)
    furthest = reachable(model, X, kind, limits)
    plan = plan_removal(model, X, importance, kind, furthest, scope="global", limits=limits)
    assert plan.achieved == pytest.approx(furthest, abs=1e-9)
    beyond = furthest - 0.01 if kind in ("flops", "params") else furthest + 0.01
    check_target(model, X, kind, furthest, limits)
    with pytest.raises(InputError, match=rf"prune\.target\.{kind}: expected at .* {furthest:.4f}"):
        check_target(model, X, kind, beyond, limits)
    with pytest.raises(TargetError, match="closest") as error:
        plan_removal(model, X, importance, kind, beyond, limits=limits)
    assert error.value.closest == pytest.approx(furthest, abs=1e-9)


def test_reachable_counts_what_is_not_predicted() -> None:
    """Adaptive pooling shrinks as well, by a third of the FLOPs that are left here."""
    model = nn.Sequential(conv(3, 16), conv(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    with pytest.raises(TargetError) as error:
        plan_removal(model, X, tp.importance.MagnitudeImportance(p=1), "flops", 1e-4)
    assert reachable(model, X, "flops") == pytest.approx(error.value.closest, rel=1e-12)


def test_criteria_of_torch_pruning() -> None:
    """An L1 criterion plans without observing, takes the weakest filters, and knows nothing of death."""
    model = chain(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(216, 5))
    model[1] = nn.Identity()
    with torch.no_grad():
        model[0].weight[[2, 5]] *= 1e-3
        model[3].weight[:, [2, 5]] *= 1e-3
    plan = plan_removal(model, X, tp.importance.MagnitudeImportance(p=1), "neuron_sparsity", 2 / 14, scope="global")
    assert (plan.removals, plan.dead, plan.zero) == ({"0": [2, 5]}, None, {"0": []})
    with pytest.raises(ValueError, match="DyingNeuronImportance"):
        plan_removal(model, X, tp.importance.MagnitudeImportance(p=1), "dead")


def test_latency_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured ratio below the target, and the closest one where it is out of reach."""
    model = lively(Net(), DATA)
    monkeypatch.setattr(planning, "latencies", functools.partial(planning.latencies, seconds=0.2, warmup=1))
    plan = plan_removal(model, DATA, _observed(model), "latency", 0.95, scope="global")
    assert 0 < plan.achieved <= 0.95
    assert plan.removed > 0
    prune_neurons(model, X, plan.removals)
    model(DATA)
    with pytest.raises(TargetError, match=r"latency: 0\.0001 was asked") as error:
        plan_removal(Net(), DATA, tp.importance.MagnitudeImportance(), "latency", 1e-4)
    assert 1e-4 < error.value.closest < 1.5


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_dead_target_takes_the_dead_and_no_others(scope: str) -> None:
    """Planted ones, all zero; and any other target takes them first."""
    model = lively(Net(), DATA)
    planted = plant(model, X, 0.25, seed=2)
    importance = _observed(model)
    plan = plan_removal(model, X, importance, "dead", scope=scope)
    assert plan.removals == plan.zero == planted
    assert plan.dead == plan.removed == sum(map(len, planted.values()))
    assert plan.achieved == pytest.approx(plan.removed / HIDDEN)
    more = plan_removal(model, X, importance, "neuron_sparsity", plan.achieved + 0.1, scope=scope)
    assert all(set(gone) <= set(more.removals[name]) for name, gone in planted.items())


def test_local_scope_takes_equal_shares() -> None:
    """Of every layer, to within its next channel (one in each block of grouped convolutions)."""
    model = lively(Net(), DATA)
    plan = plan_removal(model, X, _observed(model), "neuron_sparsity", 0.4, scope="local")
    assert baseline(model, X).sizes == {name: size for name, (size, _) in SIZES.items()}
    assert plan.removals.keys() == SIZES.keys()
    share = max(len(plan.removals[name]) / size for name, (size, _) in SIZES.items())
    for name, (size, blocks) in SIZES.items():
        assert 0 <= share * size - len(plan.removals[name]) <= blocks


def test_global_scope_follows_the_scores() -> None:
    """The lowest scores of the whole network go, but for what keeps layers from emptying."""
    model = nn.Sequential(conv(3, 8), conv(8, 8), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 5))
    graph = build_graph(model, X)
    scores = {"0.0": torch.arange(8.0), "1.0": torch.arange(8.0) * 10 + 3.5}
    names = {module: name for name, module in model.named_modules()}

    def importance(group: tp.dependency.Group) -> Tensor | None:
        assert group._DG is not graph
        return scores.get(names[group[0].dep.target.module])

    plan = plan_removal(model, X, importance, "neuron_sparsity", 5 / 16, scope="global")
    assert plan.removals == {"0.0": [0, 1, 2, 3], "1.0": [0]}
    plan = plan_removal(model, X, importance, "neuron_sparsity", 14 / 16, scope="global")
    assert plan.removals == {"0.0": list(range(7)), "1.0": list(range(7))}
    plan = plan_removal(model, X, importance, "neuron_sparsity", 4 / 16, scope="local")
    assert plan.removals == {"0.0": [0, 1], "1.0": [0, 1]}


def _fixed(scores: dict[str, Tensor], model: nn.Module) -> Callable[[tp.dependency.Group], Tensor | None]:
    names = {module: name for name, module in model.named_modules()}
    return lambda group: scores.get(names[group[0].dep.target.module])


def _priced() -> nn.Module:
    """Two hidden layers: a neuron of the first saves many FLOPs and few parameters, one of the second the reverse."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 60)
    )


@pytest.mark.parametrize(("kind", "value"), [("flops", 0.6), ("params", 0.7), ("weight_sparsity", 0.3)])
def test_cost_aware_scope_takes_what_is_cheapest_for_what_it_saves(kind: str, value: float) -> None:
    """Score per FLOP or per parameter, by hand; and the target is just reached."""
    model = _priced()
    scores = {"0": torch.arange(8.0) + 1.2, "2": torch.arange(8.0) * 0.5 + 0.9}
    # weights and biases; multiplications at 8 x 8 positions, and the pooling of the second layer's channels
    saved = {"0": 3 + 1 + 8, "2": 8 + 1 + 60} if kind != "flops" else {"0": 64 * (3 + 8), "2": 64 * 8 + 64 + 60}
    plan = plan_removal(model, X, _fixed(scores, model), kind, value, scope="cost_aware")
    ranked = sorted(
        (float(score) / saved[name], name, k) for name, found in scores.items() for k, score in enumerate(found)
    )
    by_hand: dict[str, list[int]] = {}
    for _, name, k in [entry for entry in ranked if entry[2] < 7][: plan.removed]:  # the last one of a layer stays
        by_hand.setdefault(name, []).append(k)
    assert plan.removals == dict(sorted(by_hand.items()))
    pruned = copy.deepcopy(model)
    prune_neurons(pruned, X, plan.removals)
    assert plan.achieved == pytest.approx(_measured(kind, pruned, model), abs=1e-9)
    fewer = plan_removal(
        model, X, _fixed(scores, model), kind, plan.achieved + (1e-3 if kind != "weight_sparsity" else -1e-3),
        scope="cost_aware",
    )  # fmt: skip
    assert fewer.removed <= plan.removed
    assert plan.achieved <= value if kind != "weight_sparsity" else plan.achieved >= value


def test_cost_aware_scope_favours_flops_or_parameters() -> None:
    """All scores alike: the target says which layer goes."""
    model = _priced()
    scores = {"0": torch.ones(8), "2": torch.ones(8)}
    flops = plan_removal(model, X, _fixed(scores, model), "flops", 0.9, scope="cost_aware")
    params = plan_removal(model, X, _fixed(scores, model), "params", 0.9, scope="cost_aware")
    assert flops.removals.keys() == {"0"}
    assert params.removals.keys() == {"2"}


def test_cost_aware_scope_ranks_neurons_for_themselves_as_global_does() -> None:
    model = lively(Net(), DATA)
    importance = _observed(model)
    for value in (0.1, 0.4):
        found, expected = (
            plan_removal(model, X, importance, "neuron_sparsity", value, scope=scope)
            for scope in ("cost_aware", "global")
        )
        assert found.removals == expected.removals


def test_cost_aware_scope_takes_the_dead_first() -> None:
    model = lively(Net(), DATA)
    planted = plant(model, X, 0.25, 3)
    plan = plan_removal(model, X, _observed(model), "flops", 0.5, scope="cost_aware")
    assert all(set(gone) <= set(plan.removals.get(name, [])) for name, gone in planted.items())


def test_statistics_follow() -> None:
    """A second plan needs no second observation, and ranks what is left as the first did."""
    model = lively(Net(), DATA)
    importance = _observed(model, score="variation", share=1.0)  # redundancy is another once some are gone
    dense = baseline(model, X)
    whole = plan_removal(model, X, importance, "neuron_sparsity", 0.5, scope="local", dense=dense)
    kept = {name: list(range(size)) for name, size in dense.sizes.items()}
    gone: dict[str, list[int]] = {name: [] for name in kept}
    for value in (0.2, 0.5):
        plan = plan_removal(model, X, importance, "neuron_sparsity", value, scope="local", dense=dense)
        prune_neurons(model, X, plan.removals, importance=importance)
        for name, neurons in plan.removals.items():
            gone[name] += [kept[name][k] for k in neurons]
            kept[name] = [n for k, n in enumerate(kept[name]) if k not in neurons]
    plan_removal(model, X, importance, "dead", dense=dense)  # statistics are carried over when they are next read
    for name, activity in importance.observer.activities.items():
        module = model.get_submodule(name)
        assert activity.channels == getattr(module, "in_channels", getattr(module, "in_features", None))
    # variation weighs consumers' weights, which shrank between the steps: the same neurons but for a few
    overlap = sum(len(set(gone[name]) & set(whole.removals[name])) for name in kept)
    assert overlap >= 0.85 * whole.removed
    assert plan.achieved >= 0.5


def test_folding_keeps_outputs_closer() -> None:
    """Where means are large."""
    errors = {}
    for fold in (True, False):
        model = lively(chain(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(216, 5)), DATA)
        with torch.no_grad():
            model[1].bias.fill_(5.0)
            before = model(DATA)
        importance = _observed(model)
        plan = plan_removal(model, X, importance, "neuron_sparsity", 0.3)
        folded = prune_neurons(model, X, plan.removals, importance=importance, fold=fold)
        assert folded == (2 if fold else 0)
        with torch.no_grad():
            errors[fold] = output_difference([before], [model(DATA)])[1]
    assert errors[True] < 0.5 * errors[False]
    with pytest.raises(ValueError, match="expected an importance"):
        prune_neurons(model, X, {}, fold=True)


def test_no_prunable_layer() -> None:
    """A single layer is all outputs."""
    with pytest.raises(InputError, match="at least one layer"):
        plan_removal(nn.Sequential(nn.Conv2d(3, 4, 3)), X, tp.importance.MagnitudeImportance(), "flops", 0.5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "flop"}, "kind: .*did you mean 'flops'"),
        ({"kind": "flops", "scope": "globl"}, "scope: .*did you mean 'global'"),
        ({"kind": "dead"}, "needs a DyingNeuronImportance"),
    ],
)
def test_unknown_arguments(options: dict[str, str], match: str) -> None:
    """A ValueError with the nearest name."""
    with pytest.raises(ValueError, match=match):
        plan_removal(Net(), X, tp.importance.MagnitudeImportance(), **options)
    assert set(TARGETS) == {"flops", "params", "latency", "neuron_sparsity", "weight_sparsity", "dead"}


def test_emptying_a_layer_is_refused() -> None:
    """By name, before it is touched."""
    model = Net()
    with pytest.raises(RuntimeError, match=r"^a\.0: removing 20 neurons"):
        prune_neurons(model, X, {"a.0": list(range(20))})
    assert model.a[0].out_channels == 20


class ConcatGrouped(nn.Module):
    """Two layers whose outputs are different channel groups of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 16, 1, groups=2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(torch.cat([self.a(x), self.b(x)], 1).relu()).relu().mean((2, 3)))


def test_channel_groups_that_several_layers_share_are_left_alone() -> None:
    """Neither layer alone can shrink both channel groups alike."""
    model = ConcatGrouped()
    plan = plan_removal(model, X, tp.importance.MagnitudeImportance(p=1), "neuron_sparsity", 0.2)
    assert set(plan.removals) == {"c"}
    assert {"a", "b"} <= dict(plan.skipped).keys()
    prune_neurons(model, X, plan.removals)
    model(DATA)


def test_weight_sparsity_is_measured() -> None:
    """Also with parameters that no prediction covers: PReLU has one for each channel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.PReLU(16), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(512, 2))
    before = count_params(model)
    plan: Plan = plan_removal(model, X, tp.importance.MagnitudeImportance(p=1), "weight_sparsity", 0.4)
    prune_neurons(model, X, plan.removals)
    assert plan.achieved == pytest.approx(1 - count_params(model) / before)
    assert math.isclose(plan.requested, 0.4)


@pytest.mark.parametrize("kind", ["flops", "weight_sparsity"])
@pytest.mark.parametrize("power", [0.2, 0.8, 1.0, 1.1, 3.0])
def test_search_finds_the_first_step_whatever_is_predicted(kind: str, power: float) -> None:
    """Costs that fall faster or slower than predicted: the step before misses the target, always."""
    kept, steps = kind == "flops", 400
    for seed in range(50):
        draw = random.Random(seed)
        true = sorted((draw.random() for _ in range(steps)), reverse=kept)
        predicted = [1 - (1 - value) ** power if kept else value**power for value in true]
        value = draw.uniform(min(true), max(true))
        measured: list[int] = []

        def measure(count: int, true: list[float] = true, measured: list[int] = measured) -> float:
            measured.append(count)
            return true[count]

        count, achieved = planning._first_reached(target_of(kind, value), predicted, measure)
        assert achieved == true[count]
        assert achieved <= value if kept else achieved >= value
        assert count == 0 or (true[count - 1] > value if kept else true[count - 1] < value)
        assert len(measured) == len(set(measured)) <= (1 if power == 1.0 else 3 * math.log2(steps))


def test_what_is_zero_in_one_block_alone_is_not_taken_on_its_own() -> None:
    """Channel groups must stay equally wide, also while the exact part of a plan is carried out first."""
    model = lively(Net(), DATA)
    with torch.no_grad():
        for tensor in (model.grouped[0].weight, model.grouped[1].weight, model.grouped[1].bias):
            tensor[[0, 1, 7, 13, 19]] = 0.0  # offset 0 in one block, offset 1 in all four
    plan = plan_removal(model, X, _observed(model), "neuron_sparsity", 0.4)
    assert plan.zero["grouped.0"] == [1, 7, 13, 19]
    prune_neurons(model, X, plan.zero)
    assert model(X).shape == (1, 5)


def test_dead_neurons_that_limits_keep_are_named() -> None:
    model = lively(Net(), DATA)
    planted = plant(model, X, 0.25, seed=2)
    plan = plan_removal(model, X, _observed(model), "dead", limits=Limits(round_to=8))
    stay = {name: len(gone) - len(plan.removals.get(name, [])) for name, gone in planted.items()}
    assert any(stay.values())
    assert {name: reason.split()[0] for name, reason in plan.skipped if "dead neurons stay" in reason} == {
        name: str(number) for name, number in stay.items() if number
    }


class Fourier(nn.Module):
    """Multiplies matrices by an operator that nobody counts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.fft.rfft2(self.net(x)).abs().mean((2, 3)))
        return out


def test_a_target_of_flops_names_what_they_lack() -> None:
    """Once, by whoever measures the dense model; other targets do not ask."""
    model, magnitude = Fourier(), tp.importance.MagnitudeImportance()
    for act in (
        lambda: plan_removal(model, X, magnitude, "flops", 0.6),
        lambda: check_target(model, X, "flops", 0.6, Limits()),
        lambda: DyingNeuronDynamics(model, X, when=Timetable(2, until=20, warmup=2), kind="flops", value=0.6),
    ):
        with pytest.warns(UserWarning, match="FLOPs") as caught:
            act()
        (message,) = [str(w.message) for w in caught if "FLOPs" in str(w.message)]
        assert "lack aten::fft_rfft2: " in message
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*FLOPs")
        plan_removal(model, X, magnitude, "params", 0.6)
        plan_removal(model, X, magnitude, "flops", 0.6, dense=baseline(model, X))
        plan_removal(Net(), X, magnitude, "flops", 0.6)
        flop_report(model, X)


class Reader(nn.Module):
    """Convolutions, then a recurrent layer over the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.rnn, self.out = nn.LSTM(12, 24, 2, bidirectional=True, batch_first=True), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.rnn(self.net(x).mean(2).transpose(1, 2))[0])
        return out


def test_a_target_of_flops_counts_recurrent_layers() -> None:
    """What they cost is most of this network, and stays."""
    model = Reader()
    before = flop_report(model, X)
    plan = plan_removal(model, X, tp.importance.MagnitudeImportance(), "flops", 0.9, scope="cost_aware")
    prune_neurons(model, X, plan.removals)
    after = flop_report(model, X)
    assert after.flops / before.flops == pytest.approx(plan.achieved)
    assert 0.8 < plan.achieved <= 0.9
    lstm = {layer.name: layer.flops for layer in after.layers}["rnn"]
    width, steps = model.rnn.input_size, X.shape[3]
    assert lstm == steps * 2 * 96 * ((width + 24) + (48 + 24))
