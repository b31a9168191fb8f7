"""When neurons become candidates and when they go: ramps, shares, patience, steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.networks import images, make
from helpers.training import (
    BATCH,
    assert_accounts,
    batch,
    hooks,
    kill,
    lively,
    one_step,
    pruned_by,
    row,
    run,
    sgd,
    watching,
    widths,
)

from dnr_plugin.dynamics.timetable import Timetable
from dnr_plugin.network.cost import flop_report
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.targets import TARGETS, baseline


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
            found = TARGETS[kind]().measure(report.flops, report.params, dense.neurons - removed, dense)
            if TARGETS[kind].keeps:
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
