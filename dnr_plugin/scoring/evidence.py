"""From the channels of consumers to neurons: what was observed of them, and which of them are dead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dnr_plugin.network.dependencies import Use
from dnr_plugin.observation.activity import Activity

# A silent neuron that still varies by more than this share of its layer's root mean square is doing something: the
# negative side of a SiLU, or a signed feature that no activation follows. Silence alone does not make it dead.
DEAD_TOLERANCE = 0.05


@dataclass(frozen=True)
class Evidence:
    """One consumer of a group and what was observed at its input.

    Attributes:
        use: the consumer, and which of its channels carry which neurons.
        activity: of all its input channels.
    """

    use: Use
    activity: Activity

    def per_neuron(self, channels: Tensor, neurons: int, how: str) -> Tensor:
        """Reduces a value per input channel to one per neuron within this consumer.

        Args:
            channels: shape [in_channels].
            neurons: n, the number of neurons of the group.
            how: "mean", "sum", "amax" or "amin"; after a flatten a neuron has many channels.

        Returns:
            Shape [n], float64; 0 where a neuron has no channel here ("sum", "mean"), the smallest or largest number
            where the others would win ("amax", "amin").
        """
        start = {"amax": -torch.inf, "amin": torch.inf}.get(how, 0.0)
        out = torch.full((neurons,), start, dtype=torch.float64)
        value = channels.detach().cpu().double()[self.use.channels]
        return out.scatter_reduce_(0, self.use.neurons, value, reduce=how, include_self=how != "mean")


def histograms(evidence: Sequence[Evidence], neurons: int) -> Tensor:
    """Activation histogram of each neuron, summed over its consumers and their channels; int64, shape [n, bins].

    Args:
        evidence: every consumer of the group, at least one.
        neurons: n.
    """
    counts = torch.zeros(neurons, evidence[0].activity.bins, dtype=torch.int64)
    for e in evidence:
        counts.index_add_(0, e.use.neurons, e.activity.histogram.cpu()[e.use.channels])
    return counts


def read(evidence: Sequence[Evidence], neurons: int) -> Tensor:
    """Neurons that some consumer carries a channel of; bool, shape [n]."""
    carried = torch.zeros(neurons, dtype=torch.bool)
    for e in evidence:
        carried[e.use.neurons] = True
    return carried


@dataclass(frozen=True)
class Verdict:
    """What the observed samples say about each of n neurons; bool tensors of shape [n].

    Attributes:
        samples: the fewest samples that any consumer saw.
        silent: ``r_c = 0`` at every consumer, over all samples.
        zero: ``max |a| = 0`` at every consumer: removing it changes nothing.
        constant: ``max a = min a`` up to float32 rounding at every consumer; includes zero.
        dead: silent, and hardly varying (`DEAD_TOLERANCE`): all it does is to add a constant.
    """

    samples: int
    silent: Tensor
    zero: Tensor
    constant: Tensor
    dead: Tensor


def judge(evidence: Sequence[Evidence], neurons: int) -> Verdict:
    """Decides which neurons of a group are silent, zero, constant and dead.

    A residual stream's neuron is any of these only if it is so at every consumer; one of which no consumer carries a
    channel is not judged: it is none of these.

    Args:
        evidence: every consumer of the group, at least one.
        neurons: n.
    """
    silent = read(evidence, neurons)
    zero, constant, still = silent.clone(), silent.clone(), silent.clone()
    for e in evidence:
        activity = e.activity
        high, low = e.per_neuron(activity.highest, neurons, "amax"), e.per_neuron(activity.lowest, neurons, "amin")
        fired = e.per_neuron(activity.fired_samples, neurons, "amax")
        silent &= fired <= 0
        zero &= (high <= 0) & (low >= 0)
        spread = activity.highest - activity.lowest
        size = torch.maximum(activity.highest.abs(), activity.lowest.abs())
        constant &= e.per_neuron(spread - 1e-6 * size, neurons, "amax") <= 0
        rms = (activity.total_square.mean() / max(activity.values, 1)).sqrt()
        still &= e.per_neuron(activity.variance.sqrt(), neurons, "amax") <= DEAD_TOLERANCE * float(rms)
    samples = min(e.activity.samples for e in evidence)
    return Verdict(samples, silent, zero, constant, silent & (still | constant))
