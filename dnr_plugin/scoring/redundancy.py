"""Redundancy of a group's neurons: what their consumers lose once the other neurons stand in for them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.network.batchnorm import affine, norm_behind
from dnr_plugin.network.dependencies import Unscored, Use
from dnr_plugin.network.kinds import consumer
from dnr_plugin.scoring.brain_surgeon import DAMPING, Reader, damages, inverse_of
from dnr_plugin.scoring.evidence import Evidence


def readers(graph: tp.DependencyGraph, evidence: Sequence[Evidence]) -> list[Reader]:
    """A group's consumers as `brain_surgeon.damages` takes them.

    Outputs count in units of what follows: behind a BatchNorm, as it scales them; else relative to their own spread.

    Args:
        graph: of the model.
        evidence: every consumer of the group; variances stand in for second moments where there are none.

    Returns:
        One reader for each consumer, or for each of its groups that read the neurons.

    Raises:
        Unscored: neurons with different numbers of channels at one consumer.
    """
    return [reader for e in evidence for reader in _readers(graph, e)]


def _readers(graph: tp.DependencyGraph, e: Evidence) -> list[Reader]:
    module, moments = e.use.module, e.activity.moments
    features = 1 if moments is None else moments.features
    matrices = consumer(module).matrices(features)
    scale = _scale(graph, module)
    size = e.activity.channels // len(matrices)
    # several groups of a concatenation share what it takes long to invert
    shared = moments if len(matrices) == 1 and len(e.use.channels) < e.activity.channels else None

    @functools.cache
    def covariance() -> Tensor:
        # too wide for moments: nothing is known of how its inputs go together
        return e.activity.variance.cpu() if moments is None else moments.mean_and_covariance()[1]

    def inside(part: slice) -> Tensor:
        return covariance()[(part,) * covariance().dim()]

    by_matrix = []
    for number, weights in enumerate(matrices):
        here = (e.use.channels // size) == number
        if not here.any():
            continue
        start = number * size
        part = slice(start * features, (start + size) * features)
        if scale is None:
            own = inside(part)
            explained = weights @ own if own.dim() == 2 else weights * own
            spread = (explained * weights).sum(1).mean().clamp_min(1e-30).sqrt()
            scaled = weights / spread * consumer(module).share ** 0.5
        else:
            outputs = scale.chunk(len(matrices))[number]
            scaled = weights * outputs.repeat_interleave(len(weights) // len(outputs))[:, None]
        neurons, counts = torch.unique(e.use.neurons[here], return_counts=True)
        if len(counts.unique()) > 1:
            raise Unscored("its neurons have different numbers of channels at one layer")
        order = e.use.neurons[here].argsort(stable=True)
        channels = (e.use.channels[here] - start)[order].view(len(neurons), -1)
        columns = (channels[:, :, None] * features + torch.arange(features)).flatten(1)
        inverse = inverse_of(inside(part)) if shared is None else shared.inverse(DAMPING)
        by_matrix.append(Reader(inverse, scaled, neurons, columns))
    return by_matrix


def _scale(graph: tp.DependencyGraph, module: nn.Module) -> Tensor | None:
    """What a following BatchNorm multiplies each output with, float64, shape [out]; None where none follows."""
    norm = norm_behind(graph, module)
    if norm is None:
        return None
    return affine(norm)[0].abs().cpu()


class Redundancy:
    """What removing each neuron costs when the one that costs least always goes first, and others stand in for it.

    What a group came to is remembered while nothing that it depends on changes, for plans of several targets.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[bytes, Tensor]] = {}

    def of(self, root: str, graph: tp.DependencyGraph, evidence: Sequence[Evidence], unit: Tensor) -> Tensor:
        """A group's neurons.

        Args:
            root: its root layer, by which it is remembered.
            graph: of the model.
            evidence: every consumer of the group, with second moments.
            unit: number of the unit that each neuron is tied to (`units.ties`), int64, shape [n].

        Returns:
            Ascending in the order in which they go, the same for neurons that are tied; >= 0, float64, shape [n].
        """
        digest = _digest(graph, evidence, unit)
        if root not in self._known or self._known[root][0] != digest:
            _, unit = torch.unique(unit, return_inverse=True)
            order, costs = damages(readers(graph, [_of_units(e, unit) for e in evidence]), int(unit.max()) + 1)
            score = torch.empty_like(costs)
            score[order] = costs.cummax(0).values
            self._known[root] = digest, score[unit]
        return self._known[root][1].clone()


def _digest(graph: tp.DependencyGraph, evidence: Sequence[Evidence], unit: Tensor) -> bytes:
    """Of all that the score of a group depends on: ties, channels, weights, scales and statistics."""
    digest = hashlib.blake2b(unit.numpy().tobytes())
    for e in evidence:
        moments, scale = e.activity.moments, _scale(graph, e.use.module)
        parts = [e.use.neurons, e.use.channels, *consumer(e.use.module).matrices(moments.features if moments else 1)]
        parts += [e.activity.variance] if moments is None else [moments.sums[:, -1], moments.sums.diagonal(0, 1, 2)]
        for part in parts if scale is None else [*parts, scale]:
            digest.update(str(part.shape).encode())
            digest.update(part.cpu().contiguous().numpy().data)
    return digest.digest()


def _of_units(e: Evidence, unit: Tensor) -> Evidence:
    """A consumer with its channels numbered by units, each once: tied neurons are carried by the same channels."""
    pairs = torch.stack([unit[e.use.neurons], e.use.channels], 1)
    if len(unit) > int(unit.max()) + 1:
        pairs = torch.unique(pairs, dim=0)
    return replace(e, use=Use(e.use.module, pairs[:, 1], pairs[:, 0]))
