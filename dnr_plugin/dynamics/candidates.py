"""The past of neurons of which some wait for their removal."""

from __future__ import annotations

import torch
from torch import Tensor

from dnr_plugin.observation.history import NeuronHistory


class CandidateHistory(NeuronHistory):
    """A `NeuronHistory` that also knows which neurons are candidates for removal.

    Attributes:
        waiting: checks since a neuron became a candidate; -1 for none. int64, shape [n].
        nominated_dead: whether it was dead when it became one; bool, shape [n].
    """

    _TENSORS = (*NeuronHistory._TENSORS, "waiting", "nominated_dead")

    def __init__(self, neurons: int, bins: int) -> None:
        super().__init__(neurons, bins)
        self.waiting = torch.full((neurons,), -1, dtype=torch.int64)
        self.nominated_dead = torch.zeros(neurons, dtype=torch.bool)

    @property
    def candidates(self) -> Tensor:
        """Neurons that wait for their removal; bool, shape [n]."""
        return self.waiting >= 0
