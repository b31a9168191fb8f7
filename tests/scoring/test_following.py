"""Statistics follow the channels that pruners keep, from step to step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch_pruning as tp
from helpers.importance import (
    BLOCKS,
    USES,
    groups,
    in_steps,
    inputs,
    numpy_norms,
    observed,
    plant,
    pruner,
    surviving_inputs,
    tag,
    tags,
    widths,
)
from helpers.networks import NETS, images, make
from torch import Tensor, nn

from dnr_plugin.scoring.importance import DyingNeuronImportance

pytestmark = pytest.mark.filterwarnings("ignore:.*is left alone.*")


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("how", ["step", "interactive", "idxs", "new pruner"])
@pytest.mark.parametrize("name", NETS)
def test_statistics_follow_through_three_steps(name: str, how: str, scope: str) -> None:
    """At each step the statistics are the original ones, re-sliced at the channels that the weights say are left.

    And those left at the end are, in local scope, exactly those with the highest planted values.
    """
    model = make(name)
    importance = observed(model, score="magnitude")
    generator = torch.Generator().manual_seed(7)
    plant(importance, lambda _, n: (torch.randperm(n, generator=generator) + 1.0) / n)
    original = copy.deepcopy(importance.observer.activities)
    tag(model)
    before = {n: m for n, m in model.named_modules() if n in original}
    for _ in in_steps(model, importance, how, global_pruning=scope == "global", ignored_layers=[model.fc]):
        for root, group in groups(model):  # scoring makes the statistics follow
            if root != "fc":
                importance(group)
        for consumer, activity in importance.observer.activities.items():
            left = tags(before[consumer])
            assert activity.channels == len(left)
            for statistic in activity.REDUCTIONS:
                assert torch.equal(getattr(activity, statistic), getattr(original[consumer], statistic)[left])
    assert sum(m.weight.shape[1] for m in before.values()) < sum(a.channels for a in original.values())
    model(images())
    if scope == "global" or how == "new pruner":
        return
    for roots, consumers in USES[name].items():
        value = np.max(
            [[float(original[c].mean_magnitude[k].mean()) for k in channels] for c, channels in consumers.items()], 0
        )
        blocks = BLOCKS.get((name, roots[0]), 1)
        size = len(value) // blocks
        best = np.argsort(value.reshape(blocks, size).mean(0), kind="stable")[-int(size * 0.5) :]
        survivors = sorted(b * size + k for b in range(blocks) for k in best)
        for consumer, channels in consumers.items():
            expected = {k for neuron in survivors for k in channels[neuron]}
            others = {k for other in USES[name].values() for c in other.get(consumer, []) for k in c}
            own = {k for c in channels for k in c}
            assert set(tags(before[consumer])) & own == expected
            assert own <= others


@pytest.mark.parametrize("name", NETS)
def test_scores_after_a_step_are_those_of_the_survivors(name: str) -> None:
    """Contribution after a step, without observing again, from the activations of the dense model in NumPy."""
    model, x = make(name), images(16)
    importance, seen = observed(model, x, normalizer=None), inputs(model, x)
    dense = copy.deepcopy(model)
    pruner(model, importance, 0.34, ignored_layers=[model.fc]).step()
    for root, group in groups(model):
        if root == "fc":
            continue
        found = importance(group).numpy()
        total = np.zeros(len(found))
        for use in importance.evidence(group):
            consumer = next(n for n, m in model.named_modules() if m is use.use.module)
            a, full = seen[consumer], dense.get_submodule(consumer)
            left = surviving_inputs(full, use.use.module)
            value = np.abs(a).mean((0, 2))[left] * numpy_norms(use.use.module)
            np.add.at(total, use.use.neurons.numpy(), value[use.use.channels.numpy()])
        ours = found < 1e29
        np.testing.assert_allclose(found[ours], total[ours], rtol=1e-5)


def test_a_step_in_which_not_every_group_is_pruned() -> None:
    model = make("concat")
    importance = observed(model)
    original = copy.deepcopy(importance.observer.activities)
    tag(model)
    prune = pruner(model, importance, 0.5, ignored_layers=[model.fc])
    for index, group in enumerate(prune.step(interactive=True)):
        if index == 1:
            group.prune()
    for root, group in groups(model):
        if root != "fc":
            importance(group)
    for consumer, activity in importance.observer.activities.items():
        assert torch.equal(activity.total, original[consumer].total[tags(model.get_submodule(consumer))])


@pytest.mark.parametrize("scored", [True, False])
def test_surgery_that_was_not_recorded_is_an_error(scored: bool) -> None:
    model = make("plain")
    importance = observed(model)
    if scored:
        for _, group in groups(model):
            importance(group)
    tp.prune_conv_out_channels(model.b, [1])
    tp.prune_conv_in_channels(model.c, [1])
    with pytest.raises(RuntimeError, match=r"statistics of c describe 8 input channels, but it has 7 now.*observe"):
        importance(dict(groups(model))["b"])
    with torch.no_grad(), importance.observe(model):
        model(images())
    assert len(importance(dict(groups(model))["b"])) == 7


def test_scoring_before_observing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nothing was observed yet"):
        DyingNeuronImportance()(dict(groups(make("plain")))["b"])


def test_observing_again_between_steps() -> None:
    model = make("residual")
    importance = DyingNeuronImportance("contribution", share=1.0)
    prune = pruner(model, importance, 0.5, iterative_steps=2, ignored_layers=[model.fc])
    for _ in range(2):
        with torch.no_grad(), importance.observe(model):
            model(images())
        prune.step()
    assert widths(model) == {"stem": 4, "a1": 4, "a2": 4, "b1": 4, "b2": 4, "fc": 5}


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, copy.deepcopy], ids=["same", "wrapped", "copied"])
def test_a_model_is_known_by_its_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Observed as it is, then copied or wrapped, then pruned."""
    model = make("residual")
    importance = observed(model)
    other = wrap(model)
    pruner(other, importance, 0.5, ignored_layers=[m for n, m in other.named_modules() if n.endswith("fc")]).step()
    assert {name.removeprefix("module."): width for name, width in widths(other).items()} == {
        "stem": 4, "a1": 4, "a2": 4, "b1": 4, "b2": 4, "fc": 5,
    }  # fmt: skip
    other(images())


def test_a_model_with_a_part_called_module_works() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.module = nn.Conv2d(3, 8, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.module(self.a(x))

    model = Outer()
    importance = observed(model)
    pruner(model, importance, 0.5, ignored_layers=[model.module]).step()
    assert model.a.out_channels == 4
    assert len(importance(dict(groups(model))["a"])) == 4
