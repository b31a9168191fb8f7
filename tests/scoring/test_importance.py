"""Scores against NumPy, and the traps of Torch-Pruning's pruners, each set for a naive criterion first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from helpers.importance import (
    RISING,
    USES,
    Naive,
    groups,
    inputs,
    kill,
    numpy_scores,
    observed,
    plant,
    planted,
    pruner,
    removed,
    widths,
)
from helpers.networks import NETS, Grouped, Plain, images, make
from torch import Tensor, nn

from dnr_plugin.network.graph import build_graph
from dnr_plugin.scoring.importance import DyingNeuronImportance
from dnr_plugin.scoring.scores import SCORES

pytestmark = pytest.mark.filterwarnings("ignore:.*is left alone.*")


@pytest.mark.parametrize("normalizer", ["mean", "max", None])
@pytest.mark.parametrize("score", SCORES)
def test_dead_neurons_come_first(score: str, normalizer: str | None) -> None:
    model = make("plain")
    kill(model.b, [2, 5])
    kill(model.c, [1, 6, 7])
    importance = observed(model, score=score, normalizer=normalizer)
    found = {root: importance(group) for root, group in groups(model)}
    seen = inputs(model, images())
    never = {"a": seen["b"], "b": seen["c"], "c": seen["fc"].reshape(8, 8, 4)}
    dead = {root: set(np.flatnonzero(a.max((0, 2)) <= 0).tolist()) for root, a in never.items()}
    assert dead["b"] >= {2, 5}
    assert dead["c"] >= {1, 6, 7}
    highest_dead, lowest_live = 0.0, float("inf")
    for root, gone in dead.items():
        assert set(found[root].argsort()[: len(gone)].tolist()) == gone
        highest_dead = max([highest_dead, *found[root][list(gone)].tolist()])
        lowest_live = min([lowest_live, *found[root][[k for k in range(8) if k not in gone]].tolist()])
    assert highest_dead < lowest_live


def test_dead_at_one_consumer_only_is_not_dead() -> None:
    """A residual stream's neuron that is silent behind the stem, but not behind the first block."""
    model = make("residual")
    kill(model.stem, [3])
    importance = observed(model)
    group = next(g for _, g in groups(model) if len(g[0].idxs) == 8 and importance.evidence(g).__len__() == 3)
    verdict = importance.verdict(group)
    assert not importance.observer.activities["b1"].silent[3]
    assert importance.observer.activities["a1"].zero[3]
    assert not verdict.dead[3]
    kill(model.a2, [3])
    kill(model.b2, [3])
    verdict = observed(model).verdict(next(g for _, g in groups(model) if len(g) == len(group)))
    assert verdict.zero.tolist() == verdict.dead.tolist() == [k == 3 for k in range(8)]


@pytest.mark.parametrize("alive", ["tied", "dead", "half"])
@pytest.mark.parametrize("normalizer", ["mean", "max", None])
@pytest.mark.parametrize("name", NETS)
def test_scores_are_finite_positive_and_distinct(name: str, normalizer: str | None, alive: str) -> None:
    """Over the whole network, when everything is tied, everything dead, or half of it; the same each time."""
    model = make(name)
    for score in SCORES:
        importance = observed(model, score=score, normalizer=normalizer)
        for module in model.modules():  # ties in the weights as well
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.data.fill_(0.5)
        plant(
            importance,
            lambda _, n: {"tied": torch.ones(n), "dead": torch.zeros(n), "half": (torch.arange(n) % 2).float()}[alive],
        )
        found = [importance(group) for root, group in groups(model) if root != "fc"]
        again = [importance(group) for root, group in groups(model) if root != "fc"]
        together = torch.cat(found)
        assert torch.equal(together, torch.cat(again))
        assert together.dtype == torch.float64
        assert torch.isfinite(together).all()
        assert (together > 0).all()
        assert len(together.unique()) == len(together)


def test_a_normalizer_that_divides_by_zero_gives_no_nan() -> None:
    """A function of the caller's own, in a layer whose consumer has no weights left."""
    model = make("plain")
    importance = observed(model, normalizer=lambda score: score / score.mean())
    model.c.weight.data.zero_()
    found = importance(dict(groups(model))["b"])
    assert torch.isfinite(found).all()
    assert (found > 0).all()


def test_partial_groups_are_scored_by_their_own_indices() -> None:
    model = make("plain")
    importance = observed(model, normalizer=None)
    whole = importance(dict(groups(model))["c"])
    graph = build_graph(model, images(1))
    part = importance(graph.get_pruning_group(model.c, tp.prune_conv_out_channels, [6, 2, 3]))
    seen = inputs(model, images())
    expected = numpy_scores("contribution", "plain", "c", model, seen)
    assert len(whole) == 8
    np.testing.assert_allclose(part, expected[[6, 2, 3]], rtol=1e-5)


def test_a_live_neuron_of_score_zero_stays_above_the_dead() -> None:
    """One that fired only in samples that the share leaves out, against one that never fired."""
    model = make("plain")
    importance = observed(model, score="magnitude", normalizer=None)
    plant(importance, lambda _, n: (torch.arange(n) > 1).float())
    importance.observer.activities["c"].fired_samples[0] = 1
    found = importance(dict(groups(model))["b"])
    assert found[1] < 1e-6 * found[0] < 1e-6 * found[2:].min()


def test_trap_ties_in_global_mode_remove_exactly_what_was_asked() -> None:
    """7 of 24 tie at zero and 6 are asked: a naive criterion removes 7."""
    values = {"a": [0.0] * 7 + [1.0], "b": RISING, "c": RISING}
    naive, ours = make("plain"), make("plain")
    pruner(naive, Naive(naive, values), 0.25, global_pruning=True, ignored_layers=[naive.fc]).step()
    assert removed(naive) == {"a": 7, "b": 0, "c": 0}
    pruner(ours, planted(ours, values), 0.25, global_pruning=True, ignored_layers=[ours.fc]).step()
    assert removed(ours) == {"a": 6, "b": 0, "c": 0}


@pytest.mark.parametrize("quota", range(1, 21))
def test_trap_ties_everywhere(quota: int) -> None:
    """All 24 neurons alike: naive, all or nothing; ours, as many as asked, until each layer is at its last."""
    values = {"a": [1.0] * 8, "b": [1.0] * 8, "c": [1.0] * 8}
    model = make("plain")
    pruner(model, planted(model, values), quota / 24, global_pruning=True, ignored_layers=[model.fc]).step()
    assert sum(removed(model).values()) == 24 - int(24 * (1 - quota / 24))  # as Torch-Pruning rounds


def test_trap_a_layer_below_the_threshold_is_shrunk_and_not_kept_whole() -> None:
    """All of layer a is below the threshold: a naive criterion leaves it whole, in silence."""
    values = {"a": [0.01 * v for v in RISING], "b": RISING, "c": RISING}
    naive, ours = make("plain"), make("plain")
    pruner(naive, Naive(naive, values), 8 / 24, global_pruning=True, ignored_layers=[naive.fc]).step()
    assert removed(naive) == {"a": 0, "b": 0, "c": 0}
    pruner(ours, planted(ours, values), 8 / 24, global_pruning=True, ignored_layers=[ours.fc]).step()
    assert removed(ours)["a"] == 7
    assert sum(removed(ours).values()) == 8
    ours = make("plain")
    importance = planted(ours, values, min_channels=3)
    pruner(ours, importance, 8 / 24, global_pruning=True, ignored_layers=[ours.fc]).step()
    assert removed(ours)["a"] == 5


@pytest.mark.parametrize("steps", [1, 3])
def test_trap_max_pruning_ratio_is_held_within_a_step(steps: int) -> None:
    values = {"a": [0.01 * v for v in RISING], "b": RISING, "c": RISING}
    naive, ours = make("plain"), make("plain")
    options = {"global_pruning": True, "max_pruning_ratio": 0.5, "iterative_steps": steps}
    step = pruner(naive, Naive(naive, values), 7 / 24, ignored_layers=[naive.fc], **{**options, "iterative_steps": 1})
    step.step()
    assert removed(naive)["a"] == 7  # of at most 4
    step = pruner(ours, planted(ours, values, max_pruning_ratio=0.5), 7 / 24, ignored_layers=[ours.fc], **options)
    for _ in range(steps):
        step.step()
    assert removed(ours)["a"] == 4
    assert sum(removed(ours).values()) == 7


def test_asking_for_more_than_there_is() -> None:
    """No score can stop a pruner from taking what must stay then; a layer is still never emptied."""
    values = {"a": [0.01 * v for v in RISING], "b": RISING, "c": RISING}
    model = make("plain")
    importance = planted(model, values, max_pruning_ratio=0.5)
    pruner(model, importance, 12 / 24, global_pruning=True, ignored_layers=[model.fc]).step()
    assert removed(model) == {"a": 4, "b": 4, "c": 4}  # all there is
    model = make("plain")
    importance = planted(model, values, max_pruning_ratio=0.5)
    pruner(model, importance, 18 / 24, global_pruning=True, ignored_layers=[model.fc]).step()
    assert all(4 <= gone < 8 for gone in removed(model).values())
    assert sum(removed(model).values()) == 18


@pytest.mark.parametrize("normalizer", ["mean", "max"])
def test_trap_a_dead_layer_goes_before_live_ones(normalizer: str) -> None:
    """Torch-Pruning's own normaliser makes NaN of a dead layer, which protects it: live layers pay."""

    class Rate(tp.importance.MagnitudeImportance):
        def __call__(self, group: tp.dependency.Group) -> Tensor | None:
            return None if (value := naive_values(group)) is None else self._normalize(value, "mean")

    values = {"a": RISING, "b": [0.0] * 8, "c": RISING}
    naive, ours = make("plain"), make("plain")
    naive_values = Naive(naive, values)
    pruner(naive, Rate(), 7 / 24, global_pruning=True, ignored_layers=[naive.fc]).step()
    assert removed(naive)["b"] == 0
    assert sum(removed(naive).values()) > 0
    importance = planted(ours, values, normalizer=normalizer)
    assert torch.isfinite(importance(dict(groups(ours))["b"])).all()
    pruner(ours, importance, 7 / 24, global_pruning=True, ignored_layers=[ours.fc]).step()
    assert removed(ours) == {"a": 0, "b": 7, "c": 0}


def test_trap_state_is_not_shared_between_models() -> None:
    """One importance used for two models of the same names gives what a fresh one gives for the second."""

    def result(importance: DyingNeuronImportance, model: nn.Module) -> dict[str, int]:
        with torch.no_grad(), importance.observe(model):
            model(images())
        pruner(model, importance, 0.5, global_pruning=True, ignored_layers=[model.fc]).step()
        model(images())
        return widths(model)

    used = DyingNeuronImportance(max_pruning_ratio=0.5)
    for width, groups_ in ((12, 3), (24, 2), (6, 2)):
        torch.manual_seed(width)
        model = Grouped(width, groups_)
        assert result(used, copy.deepcopy(model)) == result(DyingNeuronImportance(max_pruning_ratio=0.5), model)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pruning": True},
        {"global_pruning": True, "isomorphic": True},
        {"round_to": 2},
        {"global_pruning": True, "iterative_steps": 2},
    ],
    ids=["local", "global", "isomorphic", "round_to", "iterative"],
)
def test_every_mode_of_the_base_pruner(name: str, options: dict[str, Any]) -> None:
    model = make(name)
    importance = observed(model)
    prune = pruner(model, importance, 0.5, ignored_layers=[model.fc], **options)
    before = sum(widths(model).values())
    for _ in range(options.get("iterative_steps", 1)):
        prune.step()
    assert sum(widths(model).values()) < before
    assert model(images()).shape == (8, 5)


@pytest.mark.parametrize(
    "kind", [tp.pruner.BasePruner, tp.pruner.GroupNormPruner, tp.pruner.BNScalePruner, tp.pruner.GrowingRegPruner]
)
@pytest.mark.parametrize("global_pruning", [True, False])
def test_every_pruner_that_takes_an_importance(kind: Any, global_pruning: bool) -> None:
    """Including its regularisation, which scores groups as well, over two steps."""
    model = make("plain")
    importance = observed(model)
    prune = pruner(
        model, importance, 0.5, kind, iterative_steps=2, global_pruning=global_pruning, ignored_layers=[model.fc]
    )
    for _ in range(2):
        prune.update_regularizer()
        model.train()
        model(images()).sum().backward()
        if kind is not tp.pruner.BasePruner:  # which has none
            prune.regularize(model)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        prune.step()
        model.eval()
    assert sum(removed(model).values()) == 12
    assert model(images()).shape == (8, 5)


def test_growing_regularisation_updates() -> None:
    model = make("plain")
    prune = pruner(model, observed(model), 0.5, tp.pruner.GrowingRegPruner, ignored_layers=[model.fc])
    prune.update_reg()
    assert all(torch.isfinite(r).all() for r in prune.group_reg.values())


@pytest.mark.filterwarnings("default:.*is left alone.*")
def test_outputs_are_skipped_by_name_with_one_warning() -> None:
    """Not scored zero, which would take them first."""
    model = make("plain")
    importance = observed(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prune = pruner(model, importance, 0.5, iterative_steps=2)
        prune.step()
        prune.step()
    told = [str(w.message) for w in caught if "left alone" in str(w.message)]
    assert told == [f"fc is left alone: {importance.skipped['fc']}"]
    assert "outputs of the model" in importance.skipped["fc"]
    assert model.fc.out_features == 5
    assert removed(model) == {"a": 4, "b": 4, "c": 4}


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux, self.c = (nn.Conv2d(i, 8, 1) for i in (3, 8, 8, 8))
        self.both = False

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        y = self.c(F.relu(self.b(x)))
        return (y, self.aux(x)) if self.both else y


def test_a_consumer_that_was_not_called_is_named() -> None:
    model = Auxiliary()
    importance = observed(model)
    model.both = True
    found = {root: importance(group) for root, group in groups(model)}
    assert importance.skipped["a"] == "aux, which reads its neurons, was not called while the model was observed"
    assert found["a"] is None
    assert len(found["b"]) == 8
    with torch.no_grad(), importance.observe(model):
        model(images())
    assert len(importance(dict(groups(model))["a"])) == 8
    assert "a" not in importance.skipped


def test_a_consumer_outside_the_observed_model_is_named() -> None:
    model = make("plain")
    importance = observed(nn.Sequential(model.a, nn.ReLU(), model.b))
    assert importance(dict(groups(model))["a"]) is None
    assert "not part of the observed model" in importance.skipped["a"]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(self.embed(x)).mean(1))


@pytest.mark.parametrize("heads", [True, False])
def test_attention(heads: bool) -> None:
    """Inner features are pruned; attention reads the residual stream too; every group is scored or named."""
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(16, 5, 4)
    importance = observed(model, x)
    found = {root: importance(group) for root, group in groups(model, x)}
    unscored = {root for root, value in found.items() if value is None}
    assert unscored == set(importance.skipped) == {"fc"}
    stream = next(g for root, g in groups(model, x) if len(found[root] if found[root] is not None else []) == 8)
    assert "layer.self_attn" in {
        importance._followed[stream._DG].names[e.use.module] for e in importance.evidence(stream)
    }
    prune = tp.pruner.BasePruner(
        model, x, importance, pruning_ratio=0.5, ignored_layers=[model.fc], in_channel_groups={},
        out_channel_groups={}, num_heads={model.layer.self_attn: 2} if heads else {},
    )  # fmt: skip
    prune.step()
    assert model.layer.linear1.out_features == 8
    assert model(x).shape == (16, 3)


def test_plain_is_what_the_tables_say() -> None:
    assert list(widths(Plain())) == ["a", "b", "c", "fc"]
    assert set(USES) == set(NETS)


@pytest.mark.parametrize(
    "make_pruner", [tp.pruner.GroupNormPruner, tp.pruner.GrowingRegPruner, tp.pruner.BNScalePruner]
)
def test_sparse_training_asks_for_the_classifier_as_well(make_pruner: Callable[..., Any]) -> None:
    """Where a pruner asks for a penalty, None would be an error; the classifier's weights are left alone by it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    x = torch.randn(16, 3, 12, 12)
    importance = DyingNeuronImportance()
    with importance.observe(model.eval()), torch.no_grad():
        model(x)
    pruner = make_pruner(model, x[:1], importance=importance, pruning_ratio=0.5)
    model.train()
    for name in ("update_regularizer", "update_reg"):
        getattr(pruner, name, lambda: None)()
    model(x).square().mean().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    pruner.regularize(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    changed = {name for name, g in gradients.items() if not torch.equal(g, before[name])}
    assert changed
    assert "7.bias" not in changed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner.step()
    assert [model[0].out_channels, model[3].out_channels, model[7].out_features] == [4, 4, 5]
    assert model(x).shape == (16, 5)
