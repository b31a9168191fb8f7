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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dnr_plugin.linalg import TINY, factor

# Damping as a share of the mean variance. In a score: of a singular covariance; what it hides costs next to nothing.
_DAMPING = 1e-4
_DAMPINGS = (1e-7, 1e-4, 1e-3, 1e-2, 1e-1)
_PENDING = 64  # rows whose products are taken from a matrix at once: one pass over it instead of one for each neuron
_COMPACT = 0.75  # share of the neurons that remain when those removed are dropped from memory


@dataclass
class Reader:
    """A layer, or one group of a grouped convolution, that reads the neurons of a group.

    Attributes:
        covariance: of its inputs, float64, shape [F, F]; or variances alone, shape [F], where no more is known.
        weights: rows of outputs, in units that compare between layers, float64, shape [O, F].
        neurons: the neurons that it reads, shape [K].
        columns: the inputs that carry each of these, shape [K, M].
    """

    covariance: Tensor
    weights: Tensor
    neurons: Tensor
    columns: Tensor


def damages(readers: Sequence[Reader], neurons: int) -> tuple[list[int], Tensor]:
    """Removes neurons one by one, always the one that costs least, correcting what remains after each.

    Args:
        readers: all layers that read the neurons.
        neurons: n.

    Returns:
        Neurons in the order in which they go, and what each costs on top of those before, summed over all readers;
        >= 0, float64, shape [n].
    """
    constant, states = torch.zeros(neurons, dtype=torch.float64), []
    for reader in readers:
        if reader.covariance.dim() == 1:
            constant.index_add_(0, reader.neurons, _alone(reader))
        elif len(reader.neurons) == 1:  # as of a depthwise convolution, in hundreds: it has no other neuron to lose
            constant.index_add_(0, reader.neurons, _State(reader).costs())
        else:
            states.append(_State(reader))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small products, for which threads would only wait for each other
    try:
        return _one_by_one(states, constant)
    finally:
        torch.set_num_threads(threads)


def _alone(reader: Reader) -> Tensor:
    """Cost of each neuron where no other stands in for it, shape [K]."""
    damped = reader.covariance + _DAMPING * reader.covariance.mean() + TINY
    return (reader.weights.square().sum(0) * damped)[reader.columns].sum(1)


def _one_by_one(states: Sequence[_State], constant: Tensor) -> tuple[list[int], Tensor]:
    remaining = torch.ones(len(constant), dtype=torch.bool)
    order, costs = [], torch.zeros_like(constant)
    for step in range(len(constant)):
        total = constant.clone()
        for state in states:
            total.index_add_(0, state.neurons, state.costs())
        total[~remaining] = torch.inf
        gone = int(total.argmin())
        order.append(gone)
        costs[step] = total[gone].clamp_min(0.0)
        remaining[gone] = False
        for state in states:
            state.remove(gone)
    return order, costs


class _State:
    """Inverse covariance and W^T W of one reader, of the neurons that remain.

    Costs depend on W^T W alone, which is no larger for the many outputs of a wide layer.
    """

    def __init__(self, reader: Reader) -> None:
        own = reader.columns.flatten()  # what a removal does to inputs of other groups decides nothing
        weights, features = reader.weights[:, own], reader.columns.shape[1]
        inverse = torch.cholesky_inverse(factor(reader.covariance, _DAMPING))[own][:, own]
        self.inverse, self.squares = _Downdated(inverse, features), _Downdated(weights.T @ weights, features)
        self.neurons, self.stays = reader.neurons, torch.ones(len(reader.neurons), dtype=torch.bool)
        self.position = self._positions()

    def costs(self) -> Tensor:
        """Of each of `neurons`, as things are now; of those that are gone, anything. Shape [K]."""
        inverse, squares = self.inverse.blocks, self.squares.blocks
        if inverse.shape[1] == 1:
            return squares.flatten() / inverse.flatten().clamp_min(TINY)
        cost: Tensor = torch.linalg.solve(inverse, squares).diagonal(dim1=1, dim2=2).sum(1)
        return cost

    def remove(self, neuron: int) -> None:
        block = self.position.get(neuron)
        if block is None:
            return
        self.stays[block] = False
        # P being rows of C^-1, it loses P^T P_GG^-1 P, and W becomes W - W_G P_GG^-1 P
        inverse, squares = self.inverse.rows(block), self.squares.rows(block)
        span = self.inverse.span(block)
        correction = torch.linalg.solve(inverse[:, span], inverse)
        half = torch.addmm(squares, squares[:, span], correction, alpha=-0.5)
        self.inverse.subtract(inverse, correction)
        self.squares.subtract(torch.cat([correction, half]), torch.cat([half, correction]))
        self.inverse.blocks[block] = torch.eye(len(inverse), dtype=inverse.dtype)  # can be solved, if for nothing
        if int(self.stays.sum()) < _COMPACT * len(self.stays):
            self.inverse.keep(self.stays)
            self.squares.keep(self.stays)
            self.neurons, self.stays = self.neurons[self.stays], self.stays[self.stays]
            self.position = self._positions()

    def _positions(self) -> dict[int, int]:
        return {neuron: block for block, neuron in enumerate(self.neurons.tolist())}


class _Downdated:
    """A matrix from which products of a few rows are taken, many at a time; its diagonal blocks are always current.

    Attributes:
        blocks: on the diagonal, shape [K, M, M].
    """

    def __init__(self, matrix: Tensor, features: int) -> None:
        self.matrix, self.features = matrix, features
        shape = (len(matrix) // features, features)
        self.blocks = matrix.view(*shape, *shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
        self.left, self.right = torch.empty(2, _PENDING + 2 * features, len(matrix), dtype=matrix.dtype)
        self.pending = 0

    def span(self, block: int) -> slice:
        return slice(block * self.features, (block + 1) * self.features)

    def rows(self, block: int) -> Tensor:
        """Of one block, shape [M, F]."""
        own, pending = self.span(block), self.pending
        return torch.addmm(self.matrix[own], self.left[:pending, own].T, self.right[:pending], alpha=-1.0)

    def subtract(self, left: Tensor, right: Tensor) -> None:
        """Takes ``left^T right`` away, of shapes [R, F]."""
        pending = slice(self.pending, self.pending + len(left))
        self.left[pending], self.right[pending] = left, right
        self.pending = pending.stop
        by_block = (len(left), -1, self.features)
        self.blocks.baddbmm_(left.view(by_block).permute(1, 2, 0), right.view(by_block).transpose(0, 1), alpha=-1.0)
        if self.pending >= _PENDING:
            self._settle()

    def keep(self, blocks: Tensor) -> None:
        """Forgets the others; bool, shape [K]."""
        self._settle()
        kept = blocks.repeat_interleave(self.features)
        self.matrix, self.blocks = self.matrix[kept][:, kept], self.blocks[blocks]
        self.left, self.right = self.left[:, kept], self.right[:, kept]

    def _settle(self) -> None:
        self.matrix.addmm_(self.left[: self.pending].T, self.right[: self.pending], alpha=-1.0)
        self.pending = 0


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

    def fit(covariance: Tensor, damping: float) -> Tensor:
        kept = covariance[~gone][:, ~gone]
        cross = weights[:, gone] @ covariance[gone][:, ~gone]
        return torch.cholesky_solve(cross.T, factor(kept, damping)).T

    def error(change: Tensor, covariance: Tensor) -> float:
        difference = torch.empty_like(weights)
        difference[:, gone], difference[:, ~gone] = -weights[:, gone], change
        return float(((difference @ covariance) * difference).sum())

    whole, *halves = covariances
    damping = _DAMPING
    if len(halves) == 2:
        first, second = halves
        errors = {d: error(fit(first, d), second) + error(fit(second, d), first) for d in _DAMPINGS}
        damping = min(errors, key=lambda d: errors[d])
        nothing = torch.zeros_like(weights[:, ~gone])
        if errors[damping] >= error(nothing, first) + error(nothing, second):
            return nothing
    return fit(whole, damping)
