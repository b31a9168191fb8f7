"""Least squares by rows and by inputs: the same solution, whichever is smaller."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dnr_plugin.repair import least_squares
from dnr_plugin.repair.least_squares import Task, _ByInputs, _ByRows, _Moments


def task(rows: int, inputs: int, *, constant: bool = True, rectified: bool = False) -> Task:
    draw = torch.Generator().manual_seed(rows + inputs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    x = normal(rows, inputs) @ (torch.eye(inputs) + 0.3 * normal(inputs, inputs)) + 2.0
    goal, weights = x @ normal(inputs, 7), normal(7, inputs).double()
    return Task(x, goal, torch.zeros_like(goal), weights, normal(7).double(), constant, rectified)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(("rows", "inputs"), [(40, 90), (90, 40)])
def test_rows_and_inputs_give_the_same(rows: int, inputs: int, constant: bool) -> None:
    """Also towards other goals, with the same factors."""
    given = task(rows, inputs, constant=constant)
    by_inputs = _ByInputs(given, _Moments.of(given.x, given.goal))
    by_rows = _ByRows(given, given.x, given.goal)
    for goal in (given.goal, given.goal.relu()):
        by_inputs, by_rows = by_inputs.towards(given.x, goal), by_rows.towards(given.x, goal)
        for damping in (1e-1, 1.0, 10.0):
            (weights, constants), (others, other_constants) = by_inputs.solve(damping), by_rows.solve(damping)
            torch.testing.assert_close(weights, others, rtol=1e-3, atol=1e-4)
            # means are large: rounding of weights goes into constants many times over, and cancels in what comes out
            x = given.x.double()
            torch.testing.assert_close(x @ weights.T + constants, x @ others.T + other_constants, rtol=1e-3, atol=1e-3)
    if not constant:
        assert torch.equal(by_rows.solve(1.0)[1], given.constants)


@pytest.mark.parametrize("rectified", [False, True])
def test_few_rows_are_solved_by_rows(monkeypatch: pytest.MonkeyPatch, rectified: bool) -> None:
    """No matrix of the inputs is ever made."""
    given = task(60, 200, rectified=rectified)
    before = given.lacking(given.outputs)

    def unexpected(*_: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(least_squares, "outer_products", unexpected)
    fitted = given.fitted(before)
    assert fitted.damping is not None
    assert fitted.lacking(fitted.outputs) < 0.5 * before
