"""Least squares with a pull towards the weights as they are, whose strength held-out rows choose."""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dnr_plugin.linalg import factor, outer_products

_DAMPINGS = (1e-7, 1e-3, 1e-2, 1e-1, 1.0)  # shares of the inputs' mean variance
_HARDER = (3.0, 10.0)  # where there are few rows
_COARSE = 1e-3  # from here on the damping is far beyond the rounding of float32
HELD_OUT = 0.25  # share of the images that chooses among them
_TRIED = 128  # outputs that they are tried with, at most
_RECTIFIED = 3  # rounds, at most, in which outputs below zero are let go,
_WORTH = 0.05  # as long as the last one took so much of what lacks


@dataclass
class Task:
    """Least squares for outputs that read the same inputs: all of a layer, or a group of a grouped convolution.

    Attributes:
        x: inputs, shape [R, in]; changed in place while fitting, by up to rounding.
        goal: what should come out once ``other`` is added, shape [R, out].
        other: what is added, shape [R, out].
        weights, constants: float64, shapes [out, in] and [out].
        constant: whether the constants may change.
        rectified: whether what is below zero counts as zero.
        damping: that they were fitted with; None where they are as they were.
    """

    x: Tensor
    goal: Tensor
    other: Tensor
    weights: Tensor
    constants: Tensor
    constant: bool
    rectified: bool
    damping: float | None = None

    def fitted(self, lacks: float) -> Task:
        """Chooses a damping on the last rows and fits to all of them.

        Args:
            lacks: `lacking` of the outputs as they are.

        Returns:
            This task where the last rows lose by every fit, or all rows together.
        """
        center = self.x.mean(0) * self.constant  # means that are large would drown the moments in rounding
        shift = center.double()
        self.x.sub_(center)
        centered = replace(self, constants=self.constants + self.weights @ shift)._fitted()
        outputs = centered.outputs  # of inputs that are centered as well
        self.x.add_(center)
        if centered.damping is None or self.lacking(outputs) >= lacks:
            return self
        fit = replace(centered, constants=centered.constants - centered.weights @ shift)
        fit.outputs = outputs
        return fit

    def _fitted(self) -> Task:
        share = max(1, round(len(self.x) * (1.0 - HELD_OUT)))
        fitted, held = slice(None, share), slice(share, None)
        y, some = self.goal - self.other, slice(None, None, -(-len(self.weights) // _TRIED))
        trial = self._part(held, some)
        solver: _Solver
        if self.few:
            damping = trial._damping_by(_ByRows(trial, self.x[fitted], y[fitted, some]), (*_DAMPINGS, *_HARDER))
        else:
            first = _Moments.of(self.x[fitted], y[fitted])
            # not to be kept: matrices as large as the moments
            damping = trial._damping_by(_ByInputs(trial, replace(first, yx=first.yx[some])), _DAMPINGS)
        if damping is None:
            return self
        if self.few:
            # rows that can be matched whatever they hold prove nothing: those held out stay unseen, for later layers
            rows, solver = fitted, _ByRows(self, self.x[fitted], y[fitted])
        else:
            rows, solver = slice(None), _ByInputs(self, first.add_(_Moments.of(self.x[held], y[held])))

        def solved() -> Task:
            weights, constants = solver.solve(damping)
            return replace(self, weights=weights, constants=constants, damping=damping)

        fit, least = solved(), math.inf
        for _ in range(_RECTIFIED if self.rectified else 0):
            before, least = least, fit.lacking(fit.outputs)
            if least > (1.0 - _WORTH) * before:  # the next round would gain less again
                break
            # below zero the outputs need not agree, only stay below
            free = torch.minimum(fit.outputs, -self.other)
            solver = solver.towards(self.x[rows], torch.where(self.goal <= 0, free, y)[rows])
            fit = solved()
        return fit

    @property
    def few(self) -> bool:
        """Whether there are too few rows to tell a fit from learning them by heart."""
        return len(self.x) <= self.x.shape[1]

    def _part(self, rows: slice, outputs: slice) -> Task:
        return replace(
            self, x=self.x[rows], goal=self.goal[rows, outputs], other=self.other[rows, outputs],
            weights=self.weights[outputs], constants=self.constants[outputs],
        )  # fmt: skip

    def _damping_by(self, others: _Solver, dampings: Sequence[float]) -> float | None:
        """The damping with which a fit to other rows serves this task best; None where none does."""

        def loses(damping: float) -> float:
            return self.lacking(self._outputs(*others.solve(damping)))

        damping, least = _first_minimum(loses, dampings)
        return damping if least < self.lacking(self.outputs) else None

    @functools.cached_property
    def outputs(self) -> Tensor:
        """What comes out of the rows before anything is added, shape [R, out]."""
        return self._outputs(self.weights, self.constants)

    def _outputs(self, weights: Tensor, constants: Tensor) -> Tensor:
        return self.x @ weights.T.to(self.x) + constants.to(self.x)

    def lacking(self, outputs: Tensor) -> float:
        """Sum of squares of what outputs lack.

        Args:
            outputs: before ``other`` is added, shape [R, out].
        """
        total, goal = outputs + self.other, self.goal
        if self.rectified:
            total, goal = total.relu(), goal.relu()
        return float((total - goal).square().sum(1).double().sum())


def _first_minimum(of: Callable[[float], float], values: Sequence[float]) -> tuple[float, float]:
    """Goes downhill from the middle of some values; the last of them, and what it comes to."""
    known: dict[int, float] = {}

    def at(k: int) -> float:
        if not 0 <= k < len(values):
            return math.inf
        if k not in known:
            known[k] = of(values[k])
        return known[k]

    k = len(values) // 2
    way = 1 if at(k + 1) < at(k) else -1
    while at(k + way) < at(k):
        k += way
    return values[k], at(k)


@dataclass
class _Moments:
    """Sums over rows of x and y, with a constant 1 appended to x: [in + 1, in + 1] and [out, in + 1]."""

    xx: Tensor
    yx: Tensor
    rows: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Moments:
        return cls(outer_products(x, x), outer_products(y, x)[:-1], len(x))

    def add_(self, other: _Moments) -> _Moments:
        self.xx.add_(other.xx)
        self.yx.add_(other.yx)
        self.rows += other.rows
        return self


class _Solver(ABC):
    """Least squares on some rows with a pull towards the weights as they are, for several dampings and goals.

    Args:
        task: its weights and constants, and whether these may change.
    """

    def __init__(self, task: Task) -> None:
        self.start, self.constants, self.constant = task.weights, task.constants, task.constant
        self._factored: tuple[float, Tensor] | None = None

    def factored(self, matrix: Tensor, damping: float, share: float = 1.0) -> Tensor:
        """`linalg.factor` of the same matrix as before, with ``damping * share``; the last one is remembered."""
        if self._factored is None or self._factored[0] != damping:
            self._factored = None  # not to hold two of them
            self._factored = damping, factor(matrix, damping * share)
        return self._factored[1]

    @abstractmethod
    def solve(self, damping: float) -> tuple[Tensor, Tensor]:
        """Weights [out, in] and constants [out]: those of the task, where they may not change."""

    @abstractmethod
    def towards(self, x: Tensor, y: Tensor) -> _Solver:
        """The same inputs with other goals."""


class _ByInputs(_Solver):
    """By the moments of the inputs; in float32, where the damping allows it."""

    def __init__(self, task: Task, moments: _Moments) -> None:
        super().__init__(task)
        self.moments = moments
        self.mean = moments.xx[:-1, -1] / moments.rows * self.constant

    def _covariance(self) -> Tensor:
        second = self.moments.xx[:-1, :-1] / self.moments.rows
        return second.addr_(self.mean, self.mean, alpha=-1)

    @functools.cached_property
    def fine(self) -> tuple[Tensor, Tensor]:
        """The inputs' covariance, and what the weights as they are make of it."""
        second = self._covariance()
        return second, self.start @ second

    @functools.cached_property
    def coarse(self) -> tuple[Tensor, Tensor]:
        second = self._covariance().float()
        return second, self.start.float() @ second

    def solve(self, damping: float) -> tuple[Tensor, Tensor]:
        moments = self.moments
        second, explained = self.coarse if damping >= _COARSE else self.fine
        goal = moments.yx[:, -1] / moments.rows
        cross = moments.yx[:, :-1] / moments.rows
        if self.constant:
            cross = cross - torch.outer(goal, self.mean)
        else:
            cross = cross - torch.outer(self.constants, moments.xx[:-1, -1] / moments.rows)
        root = self.factored(second, damping)
        weights = self.start + torch.cholesky_solve((cross - explained).T.to(root), root).T
        return weights, goal - weights @ self.mean if self.constant else self.constants

    def towards(self, x: Tensor, y: Tensor) -> _Solver:
        other = copy.copy(self)
        other.moments = replace(self.moments, yx=outer_products(y, x)[:-1])
        return other


class _ByRows(_Solver):
    r"""The same, where there are fewer rows than inputs: :math:`(X^\top X / R + \lambda)^{-1} X^\top` is
    :math:`X^\top (X X^\top / R + \lambda)^{-1}`."""

    def __init__(self, task: Task, x: Tensor, y: Tensor) -> None:
        super().__init__(task)
        x, self.y = x.double(), y.double()
        self.mean = x.mean(0) * self.constant
        self.x = x - self.mean
        self.kernel = self.x @ self.x.T / len(x)
        self.explained = self.x @ self.start.T

    def solve(self, damping: float) -> tuple[Tensor, Tensor]:
        rows, inputs = self.x.shape
        # a share of the inputs' mean variance; the kernel has the sum of all
        root = self.factored(self.kernel, damping, rows / inputs)
        goal = self.y.mean(0) if self.constant else self.constants
        lacks = (self.y - goal - self.explained) / rows
        weights = self.start + torch.cholesky_solve(lacks, root).T @ self.x
        return weights, goal - weights @ self.mean if self.constant else self.constants

    def towards(self, x: Tensor, y: Tensor) -> _Solver:
        other = copy.copy(self)
        other.y = y.double()
        return other
