"""What became of neurons while their network trained, as a prior of their scores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from helpers.networks import images, make
from helpers.whole_runs import Killed, assert_same, lasting, stopping_after
from torch import nn

from dnr_plugin.errors import InputError
from dnr_plugin.network.graph import build_graph
from dnr_plugin.observation.history import NeuronHistory
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.pruning.targets import Target
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.runs import removal_stage
from dnr_plugin.runs.run import run_recipe
from dnr_plugin.runs.state import RunState
from dnr_plugin.scoring.importance import DyingNeuronImportance

pytestmark = pytest.mark.filterwarnings("ignore:.*is left alone.*")


def past(neurons: int, dead: dict[int, int], checks: int = 9) -> NeuronHistory:
    """Neurons that were dead at the first so many checks, and each tagged by its histogram."""
    history = NeuronHistory(neurons, 4)
    tags = torch.arange(neurons)[:, None].expand(-1, 4) + 1
    for number in range(checks):
        history.update(torch.tensor([dead.get(k, 0) > number for k in range(neurons)]), tags)
    return history


def observed(model: nn.Module, **settings: Any) -> DyingNeuronImportance:
    importance = DyingNeuronImportance("contribution", normalizer=None, moments=False, share=1.0, **settings)
    with torch.no_grad(), importance.observe(model):
        model(images(16))
    return importance


def group_of(model: nn.Module, layer: nn.Module) -> tp.dependency.Group:
    graph = build_graph(model, images(1))
    return next(group for group in graph.get_all_groups() if group[0].dep.target.module is layer)


@pytest.mark.parametrize("prior", [0.5, 2.0])
def test_scores_count_by_the_share_of_checks_alive(prior: float) -> None:
    model = make("plain")
    plain = observed(model)(group_of(model, model.b))
    assert plain is not None
    lowest = plain.argsort()[:7]  # the best is out of reach in any case
    histories = {"b": past(8, {int(lowest[3]): 9, int(lowest[5]): 4})}
    found = observed(model, histories=histories, prior=prior)(group_of(model, model.b))
    assert found is not None
    expected = histories["b"].alive_share[lowest] ** prior * plain[lowest]
    torch.testing.assert_close(found[lowest], expected, rtol=1e-6, atol=0)
    assert (expected / plain[lowest]).min() == pytest.approx(0.1**prior)


def test_layers_without_a_past_and_a_prior_of_zero_change_nothing() -> None:
    model = make("plain")
    for settings in ({"histories": {"a": past(8, {0: 9})}, "prior": 1.0}, {"histories": {"b": past(8, {0: 9})}}):
        scores = [importance(group_of(model, model.b)) for importance in (observed(model), observed(model, **settings))]
        assert torch.equal(*scores)


def test_histories_follow_two_steps_of_a_pruner() -> None:
    model = make("residual")  # the root of the stream's group is b2
    histories = {"b2": past(8, {2: 9, 5: 9}), "a1": past(8, {1: 9}), "b1": past(8, {})}
    importance = observed(model, histories=histories, prior=8.0)
    before = model.a1.weight.detach().clone()
    pruner = tp.pruner.BasePruner(
        model, images(1), importance, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[model.fc],
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    )  # fmt: skip
    for _ in range(2):
        pruner.step()
        for layer in histories:
            importance(group_of(model, getattr(model, layer)))
            left = importance.histories[layer]
            assert len(left.dead) == getattr(model, layer).out_channels
        kept = importance.histories["a1"].histogram[:, 0] - 1  # the tags
        inputs = importance.histories["b2"].histogram[:, 0] - 1
        torch.testing.assert_close(model.a1.weight.detach(), before[kept][:, inputs])
    assert {2, 5}.isdisjoint(inputs.tolist()) and 1 not in kept.tolist()
    assert [len(history.dead) for history in histories.values()] == [8, 8, 8]  # the caller's own


def test_trials_leave_histories_as_they_are() -> None:
    model = make("plain")
    importance = observed(model, histories={"b": past(8, {1: 9})}, prior=1.0)
    with importance.unchanged():
        plan = plan_removal(model, images(1), importance, "neuron_sparsity", 0.3)
        prune_neurons(copy.deepcopy(model), images(1), plan.removals, importance=importance)
        assert len(importance.histories["b"].dead) < 8
    assert len(importance.histories["b"].dead) == 8
    prune_neurons(model, images(1), plan.removals, importance=importance)
    assert len(importance.histories["b"].dead) == model.b.out_channels


def test_a_past_of_another_network_is_an_error() -> None:
    model = make("plain")
    importance = observed(model, histories={"b": past(7, {})}, prior=1.0)
    with pytest.raises(RuntimeError, match="expected one of 8 neurons for b, found one of 7"):
        importance(group_of(model, model.b))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": -1.0, "histories": {}}, "prior: expected a number of at least 0, found -1.0"),
        ({"prior": float("inf"), "histories": {}}, "prior: expected a number of at least 0, found inf"),
        ({"prior": 1.0}, "histories: expected those of a training that was watched"),
    ],
)
def test_bad_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DyingNeuronImportance(**settings)


PRIOR = ["prune.prior=2", "train.pressure.bn_l1.strength=0.3", "prune.steps=2", "finetune.epochs=0"]


def test_a_run_hands_the_past_on_and_resumes_with_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny, PRIOR)
    seen: list[dict[str, tuple[int, int]]] = []
    plan = removal_stage.plan_towards

    def spied(run: RunState, importance: DyingNeuronImportance, target: Target) -> Any:
        assert importance.prior == 2.0
        seen.append({name: (len(h.dead), h.checks) for name, h in importance.histories.items()})
        found = plan(run, importance, target)
        assert {name: neurons for name, (neurons, _) in seen[-1].items()} == found.sizes
        return found

    monkeypatch.setattr(removal_stage, "plan_towards", spied)
    run_recipe(recipe, tmp_path / "straight")
    assert len(seen) == 2 and {checks for _, checks in seen[0].values()} == {2}
    assert sum(n for n, _ in seen[1].values()) < sum(n for n, _ in seen[0].values())
    monkeypatch.undo()
    with pytest.raises(Killed):
        run_recipe(recipe, tmp_path / "stopped", track=stopping_after(2 * (6 + 1) + 1))  # while it observes
    run_recipe(recipe, tmp_path / "stopped", resume=True)
    assert_same(lasting(tmp_path / "stopped"), lasting(tmp_path / "straight"), 0)


def test_a_prior_needs_neurons_that_are_checked(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.epochs: expected at least 1 with prune.prior 2, found 0"):
        run_recipe(load_recipe(tiny, ["prune.prior=2", "train.epochs=0"]), tmp_path / "no-training")
    often = ["train.batch_size=64", "prune.dynamics.check_every=0.25", "prune.observe.min_samples=65"]
    few = load_recipe(tiny, ["prune.prior=2", *often])
    with pytest.raises(InputError, match=r"prune.observe.min_samples: expected at most 64"):
        run_recipe(few, tmp_path / "few")
    for mode, target in (("dynamic", []), ("watch", ["prune.target=null", "prune.recalibrate=null"])):
        with pytest.raises(InputError, match=rf"prior: expected nothing with mode {mode}, found 2"):
            load_recipe(tiny, ["prune.prior=2", f"prune.mode={mode}", "prune.recalibrate=null", *target])
    assert not (tmp_path / "few").exists()
