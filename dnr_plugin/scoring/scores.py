"""Scores of neurons: each is read at every consumer of a dependency group and reduced over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnr_plugin.errors import did_you_mean
from dnr_plugin.network.kinds import consumer
from dnr_plugin.scoring.evidence import Evidence


def _contribution(evidence: Evidence) -> Tensor:
    return evidence.activity.mean_magnitude * consumer(evidence.use.module).norms().to(evidence.activity.total.device)


def _variation(evidence: Evidence) -> Tensor:
    norms = consumer(evidence.use.module).norms().to(evidence.activity.total.device)
    return evidence.activity.variance.sqrt() * norms


@dataclass(frozen=True)
class Score:
    """How a score is read at one consumer and reduced over all of them.

    Attributes:
        read: value per input channel of a consumer, >= 0, shape [in_channels]; None for redundancy, which takes all
            consumers together (`redundancy.redundancy`).
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
    values = torch.stack([e.per_neuron(score.read(e), neurons, score.inside) for e in evidence])
    return values.sum(0) if score.across == "sum" else values.amax(0)


def lexicographic(first: Tensor, second: Tensor) -> Tensor:
    """Indices that sort by ``first``, then ``second``, then position."""
    by_second = second.argsort(stable=True)
    return by_second[first[by_second].argsort(stable=True)]


def check_settings(
    score: str,
    normalizer: Any,
    moments: bool,
    max_pruning_ratio: float,
    min_channels: int,
    threshold: float,
    prior: float,
) -> None:
    """Refuses what `importance.DyingNeuronImportance` cannot score by.

    Raises:
        ValueError: an argument is out of range or unknown.
    """
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, found {score!r}{did_you_mean(score, SCORES)}")
    if isinstance(normalizer, str) and normalizer not in ("auto", "mean", "max"):
        raise ValueError(f"normalizer: expected 'auto', 'mean', 'max', None or a function, found {normalizer!r}")
    if score == "redundancy" and not moments:
        raise ValueError("moments: expected True for score 'redundancy', found False")
    for name, value, fits, expected in (
        ("max_pruning_ratio", max_pruning_ratio, 0.0 < max_pruning_ratio <= 1.0, "a number in (0, 1]"),
        ("min_channels", min_channels, min_channels >= 1, "at least 1"),
        ("threshold", threshold, threshold >= 0.0, "at least 0"),
        ("prior", prior, 0.0 <= prior < math.inf, "a number of at least 0"),
    ):
        if not fits:
            raise ValueError(f"{name}: expected {expected}, found {value}")


def best_units(score: Tensor, unit: Tensor, part: Tensor, first: int, ratio: float, least: int) -> Tensor:
    """The units of each part of a group that stay whatever is asked for: those with the highest mean score.

    Args:
        score: of each neuron, float64, shape [n].
        unit: number of the unit of each neuron, shape [n]; part: of the part of each unit, shape [units].
        first: units of the group when it was first scored.
        ratio: largest share of these that may go, in (0, 1].
        least: units of each part that stay, >= 1.

    Returns:
        Bool, shape [units].
    """
    size = len(part)
    kept = torch.zeros(size, dtype=torch.bool)
    mean = torch.zeros(size, dtype=score.dtype).scatter_reduce(0, unit, score, "mean", include_self=False)
    for number in range(int(part.max()) + 1):
        own = (part == number).nonzero().flatten()
        count = min(len(own), max(least, math.ceil(first * len(own) / size * (1.0 - ratio) - 1e-9)))
        kept[own[mean[own].argsort()[len(own) - count :]]] = True
    return kept
