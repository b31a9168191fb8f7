"""What the checks of a layer's neurons have found so far, neuron by neuron."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dnr_plugin.observation.entropy import drift_bits, entropy_bits

if TYPE_CHECKING:
    from typing_extensions import Self


class NeuronHistory:
    """The past of the n neurons of one dependency group; every tensor has shape [n] and follows removals.

    Attributes:
        checks: how often the neurons were judged.
        dead: at the last check; bool.
        dead_checks: checks at which it was dead; int64, as the next four.
        dead_run: how many checks in a row, the last one included.
        deaths: how often it was dead without having been so at the check before.
        reactivations: how often it was not dead after having been so at the check before.
        first_death: the first check at which it was dead, from 1; 0 for never.
        entropy: bits of its activation histogram at the last check; float64.
        drift: Kullback-Leibler divergence of its histogram against the check before, bits; NaN at the first.
        falling: whether the entropy is lower than at the check before; bool.
    """

    _TENSORS: tuple[str, ...] = (
        "dead", "dead_checks", "dead_run", "deaths", "reactivations", "first_death", "entropy", "drift", "falling",
        "histogram",
    )  # fmt: skip

    def __init__(self, neurons: int, bins: int) -> None:
        self.checks = 0
        self.dead = torch.zeros(neurons, dtype=torch.bool)
        self.dead_checks, self.dead_run, self.deaths, self.reactivations, self.first_death = torch.zeros(
            5, neurons, dtype=torch.int64
        )
        self.entropy = torch.zeros(neurons, dtype=torch.float64)
        self.drift = torch.full((neurons,), torch.nan, dtype=torch.float64)
        self.falling = torch.zeros(neurons, dtype=torch.bool)
        self.histogram = torch.zeros(neurons, bins, dtype=torch.int64)

    @property
    def alive_share(self) -> Tensor:
        """Share of the checks at which a neuron was not dead, in (0, 1], float64, shape [n].

        ``(checks alive + 1) / (checks + 1)``: 1 for one that never was, and few checks say little.
        """
        alive: Tensor = self.checks - self.dead_checks
        return (alive.double() + 1.0) / (self.checks + 1)

    def update(self, dead: Tensor, histogram: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a check.

        Args:
            dead: bool, shape [n].
            histogram: activation counts since the last check, shape [n, bins].

        Returns:
            Which neurons have died and which have reactivated since the last check; bool, shape [n] each.
        """
        self.checks += 1
        died, reactivated = dead & ~self.dead, ~dead & self.dead
        self.deaths += died
        self.reactivations += reactivated
        self.dead_checks += dead
        self.dead_run = torch.where(dead, self.dead_run + 1, 0)
        self.first_death = torch.where(died & (self.first_death == 0), self.checks, self.first_death)
        entropy = entropy_bits(histogram)
        if self.checks > 1:
            self.drift = drift_bits(histogram, self.histogram)
            self.falling = entropy < self.entropy
        self.dead, self.entropy, self.histogram = dead, entropy, histogram
        return died, reactivated

    def without(self, gone: Iterable[int]) -> Tensor:
        """Indices of the neurons that remain once these go, ascending."""
        remaining = torch.ones(len(self.dead), dtype=torch.bool)
        remaining[list(gone)] = False
        return remaining.nonzero().flatten()

    def keep(self, neurons: Tensor) -> None:
        """Follows a removal: only these neurons exist from now on, in this order; indices of shape [K]."""
        for name in self._TENSORS:
            setattr(self, name, getattr(self, name)[neurons])

    def kept(self, neurons: Tensor) -> Self:
        """What `keep` would leave; this history stays as it is."""
        history = copy.copy(self)
        history.keep(neurons)
        return history

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain numbers."""
        return {"checks": self.checks, **{name: getattr(self, name).clone() for name in self._TENSORS}}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The history whose `state_dict` this is."""
        neurons, bins = state["histogram"].shape
        history = cls(neurons, bins)
        history.checks = state["checks"]
        for name in cls._TENSORS:
            setattr(history, name, state[name].clone())  # updated in place
        return history
