"""From the channels of consumers to neurons: reduces observed activities over everything that uses a neuron, and
scores the neurons of one dependency group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .activity import Activity
from .graph import Use

# A silent neuron that still varies by more than this share of its layer's root mean square is doing something: the
# negative side of a SiLU, or a signed feature that no activation follows. Silence alone does not make it dead.
DEAD_TOLERANCE = 0.05


@dataclass(frozen=True)
class Evidence:
    """One consumer of a group and what was observed at its input."""

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


def query_weights(module: nn.MultiheadAttention) -> Tensor:
    """What attention multiplies its query with, and key and value where these are as wide, shape [out, embed_dim]."""
    return torch.as_tensor(module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight)


def weight_norms(module: nn.Module) -> Tensor:
    """L2 norm of the weights that read each input channel of a consumer, float64, shape [in_channels].

    Grouped convolutions: input channel c is read by the filters of its own group only.
    """

    def norm(weight: Tensor, dim: int | tuple[int, ...]) -> Tensor:  # a 16-bit sum would make many neurons tie
        wide = weight if weight.element_size() >= 4 else weight.float()
        found: Tensor = torch.linalg.vector_norm(wide, dim=dim)
        return found.double()

    if isinstance(module, nn.modules.conv._ConvNd):
        weight = module.weight.detach()
        if module.transposed:  # [in, out / groups, *kernel]
            return norm(weight.flatten(1), dim=1)
        blocked = weight.reshape(module.groups, -1, weight.shape[1], weight[0, 0].numel())
        return norm(blocked, dim=(1, 3)).flatten()
    if isinstance(module, nn.MultiheadAttention):
        return norm(query_weights(module).detach(), dim=0)
    assert isinstance(module, nn.Linear)
    return norm(module.weight.detach(), dim=0)


def _contribution(evidence: Evidence) -> Tensor:
    return evidence.activity.mean_magnitude * weight_norms(evidence.use.module).to(evidence.activity.total.device)


def _variation(evidence: Evidence) -> Tensor:
    norms = weight_norms(evidence.use.module).to(evidence.activity.total.device)
    return evidence.activity.variance.sqrt() * norms


@dataclass(frozen=True)
class Score:
    """How a score is read at one consumer and reduced over all of them.

    Attributes:
        read: value per input channel of a consumer, >= 0, shape [in_channels]; None for redundancy, which takes all
            consumers together (`consumers.redundancy`).
        inside: reduction over the channels that carry one neuron at one consumer.
        across: reduction over consumers, "max" or "sum".
        formula: for the reader.
    """

    read: Callable[[Evidence], Tensor] | None
    inside: str
    across: str
    formula: str


SCORES: dict[str, Score] = {
    "redundancy": Score(None, "sum", "sum", "error of the consumers' outputs once the other neurons stand in for it"),
    "contribution": Score(_contribution, "sum", "sum", "mean |a| * ||consumer weights of the channel||_2"),
    "variation": Score(_variation, "sum", "sum", "std(a) * ||consumer weights of the channel||_2"),
    "magnitude": Score(lambda e: e.activity.mean_magnitude, "mean", "max", "mean |a|"),
    "dormancy": Score(lambda e: e.activity.dormancy, "mean", "max", "mean |a| / the layer's mean of mean |a|"),
    "firing_rate": Score(lambda e: e.activity.firing_rate, "mean", "max", "mean 1[a > theta]"),
    "sample_activity": Score(lambda e: e.activity.sample_activity, "mean", "max", "mean over samples 1[max a > theta]"),
    "entropy": Score(lambda e: e.activity.entropy, "mean", "max", "entropy of the activation histogram, bits"),
    "on_off_entropy": Score(lambda e: e.activity.on_off_entropy, "mean", "max", "entropy of firing or not, bits"),
}


def score_neurons(name: str, evidence: Sequence[Evidence], neurons: int) -> Tensor:
    """The score of each neuron of a group, low = dying, >= 0, float64, shape [n].

    Args:
        name: a key of `SCORES` other than "redundancy".
        evidence: every consumer of the group.
        neurons: n.
    """
    score = SCORES[name]
    assert score.read is not None
    found = torch.stack([e.per_neuron(score.read(e), neurons, score.inside) for e in evidence])
    return found.sum(0) if score.across == "sum" else found.amax(0)


def histograms(evidence: Sequence[Evidence], neurons: int) -> Tensor:
    """Activation histogram of each neuron, summed over its consumers and their channels; int64, shape [n, bins].

    Args:
        evidence: every consumer of the group, at least one.
        neurons: n.
    """
    found = torch.zeros(neurons, evidence[0].activity.bins, dtype=torch.int64)
    for e in evidence:
        found.index_add_(0, e.use.neurons, e.activity.histogram.cpu()[e.use.channels])
    return found


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

    A residual stream's neuron is any of these only if it is so at every consumer.

    Args:
        evidence: every consumer of the group, at least one.
        neurons: n.
    """
    silent = torch.ones(neurons, dtype=torch.bool)
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
