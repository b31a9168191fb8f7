"""Neurons that die, wait, come back and go while small networks train; schedules, targets, resuming, two ranks."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from helpers import every_group
from helpers.common import assume
from helpers.networks import images, make
from helpers.training import (
    assert_accounts,
    batch,
    evaluated,
    everything_dead,
    kill,
    learn,
    lively,
    one_step,
    row,
    run,
    sgd,
    wake,
    watching,
    widths,
)
from torch import nn

from dnr_plugin.dynamics.timetable import Timetable
from dnr_plugin.network.cost import flop_report
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.targets import TARGETS, baseline


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
    example, allowed = images(1), Limits(**limits).in_scope(scope)
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
    for what in ("died", "reactivated"):
        assume(sum(getattr(r, what) for check in found for r in check.layers) > 5, f"few neurons {what}")
    removed = sum(len(gone) for check in found for gone in check.removed.values())
    assert removed > 0
    report = flop_report(model, example)
    achieved = TARGETS[kind]().measure(report.flops, report.params, dense.neurons - removed, dense)
    if kind != "dead":
        assert TARGETS[kind](value).reached(achieved), achieved
        assert abs(achieved - value) <= step_size + 1e-9
    round_to = allowed.round_to or 1
    for name, size in every_group.SIZES.items():
        left = model.get_submodule(name).weight.shape[0]
        assert left % size[1] == 0
        assert left % round_to == 0 or left == size[0]
        assert left >= size[0] * (1 - allowed.max_pruning_ratio) - 1e-9
    assert torch.isfinite(evaluated(model)).all()


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
