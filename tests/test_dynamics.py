"""Neurons that die, wait, come back and go while small networks train; schedules, targets, resuming, two ranks."""

from __future__ import annotations

import copy
import io
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import every_group
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Plain, images, make
from ranks import run_two_ranks
from torch import Tensor, nn

from dnr_plugin.dynamics.check import Check
from dnr_plugin.dynamics.dynamics import DyingNeuronDynamics
from dnr_plugin.dynamics.timetable import Timetable
from dnr_plugin.errors import InputError
from dnr_plugin.models.build import build_model
from dnr_plugin.models.saved import build, describe
from dnr_plugin.network.cost import flop_report
from dnr_plugin.pruning.groups import Limits, prunable_layers
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.pruning.targets import KEPT_TARGETS, baseline, measure, reached
from dnr_plugin.recipe.sections import ModelOptions
from dnr_plugin.scoring.importance import DyingNeuronImportance

BATCH = 16


def watching(model: nn.Module, when: Timetable, size: int = 8, **options: Any) -> DyingNeuronDynamics:
    settings: dict[str, Any] = {"min_samples": BATCH, "importance": DyingNeuronImportance(share=1.0), **options}
    return DyingNeuronDynamics(model, images(1, size=size), when=when, **settings)


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def batch(step: int, size: int = 8, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(BATCH, 3, size, size, generator=generator)
    return x, torch.randint(0, 5, (BATCH,), generator=generator)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, size: int = 8) -> None:
    x, y = batch(step, size)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def run(
    model: nn.Module, dynamics: DyingNeuronDynamics, optimizer: torch.optim.Optimizer, steps: range, size: int = 8
) -> list[Check]:
    model.train()
    found = []
    for step in steps:
        learn(model, optimizer, step, size)
        check = dynamics.step()
        if check is not None:
            found.append(check)
    return found


def kill(bn: nn.BatchNorm2d, channels: list[int]) -> None:
    with torch.no_grad():
        bn.weight[channels], bn.bias[channels] = 0.0, -10.0


def wake(bn: nn.BatchNorm2d, channels: list[int]) -> None:
    with torch.no_grad():
        bn.weight[channels], bn.bias[channels] = 1.0, 1.0


def lively(model: nn.Module) -> nn.Module:
    """Nothing dies of itself."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(1.0)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.fill_(0.5)
    return model


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def evaluated(model: nn.Module, size: int = 8) -> Tensor:
    """Outputs in eval mode; the mode is restored."""
    model.eval()
    with torch.no_grad():
        out: Tensor = model(images(8, seed=77, size=size))
    model.train()
    return out


def row(check: Check, layer: str) -> Any:
    (found,) = [row for row in check.layers if row.layer == layer]
    return found


def widths(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


# --- life and death -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_what_is_dead_goes_after_its_patience_and_nothing_else(patience: int) -> None:
    """Candidates at the first check after warm-up, gone exactly so many checks later; the outputs stay."""
    model = lively(make("plain"))
    kill(model.bn, [1, 4, 6])
    optimizer = sgd(model)
    with watching(
        model, Timetable(2, until=40, warmup=3), optimizer=optimizer, patience=patience, max_share=1
    ) as dynamics:
        for step in range(1, 13):
            model.train()
            learn(model, optimizer, step)
            before = evaluated(model)
            check = dynamics.step()
            if step % 2:
                assert check is None
                continue
            number = step // 2
            assert check is not None and (check.number, check.step) == (number, step)
            a = row(check, "a")
            gone = number > 2 + patience
            assert (a.neurons, a.dead) == ((5, 0) if gone else (8, 3))
            assert a.nominated == (3 if number == 2 else 0)
            assert check.removed == ({"a": [1, 4, 6]} if number == 2 + patience else {})
            assert a.candidates == (3 if 2 <= number < 2 + patience else 0)
            torch.testing.assert_close(evaluated(model), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
            assert check.exact == (3 if number == 2 + patience else 0)  # also where they were never zeroed
            assert check.max_abs_diff <= 1e-5 * float(before.abs().max())
    assert widths(model) == [5, 8, 8]


def test_a_candidate_that_fires_again_is_kept() -> None:
    model = lively(make("plain"))
    kill(model.bn, [1, 4])
    optimizer = sgd(model)
    with watching(model, Timetable(2, until=40), optimizer=optimizer, patience=2) as dynamics:
        (first,) = run(model, dynamics, optimizer, range(2))
        assert (row(first, "a").nominated, row(first, "a").died) == (2, 2)
        wake(model.bn, [4])
        second, third, fourth = run(model, dynamics, optimizer, range(2, 8))
        assert (row(second, "a").reactivated, row(second, "a").restored, row(second, "a").candidates) == (1, 1, 1)
        assert third.removed == {"a": [1]}
        assert row(fourth, "a").neurons == 7 and not fourth.removed
        # what was neuron 4 is neuron 3 now
        assert dynamics.histories["a"].reactivations.tolist() == [0, 0, 0, 1, 0, 0, 0]
        assert dynamics.histories["a"].first_death.tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_a_candidate_changes_nothing_and_learns() -> None:
    """Its weights may be anything without an effect on the outputs, yet they get a gradient and move."""
    model = lively(make("plain"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watching(
        model, Timetable(2, until=40), optimizer=optimizer, kind="neuron_sparsity", value=0.3, ramp="at_once",
        patience=5, max_share=1.0,
    ) as dynamics:  # fmt: skip
        run(model, dynamics, optimizer, range(2))
        waiting = dynamics.histories["b"].candidates
        assert 0 < int(waiting.sum()) < 8 and not dynamics.histories["b"].dead[waiting].any()
        other, x = copy.deepcopy(model), batch(9)[0]
        with torch.no_grad():
            other.b.weight[waiting], other.b.bias[waiting] = 3.0, 3.0
        assert torch.equal(other(x), model(x))
        with torch.no_grad():
            other.b.bias[~waiting] = 3.0
        assert not torch.allclose(other(x), model(x))
        before = model.b.weight.detach().clone()
        learn(model, optimizer, 2)
        assert (model.b.weight.grad[waiting].abs().amax((1, 2, 3)) > 0).all()
        assert not torch.isclose(model.b.weight, before, atol=1e-9).all((1, 2, 3))[waiting].any()
        assert model.c.weight.grad[:, waiting].abs().sum() == 0  # straight through: they read nothing


@pytest.mark.parametrize("target", [None, "dead"])
def test_watching_alone_and_before_warm_up_changes_nothing(target: str | None) -> None:
    """Training watched is training unwatched to the bit; histories fit their layers."""
    model, alone = lively(make("residual")), lively(make("residual"))
    optimizer, other = sgd(model), sgd(alone)
    when = Timetable(2) if target is None else Timetable(2, until=100, warmup=50)
    with watching(model, when, optimizer=optimizer, kind=target) as dynamics:
        found = run(model, dynamics, optimizer, range(6))
    alone.train()
    for step in range(6):
        learn(alone, other, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    assert len(found) == dynamics.checks == 3
    assert dynamics.finished == (target is None)
    assert {name: len(history.dead) for name, history in dynamics.histories.items()} == {"a1": 8, "b1": 8, "b2": 8}
    assert all(history.checks == 3 for history in dynamics.histories.values())
    assert all(r.nominated == r.candidates == r.removed == 0 for check in found for r in check.layers)
    assert all(r.drift is None for r in found[0].layers) and all(r.drift > 0 for r in found[1].layers)


def test_falling_low_entropy_is_dying_and_rising_is_not() -> None:
    """Both fire; their histograms come from BatchNorm scales and biases alone."""
    model = lively(make("plain"))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    fall, rise = 2, 5
    with torch.no_grad():
        model.bn.bias[fall], model.bn.bias[rise] = 0.0, -2.0
    with watching(
        model, Timetable(4, until=80), optimizer=optimizer, dying_entropy=1.0, patience=8, max_share=1.0
    ) as dynamics:
        (first,) = run(model, dynamics, optimizer, range(4))
        assert row(first, "a").nominated == 0  # nothing has fallen yet
        with torch.no_grad():
            model.bn.bias[fall], model.bn.bias[rise] = -2.0, -1.8
        run(model, dynamics, optimizer, range(4, 8))
        history = dynamics.histories["a"]
        assert not history.dead.any()
        assert float(history.entropy[[fall, rise]].max()) <= 1.0 and float(history.entropy[0]) > 1.0
        assert history.candidates.nonzero().flatten().tolist() == [fall]


def everything_dead() -> nn.Module:
    torch.manual_seed(0)
    model = build_model(ModelOptions(name="resnet18", width=4), 5, 3, 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            kill(module, list(range(module.num_features)))
    return model


def test_a_network_that_is_dead_stays_as_it_is() -> None:
    model = everything_dead()
    for module in model.modules():  # alive until the first candidates wait
        if isinstance(module, nn.BatchNorm2d):
            wake(module, list(range(1, module.num_features)))
    optimizer = sgd(model, 1e-4)
    with watching(model, Timetable(1, until=9), 16, optimizer=optimizer, patience=3) as dynamics:
        (first,) = run(model, dynamics, optimizer, range(1), 16)
        waiting = sum(r.candidates for r in first.layers)
        assert waiting > 0
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                kill(module, list(range(module.num_features)))
        second, third = run(model, dynamics, optimizer, range(1, 3), 16)
        assert dynamics.finished and dynamics.stopped is not None and "dead" in dynamics.stopped
        assert sum(r.restored for r in second.layers) == waiting
        assert not any(check.removed or sum(r.candidates for r in check.layers) for check in (second, third))
        assert widths(model) == widths(everything_dead())
        assert torch.isfinite(evaluated(model, 16)).all()
        before = model.fc.bias.detach().clone()
        learn(model, optimizer, 4, 16)
        assert not torch.equal(model.fc.bias, before)


# --- accounts -----------------------------------------------------------------------------------------------------


def one_step(model: nn.Module, example: Tensor, kind: str, limits: Limits) -> float:
    """The most that a single removal step changes a target's measure."""
    dense = baseline(model, example)
    layers, _, neurons = prunable_layers(model, example, limits, {})
    most = 0.0
    for layer in layers:
        trial, gone = copy.deepcopy(model), layer.neurons(range(layer.portions[0]))
        prune_neurons(trial, example, {layer.name: gone})
        report = flop_report(trial, example)
        found = measure(kind, report.flops, report.params, neurons - len(gone), dense)
        most = max(most, abs(found - measure(kind, dense.report.flops, dense.report.params, neurons, dense)))
    return most


def assert_accounts(found: list[Check]) -> None:
    for check in found:
        assert set(check.removed) <= {r.layer for r in check.layers}
        for r in check.layers:
            assert r.removed == len(check.removed.get(r.layer, ()))
            assert min(r.dead, r.died, r.reactivated, r.candidates, r.nominated, r.restored, r.removed) >= 0
            assert r.died <= r.dead <= r.neurons and r.candidates <= r.neurons - r.removed
    for before, after in pairwise(found):
        for r, s in zip(before.layers, after.layers, strict=True):
            assert r.layer == s.layer
            assert s.neurons == r.neurons - r.removed
            assert s.candidates == r.candidates + s.nominated - s.restored - s.removed, (after.number, s)
            assert s.dead >= s.died and s.reactivated <= r.dead


RUNS = [
    ("flops", 0.5, "local", {}),
    ("params", 0.45, "global", {"round_to": 4, "max_pruning_ratio": 0.8}),
    ("neuron_sparsity", 0.5, "isomorphic", {}),
    ("weight_sparsity", 0.6, "local", {"round_to": 8}),
    ("flops", 0.6, "isomorphic", {"max_pruning_ratio": 0.7}),
    ("dead", 1.0, "global", {}),
]


@pytest.mark.parametrize(("kind", "value", "scope", "limits"), RUNS, ids=lambda value: str(value))
def test_accounts_add_up_and_targets_are_met(kind: str, value: float, scope: str, limits: dict[str, Any]) -> None:
    """While neurons die and wake at random in a network with every kind of group."""
    draw, model = random.Random(0), every_group.lively(every_group.Net(), every_group.images(64))
    example, allowed = images(1), Limits(**limits)
    dense, step_size = baseline(model, example), one_step(model, example, kind, allowed)
    optimizer = sgd(model)
    found = []
    with watching(
        model, Timetable(1, until=8, warmup=2), optimizer=optimizer, kind=kind, value=value, scope=scope,
        limits=allowed, patience=2, max_share=0.5,
    ) as dynamics:  # fmt: skip
        for step in range(10):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    chosen = draw.sample(range(module.num_features), max(1, module.num_features // 6))
                    draw.choice([kill, wake])(module, chosen)
            found += run(model, dynamics, optimizer, range(step, step + 1))
        assert len(found) == 10 and dynamics.finished
        for name, history in dynamics.histories.items():
            assert len(history.dead) == len(history.waiting) == model.get_submodule(name).weight.shape[0]
    assert_accounts(found)
    assert not any(check.removed for check in found[8:]) and not any(r.nominated for r in found[0].layers)
    assert sum(r.died for check in found for r in check.layers) > 5
    assert sum(r.reactivated for check in found for r in check.layers) > 5
    removed = sum(len(gone) for check in found for gone in check.removed.values())
    assert removed > 0
    report = flop_report(model, example)
    achieved = measure(kind, report.flops, report.params, dense.neurons - removed, dense)
    if kind != "dead":
        assert reached(kind, achieved, value), achieved
        assert abs(achieved - value) <= step_size + 1e-9
    round_to = allowed.round_to or 1
    for name, size in every_group.SIZES.items():
        left = model.get_submodule(name).weight.shape[0]
        assert left % size[1] == 0
        assert left % round_to == 0 or left == size[0]
        assert left >= size[0] * (1 - allowed.max_pruning_ratio) - 1e-9
    assert torch.isfinite(evaluated(model)).all()


# --- the schedule -------------------------------------------------------------------------------------------------


def pruned_by(model: nn.Module, when: Timetable, steps: int, **options: Any) -> list[Check]:
    optimizer = sgd(model)
    with watching(model, when, optimizer=optimizer, **options) as dynamics:
        return run(model, dynamics, optimizer, range(steps))


@pytest.mark.parametrize(
    ("ramp", "share"),
    [("linear", lambda t: t), ("cubic", lambda t: 1 - (1 - t) ** 3), ("at_once", lambda t: 1.0)],
)
@pytest.mark.parametrize("kind", ["neuron_sparsity", "params"])
def test_ramps(kind: str, ramp: Any, share: Any) -> None:
    """Without patience what is removed after each check is the least that reaches the ramp's value."""
    model = lively(make("plain"))
    dense, example = baseline(model, images(1)), images(1)
    step_size = one_step(model, example, kind, Limits())
    value = 0.5
    optimizer = sgd(model)
    removed = 0
    with watching(
        model, Timetable(1, until=4, warmup=2), optimizer=optimizer, kind=kind, value=value, ramp=ramp, patience=0,
        max_share=1.0,
    ) as dynamics:  # fmt: skip
        for number in range(1, 6):
            (check,) = run(model, dynamics, optimizer, range(number, number + 1))
            removed += sum(map(len, check.removed.values()))
            t = min(max(number - 1, 0) / 3, 1.0)  # nothing at check 1, all at check 4
            reach = value * (share(t) if number > 1 else 0.0)
            report = flop_report(model, example)
            found = measure(kind, report.flops, report.params, dense.neurons - removed, dense)
            if kind in KEPT_TARGETS:
                assert reach - 1e-9 <= 1 - found <= reach + step_size + 1e-9
            else:
                assert reach - 1e-9 <= found < reach + 1 / 24
    assert dynamics.finished and dynamics.stopped is None


def test_the_share_of_a_layer_per_check_is_bounded() -> None:
    found = pruned_by(
        lively(make("plain")), Timetable(1, until=8), 7, kind="neuron_sparsity", value=0.8, ramp="at_once",
        patience=2, max_share=0.25,
    )  # fmt: skip
    for check in found:
        for r in check.layers:
            assert r.nominated <= max(1, r.neurons // 4)
    assert [row(check, "b").nominated for check in found[:2]] == [2, 2]


def test_removals_wait_for_their_steps() -> None:
    """The first check from each step on, and everything that is left at the last."""
    model = lively(make("plain"))
    found = pruned_by(
        model, Timetable(2, until=30, remove_at=(7, 13)), 20, kind="neuron_sparsity", value=0.5, patience=1,
        max_share=0.5,
    )  # fmt: skip
    assert [check.step for check in found if check.removed] == [8, 14]
    assert 1 - sum(widths(model)) / 24 >= 0.5 - 1e-9
    assert_accounts(found)


def test_nothing_goes_after_until() -> None:
    """Neurons that die later stay, also where nothing was dead before."""
    model = lively(make("plain"))
    optimizer = sgd(model)
    with watching(model, Timetable(1, until=4), optimizer=optimizer, patience=1) as dynamics:
        run(model, dynamics, optimizer, range(4))
        assert dynamics.finished
        kill(model.bn, [0, 1])
        late = run(model, dynamics, optimizer, range(4, 8))
    assert all(not check.removed and row(check, "a").nominated == 0 for check in late)
    assert row(late[-1], "a").dead == 2
    assert widths(model) == [8, 8, 8]


def test_without_zeroing_candidates_work_on() -> None:
    model = lively(make("plain"))
    optimizer = sgd(model)
    with watching(
        model, Timetable(2, until=20), optimizer=optimizer, kind="neuron_sparsity", value=0.3, ramp="at_once",
        patience=2, zero=False,
    ) as dynamics:  # fmt: skip
        (first,) = run(model, dynamics, optimizer, range(2))
        assert sum(r.candidates for r in first.layers) > 0
        model.train()
        opened = hooks(model)
        other = copy.deepcopy(model)
        waiting = dynamics.histories["b"].candidates
        with torch.no_grad():
            other.b.bias[waiting] += 3.0
        assert not torch.allclose(other(batch(3)[0]), model(batch(3)[0]))
        assert opened == 4  # the observer's alone
        rest = run(model, dynamics, optimizer, range(2, 20))
    assert any(check.removed for check in rest)
    assert sum(check.exact for check in rest) == 0


def test_a_check_waits_for_enough_samples() -> None:
    model = lively(make("plain"))
    optimizer = sgd(model)
    with watching(model, Timetable(2), optimizer=optimizer, kind=None, min_samples=3 * BATCH) as dynamics:
        found = run(model, dynamics, optimizer, range(9))
        # due at 2, possible at 3; then the window opens anew at once
        assert [check.step for check in found] == [3, 6, 9]
        assert [check.number for check in found] == [1, 2, 3]


def test_only_the_last_steps_are_watched() -> None:
    model = lively(make("plain"))
    optimizer = sgd(model)
    with watching(model, Timetable(5, watched=2), optimizer=optimizer, kind=None) as dynamics:
        seen = []
        for step in range(10):
            run(model, dynamics, optimizer, range(step, step + 1))
            seen.append(hooks(model) > 0)
    assert seen == [False, False, True, True, False, False, False, True, True, False]
    activities = dynamics.importance.observer.activities.values()
    assert {activity.samples for activity in activities} == {2 * BATCH}


# --- hooks and errors ---------------------------------------------------------------------------------------------


def test_activations_that_are_not_finite_are_an_error() -> None:
    model = lively(make("plain"))
    optimizer = sgd(model)
    dynamics = watching(model, Timetable(2, until=10), optimizer=optimizer)
    with torch.no_grad():
        model.b.bias[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"), dynamics:
        run(model, dynamics, optimizer, range(4))
    assert hooks(model) == 0


def test_steps_are_counted_inside_the_context_alone() -> None:
    model = lively(make("plain"))
    dynamics = watching(model, Timetable(2, until=10))
    with pytest.raises(RuntimeError, match="outside of"):
        dynamics.step()
    with dynamics:
        pass
    with pytest.raises(RuntimeError, match="outside of"):
        dynamics.step()


def test_no_hooks_stay_behind() -> None:
    """Neither the observer's nor those that zero, also after an error."""
    model = lively(make("plain"))
    kill(model.bn, [1, 4])
    optimizer = sgd(model)
    dynamics = watching(model, Timetable(2, until=20), optimizer=optimizer, patience=4)

    def fail() -> None:
        with dynamics:
            run(model, dynamics, optimizer, range(3))
            assert hooks(model) == 5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert hooks(model) == 0


def test_a_second_context_goes_on() -> None:
    """Candidates are zeroed again, and their patience is not lost."""
    model = lively(make("plain"))
    kill(model.bn, [1, 4])
    optimizer = sgd(model)
    dynamics = watching(model, Timetable(2, until=20), optimizer=optimizer, patience=2)
    with dynamics:
        run(model, dynamics, optimizer, range(2))
    learn(model, optimizer, 99)
    with dynamics:
        assert hooks(model) == 5
        found = run(model, dynamics, optimizer, range(2, 6))
    assert [check.removed for check in found] == [{}, {"a": [1, 4]}]
    assert hooks(model) == 0


def test_a_state_of_other_widths_leaves_no_hooks() -> None:
    dynamics = watching(lively(make("plain")), Timetable(2), kind=None)
    with dynamics:
        dynamics.model.train()(batch(0)[0])
        dynamics.step()
        state = dynamics.state_dict()
    other = Plain(6)
    fresh = watching(other, Timetable(2), kind=None)
    fresh.load_state_dict(state)
    with pytest.raises(ValueError, match="expected shape"), fresh:
        pass
    assert hooks(other) == 0


WHEN = Timetable(2, until=20)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "latency"}, "kind"),
        ({"kind": "flop"}, "kind"),
        ({"when": Timetable(0, until=20)}, "when"),
        ({"when": Timetable(2, until=20, watched=3)}, "when"),
        ({"when": Timetable(2, until=20, watched=0)}, "when"),
        ({"when": Timetable(2, until=20, warmup=21)}, "when"),
        ({"when": Timetable(2, until=20, remove_at=(21,))}, "when"),
        ({"when": Timetable(2, until=20, warmup=18), "patience": 2}, "when"),
        ({"patience": -1}, "patience"),
        ({"value": 0.0, "kind": "flops"}, "value"),
        ({"value": 1.0, "kind": "weight_sparsity"}, "value"),
        ({"ramp": "square"}, "ramp"),
        ({"max_share": 0.0}, "max_share"),
        ({"max_share": 1.1}, "max_share"),
        ({"dying_entropy": 0.0}, "dying_entropy"),
        ({"min_samples": 0}, "min_samples"),
        ({"scope": "locl"}, "scope"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"^{match}: expected"):
        watching(make("plain"), **{"when": WHEN, **options})


def test_limits_that_name_nothing() -> None:
    with pytest.raises(InputError, match=r"prune\.ignored"):
        watching(make("plain"), WHEN, limits=Limits(ignored=["layr*"]))


# --- what follows a removal ---------------------------------------------------------------------------------------


def test_everything_follows_a_removal() -> None:
    """Parameter groups, momentum, schedule, modes, frozen parameters, gradients and memory format."""
    model = lively(make("plain")).to(memory_format=torch.channels_last)
    kill(model.bn, [1, 4])
    model.c.bias.requires_grad_(False)
    convs = [p for p in model.parameters() if p.dim() == 4]
    rest = [p for p in model.parameters() if p.dim() != 4]
    optimizer = torch.optim.SGD([{"params": convs, "weight_decay": 0.0}, {"params": rest, "lr": 0.02}], 0.01, 0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    kept = [0, 2, 3, 5, 6, 7]
    with watching(model, Timetable(2, until=20), optimizer=optimizer, patience=1) as dynamics:
        for step in range(4):
            model.train()
            model.bn.eval()
            learn(model, optimizer, step)
            schedule.step()
            momentum = {n: optimizer.state[p].get("momentum_buffer") for n, p in model.named_parameters()}
            gradients = {n: p.grad for n, p in model.named_parameters()}
            check = dynamics.step()
        assert check is not None and check.removed == {"a": [1, 4]}
        parameters = dict(model.named_parameters())
        groups = [
            [n for n, p in parameters.items() if any(p is q for q in g["params"])] for g in optimizer.param_groups
        ]
        assert groups == [[n for n in parameters if (n[-6:] == "weight" and n[0] in "abc" and n[1] == ".") == conv]
                          for conv in (True, False)]  # fmt: skip
        for name, parameter in parameters.items():
            part: Any = kept if name in ("a.weight", "a.bias", "bn.weight", "bn.bias") else slice(None)
            part = (slice(None), kept) if name == "b.weight" else part
            if name == "c.bias":
                assert not parameter.requires_grad and parameter.grad is None
                continue
            assert parameter.requires_grad
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum[name][part]), name
            assert torch.equal(parameter.grad, gradients[name][part]), name
        assert model.training and not model.bn.training
        assert model.b.weight.is_contiguous(memory_format=torch.channels_last)
        rates = [g["lr"] for g in optimizer.param_groups]
        before = {n: p.detach().clone() for n, p in parameters.items()}
        learn(model, optimizer, 5)
        schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([rate / 2 for rate in rates])
        assert all(torch.equal(p, before[n]) == (n == "c.bias") for n, p in model.named_parameters())


class Parts(nn.Module):
    """A concatenation behind one BatchNorm, a scalar PReLU, a transposed and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.bn, self.act = nn.BatchNorm2d(9), nn.PReLU(init=0.0)
        self.up = nn.ConvTranspose2d(9, 6, 3, padding=1)
        self.hidden, self.fc = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(torch.cat([self.a(x), self.b(x)], 1)))
        x = self.up(x).relu().mean((2, 3))
        return self.fc(self.hidden(x).relu())


def test_live_is_zero_exactly_for_what_makes_dead_neurons() -> None:
    torch.manual_seed(0)
    model = Parts()
    dead = {"bn": [1, 3, 4, 8], "up": [2], "hidden": [0, 6]}  # of bn: a's 1 and 3, b's 0 and 4
    with torch.no_grad():
        model.bn.bias.fill_(1.0)
        model.up.bias.fill_(2.0)
        model.hidden.bias.fill_(2.0)
        model.act.weight.requires_grad_(False)  # or what is dead would leak
        kill(model.bn, dead["bn"])
        for layer, channels in ((model.up, dead["up"]), (model.hidden, dead["hidden"])):
            layer.bias[channels] = -50.0
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)

    def expected(name: str) -> list[int]:
        layer = name.split(".")[0]
        return {"a": [1, 3], "b": [0, 4], **dead}.get(layer, [])

    with watching(model, Timetable(2, until=20), optimizer=optimizer, patience=1, max_share=1.0) as dynamics:
        assert all(dynamics.live(p) is None for p in model.parameters())
        run(model, dynamics, optimizer, range(2))
        for name, parameter in model.named_parameters():
            factor, gone = dynamics.live(parameter), expected(name)
            if not gone:
                assert factor is None or (factor == 1).all(), name
                continue
            assert factor is not None, name
            full = factor.expand_as(parameter)
            along = full.movedim(1, 0) if name == "up.weight" else full
            rows = along.flatten(1) if along.dim() > 1 else along[:, None]
            assert (rows[gone] == 0).all(), name
            assert int((rows == 0).any(1).sum()) == len(gone), name
        (check,) = run(model, dynamics, optimizer, range(2, 4))
        assert check.removed == {"a": [1, 3], "b": [0, 4], "up": [2], "hidden": [0, 6]}
        for parameter in model.parameters():  # what is dead is judged anew, on parameters that exist
            factor = dynamics.live(parameter)
            assert factor is None or (factor.expand_as(parameter) == 1).all()


def test_groups_left_alone_are_named_with_the_reason() -> None:
    """Also those without evidence, also after a removal."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused, self.out = Plain(), nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return y if self.training else y + 0.0 * self.out(self.unused(x).mean((2, 3)))

    torch.manual_seed(0)
    model = Branch()
    lively(model)
    kill(model.net.bn, [1])
    optimizer = sgd(model)
    with watching(model, Timetable(2, until=20), optimizer=optimizer, patience=0) as dynamics:
        with pytest.warns(UserWarning, match="unused is left alone"):
            (check,) = run(model, dynamics, optimizer, range(2))
        assert check.removed == {"net.a": [1]}
        assert any(name == "unused" and "was not called" in reason for name, reason in dynamics.skipped)


# --- resuming -----------------------------------------------------------------------------------------------------


def saved(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize(("name", "cut"), [("resnet18", 5), ("mlp", 5), ("mlp", 6), ("mlp", 13)])
def test_a_resumed_training_is_the_uninterrupted_one(name: str, cut: int) -> None:
    """To the bit: weights, optimizer, histories and checks; cut inside a window and between, with candidates."""
    options = {"width": 4} if name == "resnet18" else {"hidden": [24, 16]}
    size, steps, until = (8, 10, 9) if name == "resnet18" else (16, 17, 15)

    def fresh(model: nn.Module, **more: Any) -> tuple[nn.Module, torch.optim.Optimizer, DyingNeuronDynamics]:
        optimizer = sgd(model, 0.05)
        return model, optimizer, watching(
            model, Timetable(3, until=until, watched=2), size, optimizer=optimizer, kind="params", value=0.5,
            patience=1, max_share=0.5, **more,
        )  # fmt: skip

    def dense_model() -> nn.Module:
        torch.manual_seed(0)
        return build_model(ModelOptions(name=name, **options), 5, 3, size)

    model, optimizer, dynamics = fresh(dense_model())
    with dynamics:
        first = run(model, dynamics, optimizer, range(cut), size)
        state = saved({
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "dynamics": dynamics.state_dict(),
            "architecture": describe(model),
        })  # fmt: skip
        waiting = sum(int(history.candidates.sum()) for history in dynamics.histories.values())
        second = run(model, dynamics, optimizer, range(cut, steps), size)
    assert any(check.removed for check in first + second)
    assert waiting > 0 or cut == 13

    again = build(state["architecture"])
    again.load_state_dict(state["model"])
    again, resumed, other = fresh(again, dense=baseline(dense_model(), images(1, size=size)))
    resumed.load_state_dict(state["optimizer"])
    other.load_state_dict(state["dynamics"])
    with other:
        found = run(again, other, resumed, range(cut, steps), size)
    assert [(c.number, c.step, c.layers, c.removed, c.max_abs_diff) for c in found] == [
        (c.number, c.step, c.layers, c.removed, c.max_abs_diff) for c in second
    ]
    assert len(found) > 0
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["momentum_buffer"], resumed.state[b]["momentum_buffer"])
    for key, history in dynamics.histories.items():
        for field, value in history.state_dict().items():
            np.testing.assert_array_equal(other.histories[key].state_dict()[field], value, err_msg=f"{key}.{field}")
    assert (dynamics.checks, dynamics.finished, dynamics.stopped) == (other.checks, other.finished, other.stopped)


# --- two ranks ----------------------------------------------------------------------------------------------------


def half_dead() -> nn.Module:
    """No BatchNorm, so that two ranks learn what one does on both batches. a1's neuron 3 is dead, and neuron 5 fires
    only on images with a bright first channel, which one rank alone sees."""
    model = lively(make("residual"))
    with torch.no_grad():
        model.a1.weight[[3, 5]], model.a1.bias[3] = 0.0, -10.0
        model.stem.weight[0], model.stem.bias[0] = 0.0, 0.0
        model.stem.weight[0, 0, 1, 1] = 1.0
        model.a1.weight[5, 0, 1, 1], model.a1.bias[5] = 1.0, -8.0
    return model.train()


def of_rank(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step, rank=rank)
    x[:, 0] += 9.0 * rank
    return x, y


RANKED = Timetable(2, until=12)


def ranks_report(dynamics: DyingNeuronDynamics, found: list[Check], model: nn.Module) -> dict[str, Any]:
    return {
        "removed": [dict(check.removed) for check in found],
        "dead": {name: history.dead for name, history in dynamics.histories.items()},
        "histograms": {name: history.histogram.sum() for name, history in dynamics.histories.items()},
        "weights": [p.detach().clone() for p in model.parameters()],
    }


RANK = """
import gc, sys, torch, torch.distributed as dist, torch.nn.functional as F
sys.path[:0] = sys.argv[3:]
torch.set_num_threads(1)
from torch.nn.parallel import DistributedDataParallel
from test_dynamics import RANKED, half_dead, of_rank, ranks_report, sgd, watching
rank, where = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{where}/init", rank=rank, world_size=2)
model = half_dead()
optimizer = sgd(model, 1e-3)
found, wrapped = [], DistributedDataParallel(model)
with watching(model, RANKED, optimizer=optimizer, patience=1, min_samples=64) as dynamics:
    for step in range(8):
        x, y = of_rank(step, rank)
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        check = dynamics.step()
        if check is not None:
            found.append(check)
            if check.removed:
                wrapped = DistributedDataParallel(model)
torch.save(ranks_report(dynamics, found, model), f"{where}/{rank}.pt")
# an activation that is not finite on one rank alone ends the training of both
error = ""
with torch.no_grad():
    try:
        with watching(model, RANKED, kind=None) as dynamics:
            for step in range(4):
                x, _ = of_rank(step, rank)
                model(x * float("inf") if rank == 1 else x)
                dynamics.step()
    except ValueError as caught:
        error = str(caught)
open(f"{where}/{rank}.txt", "w").write(error)
del wrapped  # DDP, in a cycle of references, holds the group, whose threads may else abort an interpreter that ends
gc.collect()
dist.destroy_process_group()
"""


def test_two_ranks_remove_what_one_process_would(tmp_path: Path) -> None:
    run_two_ranks(RANK, tmp_path)
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert zero["removed"] == one["removed"]
    assert all(torch.equal(a, b) for a, b in zip(zero["weights"], one["weights"], strict=True))

    model = half_dead()
    optimizer = sgd(model, 1e-3)
    found = []
    with watching(model, RANKED, optimizer=optimizer, patience=1) as dynamics:
        for step in range(8):
            (x, y), (other, labels) = of_rank(step, 0), of_rank(step, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(torch.cat([x, other])), torch.cat([y, labels])).backward()
            optimizer.step()
            check = dynamics.step()
            if check is not None:
                found.append(check)
    single = ranks_report(dynamics, found, model)
    assert zero["removed"] == single["removed"]
    assert [gone.get("a1") for gone in single["removed"]] == [None, [3], None, None]  # not 5, which rank 1 sees fire
    for name, dead in single["dead"].items():
        assert torch.equal(zero["dead"][name], dead)
        assert zero["histograms"][name] == single["histograms"][name]
    for ours, theirs in zip(zero["weights"], single["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    for rank in (0, 1):
        assert "not finite" in (tmp_path / f"{rank}.txt").read_text()


def test_the_target_is_met_although_candidates_come_back_at_the_end() -> None:
    model = lively(make("plain"))
    kill(model.bn, [0, 1, 2, 3])
    optimizer = sgd(model)
    with watching(
        model, Timetable(1, until=3), optimizer=optimizer, kind="neuron_sparsity", value=0.5, ramp="at_once",
        max_share=1.0, scope="global",
    ) as dynamics:  # fmt: skip
        run(model, dynamics, optimizer, range(2))
        wake(model.bn, [0, 1, 2, 3])
        run(model, dynamics, optimizer, range(2, 4))
        assert dynamics.finished
    assert 1 - sum(widths(model)) / 24 >= 0.5
    assert dynamics.stopped is None


def test_what_fires_again_is_in_use_at_once_also_under_a_target() -> None:
    """It ranks lowest still, but coming back is what is waited for."""
    model = lively(make("plain"))
    kill(model.bn, [1, 4])
    optimizer = sgd(model)
    with watching(
        model, Timetable(2, until=40), optimizer=optimizer, kind="neuron_sparsity", value=0.25, ramp="at_once",
        patience=3, max_share=1.0, scope="global",
    ) as dynamics:  # fmt: skip
        run(model, dynamics, optimizer, range(2))
        assert dynamics.histories["a"].candidates[[1, 4]].all()
        wake(model.bn, [4])
        run(model, dynamics, optimizer, range(2, 4))
        assert dynamics.histories["a"].candidates[[1, 4]].tolist() == [True, False]


def test_neurons_taken_at_the_last_check_are_told_from_those_that_waited() -> None:
    """The cap leaves most of the target to the last check: what was in use until then is not exact, and is folded."""
    model = lively(make("plain"))
    optimizer = sgd(model)
    with watching(
        model, Timetable(2, until=6), optimizer=optimizer, kind="neuron_sparsity", value=0.5, ramp="at_once",
        patience=2, max_share=0.125,
    ) as dynamics:  # fmt: skip
        first, second = run(model, dynamics, optimizer, range(4))
        assert [sum(r.nominated for r in check.layers) for check in (first, second)] == [3, 3]  # one in each layer
        for step in (4, 5):
            model.train()
            learn(model, optimizer, step)
            before = evaluated(model)
            last = dynamics.step()
    assert last is not None
    assert sum(map(len, last.removed.values())) == 12
    assert last.exact == 6
    assert last.max_abs_diff < 1e-5
    assert not torch.allclose(evaluated(model), before, atol=1e-3)  # the other six mattered
