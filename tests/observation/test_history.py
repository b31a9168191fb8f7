"""A layer's past against one neuron at a time in plain Python, against SciPy, through removals and through a file."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from dnr_plugin.dynamics.candidates import CandidateHistory

FIELDS = ("dead_checks", "dead_run", "deaths", "reactivations", "first_death")


def checks(neurons: int, count: int, seed: int, bins: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Random verdicts, from rarely to mostly dead, and histograms with empty bins."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(neurons, generator=generator)
    found = []
    for _ in range(count):
        dead = torch.rand(neurons, generator=generator) < share
        histogram = torch.randint(0, 50, (neurons, bins), generator=generator)
        histogram *= torch.rand(neurons, bins, generator=generator) < 0.7
        found.append((dead, histogram))
    return found


def by_hand(verdicts: list[bool]) -> dict[str, int]:
    """One neuron's past from the definitions."""
    died = [k for k, dead in enumerate(verdicts) if dead and not (k and verdicts[k - 1])]
    woke = [k for k, dead in enumerate(verdicts) if k and not dead and verdicts[k - 1]]
    run = 0
    for dead in reversed(verdicts):
        if not dead:
            break
        run += 1
    return {
        "dead_checks": sum(verdicts),
        "dead_run": run,
        "deaths": len(died),
        "reactivations": len(woke),
        "first_death": died[0] + 1 if died else 0,
    }


@pytest.mark.parametrize("seed", range(5))
def test_every_count_equals_one_neuron_at_a_time(seed: int) -> None:
    history, past = CandidateHistory(20, 5), checks(20, 30, seed)
    for number in range(1, 31):
        dead, histogram = past[number - 1]
        died, reactivated = history.update(dead, histogram)
        assert history.checks == number
        for k in range(20):
            verdicts = [bool(verdict[k]) for verdict, _ in past[:number]]
            assert {name: int(getattr(history, name)[k]) for name in FIELDS} == by_hand(verdicts)
            before = number > 1 and verdicts[-2]
            assert (bool(history.dead[k]), bool(died[k]), bool(reactivated[k])) == (
                verdicts[-1], verdicts[-1] and not before, before and not verdicts[-1],
            )  # fmt: skip
    assert history.reactivations.max() > 2  # else nothing was tested


def test_entropy_and_drift_equal_scipy() -> None:
    history, past = CandidateHistory(20, 5), checks(20, 6, 0)
    entropies: list[Any] = []
    for number, (dead, histogram) in enumerate(past):
        history.update(dead, histogram)
        counts = histogram.double().numpy()
        full = counts.sum(1) > 0
        entropies.append(np.where(full, scipy.stats.entropy(np.where(full[:, None], counts, 1), base=2, axis=1), 0.0))
        np.testing.assert_allclose(history.entropy, entropies[-1], atol=1e-12)
        if number == 0:
            assert history.drift.isnan().all() and not history.falling.any()
            continue
        before = past[number - 1][1].double().numpy()
        expected = scipy.stats.entropy(counts + 0.5, before + 0.5, base=2, axis=1)
        np.testing.assert_allclose(history.drift, expected, atol=1e-12)
        assert (history.drift > 0.01).any()
        # not between equal entropies, which rounding would decide
        clear = np.abs(entropies[-1] - entropies[-2]) > 1e-9
        assert np.array_equal(history.falling.numpy()[clear], (entropies[-1] < entropies[-2])[clear])


def test_keep_is_as_if_the_others_had_never_been() -> None:
    """In the given order, also for the checks that follow and for what waits."""
    kept, past = torch.tensor([7, 0, 3, 11]), checks(12, 8, 1)
    history, small = CandidateHistory(12, 5), CandidateHistory(4, 5)
    history.waiting[kept] = torch.tensor([2, -1, 0, 5])
    history.nominated_dead[kept] = torch.tensor([True, False, False, True])
    small.waiting[:], small.nominated_dead[:] = torch.tensor([2, -1, 0, 5]), torch.tensor([True, False, False, True])
    for dead, histogram in past[:4]:
        history.update(dead, histogram)
        small.update(dead[kept], histogram[kept])
    history.keep(kept)
    for dead, histogram in past[4:]:
        history.update(dead[kept], histogram[kept])
        small.update(dead[kept], histogram[kept])
    assert history.candidates.tolist() == [True, False, True, True]
    assert_same(history, small)


def assert_same(found: CandidateHistory, expected: CandidateHistory) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert ours[name].dtype == value.dtype
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
        else:
            assert ours[name] == value, name


def test_a_file_holds_everything() -> None:
    """Read without running code; what follows is the same as without the file; two readers share nothing."""
    history, past = CandidateHistory(12, 5), checks(12, 9, 2)
    for dead, histogram in past[:5]:
        history.update(dead, histogram)
    history.waiting[3], history.nominated_dead[3] = 1, True
    buffer = io.BytesIO()
    torch.save(history.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    again, twin = CandidateHistory.from_state_dict(state), CandidateHistory.from_state_dict(state)
    assert_same(again, history)
    for dead, histogram in past[5:]:
        history.update(dead, histogram)
        again.update(dead, histogram)
    assert_same(again, history)
    assert twin.checks == 5
    assert_same(twin, CandidateHistory.from_state_dict(state))
    assert not torch.equal(twin.dead_checks, again.dead_checks)


def test_a_state_in_memory_is_of_its_moment() -> None:
    """Counts are added up in place: a state taken before must not move with them."""
    history = CandidateHistory(3, 2)
    state = history.state_dict()
    history.update(torch.ones(3, dtype=torch.bool), torch.ones(3, 2, dtype=torch.int64))
    history.waiting[0] = 4
    assert state["deaths"].tolist() == state["dead_checks"].tolist() == [0, 0, 0]
    assert state["waiting"].tolist() == [-1, -1, -1]


def test_nothing_is_known_at_first() -> None:
    history = CandidateHistory(2, 3)
    assert not history.candidates.any() and not history.dead.any() and history.drift.isnan().all()
    assert history.first_death.tolist() == [0, 0]


def test_the_share_of_checks_alive() -> None:
    """1 for a neuron that was never dead, and ever closer to what was seen."""
    history = CandidateHistory(3, 5)
    assert history.alive_share.tolist() == [1.0, 1.0, 1.0]
    for number in range(4):
        history.update(torch.tensor([False, number % 2 == 1, True]), torch.ones(3, 5, dtype=torch.int64))
    assert history.alive_share.tolist() == [1.0, 3 / 5, 1 / 5]


def test_kept_leaves_the_whole_as_it_is() -> None:
    history = CandidateHistory(4, 5)
    history.update(torch.tensor([True, False, True, False]), torch.ones(4, 5, dtype=torch.int64))
    before = history.state_dict()
    left = history.kept(torch.tensor([3, 0]))
    assert left.dead.tolist() == [False, True] and left.checks == 1
    torch.testing.assert_close(history.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    left.update(torch.tensor([True, True]), torch.ones(2, 5, dtype=torch.int64))
    assert history.checks == 1 and int(history.dead_checks.sum()) == 2
