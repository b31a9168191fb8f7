"""Redundancy of a group's neurons: what their consumers lose once the other neurons stand in for them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.network.batchnorm import affine, norm_behind
from dnr_plugin.network.dependencies import Unscored, Use
from dnr_plugin.network.kinds import consumer
from dnr_plugin.observation.moments import Moments
from dnr_plugin.scoring.brain_surgeon import DAMPING, Reader, damages, inverse_of
from dnr_plugin.scoring.evidence import Evidence


def readers(graph: tp.DependencyGraph, evidence: Sequence[Evidence]) -> Iterator[Reader]:
    """A group's consumers as `brain_surgeon.damages` takes them, made one after the other.

    Outputs count in units of what follows: behind a BatchNorm, as it scales them; else relative to their own spread.

    Args:
        graph: of the model.
        evidence: every consumer of the group; variances stand in for second moments where there are none.

    Yields:
        One reader for each tensor that is read, as by query, key and value, or for each of its blocks, or of the groups
        of a convolution.

    Raises:
        Unscored: neurons with different numbers of channels at one consumer.
    """
    for first, *others in _by_tensor(evidence):
        own = _readers(graph, first)
        if others and len(own) == 1:
            weights = [own[0].weights]
            for e in others:
                (reader,) = _readers(graph, e, own[0].inverse)
                weights.append(reader.weights)
            own = [replace(own[0], weights=torch.cat(weights))]
        else:
            own += [reader for e in others for reader in _readers(graph, e)]
        yield from own


def _by_tensor(evidence: Sequence[Evidence]) -> list[list[Evidence]]:
    """Consumers that read the same channels of one tensor together, each of them as a whole."""
    alike: list[list[Evidence]] = []
    for e in evidence:
        mine, use = e.activity.moments, e.use
        for others in alike:
            theirs, there = others[0].activity.moments, others[0].use
            if (
                isinstance(mine, Moments)
                and isinstance(theirs, Moments)
                and mine.sums.data_ptr() == theirs.sums.data_ptr()
                and consumer(use.module).blocks == consumer(there.module).blocks == 1
                and torch.equal(use.neurons, there.neurons)
                and torch.equal(use.channels, there.channels)
            ):
                others.append(e)
                break
        else:
            alike.append([e])
    return alike


def _readers(graph: tp.DependencyGraph, e: Evidence, inverse: Tensor | None = None) -> list[Reader]:
    """Of one consumer; with the inverse, if it is known already."""
    module, moments = e.use.module, e.activity.moments
    features = 1 if moments is None else moments.features
    matrices = consumer(module).matrices(features)
    scale = _scale(graph, module)
    # several groups of a concatenation share what it takes long to invert
    shared = moments is not None and len(matrices) == 1 and len(e.use.channels) < e.activity.channels
    readers = []
    for number, (weights, parts) in enumerate(zip(matrices, _parts(e, len(matrices)), strict=True)):
        start = parts[0].first
        columns = [slice((p.first - start) * features, (p.first - start + p.size) * features) for p in parts]
        if not any(part.here.any() for part in parts):
            continue
        if scale is None:
            variance = torch.zeros(len(weights), dtype=torch.float64)
            for part, inside in zip(parts, columns, strict=True):
                own, some = part.covariance(), weights[:, inside]
                variance += ((some @ own if own.dim() == 2 else some * own) * some).sum(1)
            scaled = weights / variance.mean().clamp_min(1e-30).sqrt() * consumer(module).share ** 0.5
        else:
            outputs = scale.chunk(len(matrices))[number]
            scaled = weights * outputs.repeat_interleave(len(weights) // len(outputs))[:, None]
        for part, inside in zip(parts, columns, strict=True):
            by_count = _by_count(e.use.neurons[part.here], e.use.channels[part.here] - part.first)
            if len(by_count) > 1 and len(parts) == 1:
                raise Unscored("its neurons have different numbers of channels at one layer")
            for neurons, channels in by_count:  # the channels of a few lie in two blocks
                known = part.moments.inverse(DAMPING) if shared and part.moments else inverse
                own = (channels[:, :, None] * features + torch.arange(features)).flatten(1)
                used = inverse_of(part.covariance()) if known is None else known
                readers.append(Reader(used, scaled[:, inside], neurons, own, kept=known is not None))
    return readers


@dataclass(frozen=True)
class _Part:
    """Channels of a consumer of which it is known how they go together, beside others that count as independent.

    Attributes:
        first, size: of its channels.
        here: which pairs of ``Evidence.use`` are of these.
        covariance: of their inputs, float64, shape [F, F]; or variances, shape [F], where no more is known.
        moments: theirs alone, or None.
    """

    first: int
    size: int
    here: Tensor
    covariance: Callable[[], Tensor]
    moments: Moments | None


def _parts(e: Evidence, matrices: int) -> list[list[_Part]]:
    """Those of each of a consumer's groups."""
    moments, channels = e.activity.moments, e.use.channels

    def part(first: int, size: int, covariance: Callable[[], Tensor], own: Moments | None) -> _Part:
        here = (channels >= first) & (channels < first + size)
        return _Part(first, size, here, functools.cache(covariance), own)

    @functools.cache
    def whole() -> Tensor:
        # groups that are too wide for moments: nothing is known of how their inputs go together
        return _covariance(moments) if isinstance(moments, Moments) else e.activity.variance.cpu()

    if moments is not None and (matrices == 1 or len(moments.blocks) == matrices):
        parts, first = [], 0
        for block in moments.blocks:
            parts.append(part(first, block.channels, partial(_covariance, block), block))
            first += block.channels
        return [parts] if matrices == 1 else [[own] for own in parts]
    size, features = e.activity.channels // matrices, moments.features if isinstance(moments, Moments) else 1

    def inside(first: int) -> Tensor:
        own = slice(first * features, (first + size) * features)
        return whole()[(own,) * whole().dim()]

    return [[part(first, size, partial(inside, first), None)] for first in range(0, matrices * size, size)]


def _covariance(moments: Moments) -> Tensor:
    return moments.mean_and_covariance()[1]


def _by_count(neurons: Tensor, channels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Neurons with as many channels as each other, shape [K], and their channels, shape [K, M], for each M."""
    order = neurons.argsort(stable=True)
    names, counts = torch.unique(neurons, return_counts=True)
    of_neuron = dict(zip(names.tolist(), torch.split(channels[order], counts.tolist()), strict=True))
    return [
        (names[counts == count], torch.stack([of_neuron[name] for name in names[counts == count].tolist()]))
        for count in counts.unique().tolist()
    ]


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
        if moments is None:
            parts.append(e.activity.variance)
        else:
            parts += [part for own in moments.blocks for part in (own.sums[:, -1], own.sums.diagonal(0, 1, 2))]
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
