r"""Structured Optimal Brain Surgeon: what a layer loses with a neuron once the other neurons stand in for it.

With the covariance :math:`C` of a layer's inputs and its weights :math:`W`, removing the inputs :math:`G` costs

.. math:: \min_{\Delta} E\lVert \Delta x \rVert^2
          = \operatorname{tr}\bigl(W_G \, ([C^{-1}]_{GG})^{-1} \, W_G^\top\bigr),
          \qquad W \mathrel{-}= W_G ([C^{-1}]_{GG})^{-1} [C^{-1}]_{G:}

where the second formula corrects the weights that stay, a constant included. A dead neuron, a constant one and one
that others reproduce are thus one thing: nothing is lost.

Source: Hassibi and Stork, *Second order derivatives for network pruning: Optimal Brain Surgeon*, NeurIPS 1992; by
columns of a layer's weights as in Frantar and Alistarh, *Optimal Brain Compression*, NeurIPS 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnr_plugin.linalg import TINY, damped_inverse, factor, submatrix

Matrix = np.ndarray[Any, np.dtype[np.float64]]
Index = np.ndarray[Any, np.dtype[np.int64]]

# Damping as a share of the mean variance. In a score: of a singular covariance; what it hides costs next to nothing.
DAMPING = 1e-4
_DAMPINGS = (1e-7, 1e-4, 1e-3, 1e-2, 1e-1)
_SHARE, _LEAST, _MOST = 16, 64, 160  # one in so many inputs is looked at closely, but at least and at most so many
_PENDING = 48  # removals whose parts of the matrices are put together when they are needed
_COMPACT = 0.75  # share of the neurons that remain when those removed are dropped from memory


@dataclass
class Reader:
    """A layer, or one group of a grouped convolution, that reads the neurons of a group.

    Attributes:
        inverse: of the damped covariance of its inputs (`inverse_of`), float64, shape [F, F]; or of variances alone,
            shape [F], where no more is known.
        weights: rows of outputs, in units that compare between layers, float64, shape [O, F].
        neurons: the neurons that it reads, shape [K].
        columns: the inputs that carry each of these, shape [K, M].
        kept: whether the inverse is used elsewhere, and has to stay what it is.
    """

    inverse: Tensor
    weights: Tensor
    neurons: Tensor
    columns: Tensor
    kept: bool = False


def inverse_of(covariance: Tensor) -> Tensor:
    """What a `Reader` holds: the damped inverse of a covariance [F, F] or of variances [F]."""
    if covariance.dim() == 1:
        return 1.0 / (covariance + DAMPING * covariance.mean() + TINY)
    return damped_inverse(covariance, DAMPING)


def damages(readers: Iterable[Reader], neurons: int) -> tuple[list[int], Tensor]:
    """Removes neurons one by one, always the one that costs least as far as `_round` sees, correcting what remains.

    Args:
        readers: all layers that read the neurons; their inverses are overwritten.
        neurons: n.

    Returns:
        Neurons in the order in which they go, and what each costs on top of those before, summed over all readers;
        >= 0, float64, shape [n].
    """
    constant, states = torch.zeros(neurons, dtype=torch.float64), []
    for reader in readers:
        if reader.inverse.dim() == 1:
            constant.index_add_(0, reader.neurons, _alone(reader))
        elif len(reader.neurons) == 1:  # as of a depthwise convolution, in hundreds: it has no other neuron to lose
            constant.index_add_(0, reader.neurons, _State(reader, neurons).costs())
        else:
            states.append(_State(reader, neurons))
    order, costs = list[int](), list[float]()
    remaining = torch.arange(neurons)
    while len(remaining):
        gone, lost = _round(states, constant, remaining)
        order += gone
        costs += lost
        taken = torch.tensor(gone)
        remaining = remaining[~torch.isin(remaining, taken)]
        for state in states:
            state.remove(taken)
        states = [state for state in states if state.stays.any()]
    return order, torch.tensor(costs, dtype=torch.float64).clamp_min(0.0)


def _round(states: Sequence[_State], constant: Tensor, remaining: Tensor) -> tuple[list[int], list[float]]:
    """The next neurons to go, and what each costs: of the cheapest, one by one, while none of the others is cheaper.

    What those others would cost meanwhile, they cost as of the start of the round: it hardly ever falls.
    """
    total = constant.clone()
    for state in states:
        total.index_add_(0, state.neurons[state.stays], state.costs())
    each = max((state.features for state in states), default=1)
    count = min(max(len(remaining) // _SHARE, _LEAST // each, 1), max(1, _MOST // each))
    cheapest = remaining[total[remaining].argsort(stable=True)]
    few, bound = cheapest[:count], float(total[cheapest[count]]) if count < len(cheapest) else math.inf
    blocks = [block for state in states if (block := state.among(few)) is not None]
    start = constant[few].numpy().copy()
    gone, lost = list[int](), list[float]()
    while len(gone) < len(few):
        now = start.copy()
        for block in blocks:
            now[block.places] += block.costs()
        next_ = int(now.argmin())
        if gone and not now[next_] <= bound:
            break
        gone.append(next_)
        lost.append(float(now[next_]))
        start[next_] = math.inf
        for block in blocks:
            block.remove(next_)
    return few[gone].tolist(), lost


def _alone(reader: Reader) -> Tensor:
    """Cost of each neuron where no other stands in for it, shape [K]."""
    return (reader.weights.square().sum(0) / reader.inverse)[reader.columns].sum(1)


class _State:
    """Inverse covariance and weights of one reader, of the neurons that remain.

    Attributes:
        inverse: shape [K * M, K * M]; weights: with a row for each input, which lie together, shape [K * M, O].
        neurons: that it reads, shape [K]; stays: those of them that remain, bool, shape [K].
        features: M, its inputs for each.
    """

    def __init__(self, reader: Reader, neurons: int) -> None:
        own = reader.columns.flatten()  # what a removal does to inputs of other groups decides nothing
        self.features = reader.columns.shape[1]
        if torch.equal(own, torch.arange(len(reader.inverse))):  # nearly always
            self.inverse = reader.inverse.clone() if reader.kept else reader.inverse
            self.weights = reader.weights.T.clone(memory_format=torch.contiguous_format)
        else:
            self.inverse, self.weights = submatrix(reader.inverse, own, own), reader.weights.T[own]
        self.neurons, self.stays = reader.neurons, torch.ones(len(reader.neurons), dtype=torch.bool)
        self.block = torch.full((neurons,), -1)
        self.block[self.neurons] = torch.arange(len(self.neurons))
        self._known: Tensor | None = None

    def costs(self) -> Tensor:
        """Of each of `neurons` that stays, shape [K]; known until one of them goes."""
        if self._known is None:
            self._known = self._costs()
        return self._known

    def _costs(self) -> Tensor:
        if self.features == 1:
            squares: Tensor = torch.linalg.vector_norm(self.weights, dim=1).square()
            return (squares / self.inverse.diagonal().clamp_min(TINY))[self.stays]
        shape = (len(self.neurons), self.features)
        inverse = self.inverse.view(*shape, *shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[self.stays]
        weights = self.weights.view(*shape, -1)[self.stays]
        cost: Tensor = torch.linalg.solve(inverse, weights @ weights.mT).diagonal(dim1=1, dim2=2).sum(1)
        return cost

    def among(self, neurons: Tensor) -> _Block | _Singles | None:
        """Some neurons alone, by their place among these; None where it reads none of them."""
        blocks = self.block[neurons]
        places = (blocks >= 0).nonzero().flatten()
        if not len(places):
            return None
        own = self._columns(blocks[places])
        weights = self.weights.index_select(0, own)  # twice as fast as by brackets
        inverse, squares = self.inverse[own[:, None], own].numpy(), (weights @ weights.T).numpy()
        if self.features == 1:
            return _Singles(inverse, squares, places)
        return _Block(inverse, squares, places, self.features)

    def remove(self, neurons: Tensor) -> None:
        blocks = self.block[neurons]
        blocks = blocks[blocks >= 0]
        if not len(blocks):
            return
        self._known = None
        own = self._columns(blocks)
        rows = self.inverse.index_select(0, own)
        correction = torch.linalg.solve(rows.index_select(1, own), rows)
        self.weights.addmm_(correction.T, self.weights.index_select(0, own), alpha=-1.0)
        self.inverse.addmm_(rows.T, correction, alpha=-1.0)
        self.stays[blocks] = False
        self.block[neurons] = -1
        if int(self.stays.sum()) < _COMPACT * len(self.stays):
            own = self._columns(self.stays.nonzero().flatten())
            self.inverse, self.weights = submatrix(self.inverse, own, own), self.weights.index_select(0, own)
            self.neurons, self.stays = self.neurons[self.stays], self.stays[self.stays]
            self.block[self.neurons] = torch.arange(len(self.neurons))

    def _columns(self, blocks: Tensor) -> Tensor:
        return (blocks[:, None] * self.features + torch.arange(self.features)).flatten()


def _where(places: Tensor) -> slice | Index:
    """Ascending places as NumPy selects them fastest."""
    first, count = int(places[0]), len(places)
    return slice(first, first + count) if int(places[-1]) == first + count - 1 else places.numpy()


class _Singles:
    """The part of a `_State` that a few neurons with one input each need, in NumPy, whose calls take a fifth of torch's
    time. Matrices stay as they were: of what removals take from them, only rows that are needed are worked out.

    Args:
        inverse, squares: of C^-1 and of W^T W, shape [K, K].
        places: of its neurons among those looked at, ascending, shape [K].
    """

    def __init__(self, inverse: Matrix, squares: Matrix, places: Tensor) -> None:
        self.inverse, self.squares, self.places = inverse, squares, _where(places)
        self.number = {place: number for number, place in enumerate(places.tolist())}
        self.variances, self.losses = inverse.diagonal().copy(), squares.diagonal().copy()
        # P being a row of C^-1: P, P / P_G and what is taken from W^T W, of each removal
        self.rows, self.corrections, self.halves = np.empty((3, _PENDING, len(inverse)))
        self.pending = 0

    def costs(self) -> Matrix:
        """See `_Block.costs`."""
        cost: Matrix = self.losses / np.maximum(self.variances, TINY)
        return cost

    def remove(self, place: int) -> None:
        number = self.number.get(place)
        if number is None:
            return
        rows, corrections, halves = (a[: self.pending] for a in (self.rows, self.corrections, self.halves))
        row = self.inverse[number] - corrections[:, number] @ rows
        squares = self.squares[number] - corrections[:, number] @ halves - halves[:, number] @ corrections
        correction = row / row[number]
        half = squares - 0.5 * squares[number] * correction
        self.variances -= row * correction
        self.losses -= 2.0 * correction * half
        self.variances[number] = 1.0  # can be divided by, if for nothing
        for pending, value in ((self.rows, row), (self.corrections, correction), (self.halves, half)):
            pending[self.pending] = value
        self.pending += 1
        if self.pending == _PENDING:
            self.inverse = self.inverse - self.corrections.T @ self.rows
            both = self.corrections.T @ self.halves
            self.squares = self.squares - both - both.T
            self.pending = 0


class _Block:
    """The part of a `_State` that a few neurons with several inputs each need.

    Attributes:
        inverse, squares: of C^-1 and of W^T W, shape [K * M, K * M].
        places: of its neurons among those looked at, shape [K].
    """

    def __init__(self, inverse: Matrix, squares: Matrix, places: Tensor, features: int) -> None:
        self.inverse, self.squares, self.places, self.features = inverse, squares, _where(places), features
        self.number = {place: number for number, place in enumerate(places.tolist())}

    def costs(self) -> Matrix:
        """Of each of its neurons, as things are now; of those that are gone, anything. Shape [K]."""
        blocks = np.arange(len(self.inverse)).reshape(-1, self.features)
        inverse, squares = (m[blocks[:, :, None], blocks[:, None]] for m in (self.inverse, self.squares))
        cost: Matrix = np.trace(np.linalg.solve(inverse, squares), axis1=1, axis2=2)
        return cost

    def remove(self, place: int) -> None:
        number = self.number.get(place)
        if number is None:
            return
        span = slice(number * self.features, (number + 1) * self.features)
        # P being rows of C^-1, it loses P^T P_GG^-1 P, and W becomes W - W_G P_GG^-1 P
        inverse, squares = self.inverse[span], self.squares[span]
        own = inverse[:, span]
        correction = np.linalg.solve(own, inverse)
        half = squares - 0.5 * squares[:, span] @ correction
        self.inverse -= inverse.T @ correction
        self.squares -= np.concatenate([correction, half]).T @ np.concatenate([half, correction])
        self.inverse[span, span] = np.eye(self.features)  # can be solved, if for nothing


def reproduce(covariances: Sequence[Tensor], gone: Tensor, weights: Tensor) -> Tensor:
    """Weights of the remaining inputs that best reproduce what the removed ones contributed.

    Args:
        covariances: of all inputs, shape [F, F] each: of all samples, then, for the choice of a damping, of one half of
            them and of the other; or of all samples alone.
        gone: which inputs go, bool, shape [F].
        weights: of all inputs, float64, shape [O, F].

    Returns:
        What to add to the weights of the inputs that stay, shape [O, F - |gone|]; nothing where each half is served
        worse by every fit to the other.
    """

    stays = (~gone).nonzero().flatten()

    def fit(covariance: Tensor, damping: float) -> Tensor:
        kept = submatrix(covariance, stays, stays)
        cross = weights[:, gone] @ submatrix(covariance, gone.nonzero().flatten(), stays)
        return torch.cholesky_solve(cross.T, factor(kept, damping)).T

    def error(change: Tensor, covariance: Tensor) -> float:
        difference = torch.empty_like(weights)
        difference[:, gone], difference[:, ~gone] = -weights[:, gone], change
        return float(((difference @ covariance) * difference).sum())

    whole, *halves = covariances
    damping = DAMPING
    if len(halves) == 2:
        first, second = halves
        errors = {d: error(fit(first, d), second) + error(fit(second, d), first) for d in _DAMPINGS}
        damping = min(errors, key=lambda d: errors[d])
        nothing = torch.zeros_like(weights[:, ~gone])
        if errors[damping] >= error(nothing, first) + error(nothing, second):
            return nothing
    return fit(whole, damping)
