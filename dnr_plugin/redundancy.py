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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RunError

# Damping as a share of the mean variance. In a score: of a singular covariance; what it hides costs next to nothing.
_DAMPING = 1e-4
_DAMPINGS = (1e-7, 1e-4, 1e-3, 1e-2, 1e-1)
_TINY = 1e-30
_COMPACT = 0.75  # share of the inputs that are left when those removed are dropped from memory


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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small products, for which threads would only wait for each other
    try:
        return _one_by_one([_State(reader) for reader in readers], neurons)
    finally:
        torch.set_num_threads(threads)


def _one_by_one(states: Sequence[_State], neurons: int) -> tuple[list[int], Tensor]:
    left = torch.ones(neurons, dtype=torch.bool)
    order, costs = [], torch.zeros(neurons, dtype=torch.float64)
    for step in range(neurons):
        total = torch.zeros(neurons, dtype=torch.float64)
        for state in states:
            total.index_add_(0, state.neurons, state.costs())
        total[~left] = torch.inf
        gone = int(total.argmin())
        order.append(gone)
        costs[step] = total[gone].clamp_min(0.0)
        left[gone] = False
        for state in states:
            state.remove(gone)
    return order, costs


class _State:
    """Inverse covariance and corrected weights of one reader, of the neurons that are left."""

    def __init__(self, reader: Reader) -> None:
        own = reader.columns.flatten()  # what a removal does to inputs of other groups decides nothing
        weights = reader.weights[:, own]
        # costs depend on W^T W alone, which a square matrix has as well as the many outputs of a wide layer
        tall = len(weights) > weights.shape[1]
        self.weights = torch.linalg.qr(weights, mode="r").R if tall else weights
        self.neurons, self.columns = reader.neurons, torch.arange(len(own)).view_as(reader.columns)
        self.known = reader.covariance.dim() == 2
        if self.known:
            self.inverse = torch.cholesky_inverse(factor(reader.covariance, _DAMPING))[own][:, own]
            self.stays = torch.ones(len(own), dtype=torch.bool)
        else:  # nothing stands in for anything
            damped = reader.covariance + _DAMPING * reader.covariance.mean() + _TINY
            self.alone = (self.weights.square().sum(0) * damped[own])[self.columns].sum(1)

    def costs(self) -> Tensor:
        """Of each neuron that is left, as things are now; shape [K]."""
        if not self.known:
            return self.alone
        if self.columns.shape[1] == 1:
            column = self.columns[:, 0]
            return self.weights.square().sum(0)[column] / self.inverse.diagonal()[column].clamp_min(_TINY)
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]  # [K, M, M]
        weights = self.weights[:, self.columns].permute(1, 2, 0)  # [K, M, O]
        cost: Tensor = (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))
        return cost

    def remove(self, neuron: int) -> None:
        others = self.neurons != neuron
        if others.all():
            return
        gone = self.columns[~others].flatten()
        self.neurons, self.columns = self.neurons[others], self.columns[others]
        if not self.known:
            self.alone = self.alone[others]
            return
        correction = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])  # [M, F]
        self.weights.addmm_(self.weights[:, gone], correction, alpha=-1.0)
        self.inverse.addmm_(self.inverse[:, gone], correction, alpha=-1.0)
        self.weights[:, gone] = 0.0
        self.inverse[gone] = 0.0
        self.inverse[:, gone] = 0.0
        self.stays[gone] = False
        if int(self.stays.sum()) < _COMPACT * len(self.stays):
            kept = self.stays.nonzero().flatten()
            self.columns = (self.stays.cumsum(0) - 1)[self.columns]
            self.weights, self.inverse = self.weights[:, kept], self.inverse[kept][:, kept]
            self.stays = self.stays[kept]


def factor(moments: Tensor, damping: float) -> Tensor:
    """Cholesky factor of second moments, damped.

    Args:
        moments: float64, shape [F, F]; positive semi-definite up to the rounding of float32 products.
        damping: share of their mean diagonal that is added to it; ten times as much, and so on, where rounding left
            more below zero.

    Raises:
        RunError: they are not finite.
    """
    size = float(moments.diagonal().abs().mean()) if len(moments) else 0.0
    found: Tensor
    for _ in range(20 if math.isfinite(size) else 0):
        damped = moments.clone()
        damped.diagonal().add_(damping * size + _TINY)
        found, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return found
        damping *= 10.0
    raise RunError("second moments: expected finite ones, found others: activations are too large for float32")


def reproduce(covariances: Sequence[Tensor], gone: Tensor, weights: Tensor) -> Tensor:
    """Weights of the remaining inputs that best reproduce what the removed ones contributed.

    Args:
        covariances: of all inputs, shape [F, F] each: of all samples, then, for the choice of a damping, of one half of
            them and of the other; or of all samples alone.
        gone: which inputs go, bool, shape [F].
        weights: of all inputs, float64, shape [O, F].

    Returns:
        What to add to the weights of the inputs that stay, shape [O, F - |gone|].
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
        one, other = halves
        found = {d: error(fit(one, d), other) + error(fit(other, d), one) for d in _DAMPINGS}
        damping = min(found, key=lambda d: found[d])
    return fit(whole, damping)
