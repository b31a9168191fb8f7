"""Second moments of what a layer reads: by these redundancy is judged and weights are corrected."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.linalg import add_outer_products, damped_inverse, mirror, submatrix
from dnr_plugin.network.kinds import consumer

# Patches of up to this many values are read whole; of wider layers, and transposed ones, channels alone.
MAX_PATCH = 1152
# Of layers that read more than this, moments of all inputs together would outgrow memory; blocks are of so many.
MAX_FEATURES, BLOCK = 2048, 1024
# Rows that are read of small and of large batches, and of each sample in between;
_FEW, _MANY, _PER_SAMPLE = 512, 2048, 16
# once there are so many for each input, and in all, this share of them.
_ENOUGH, _LEAST, _LATER = 16, 16384, 0.125
_ROUNDING = 1e-6  # of sums of float32 products


class Moments:
    r"""Running second moments :math:`H = E[x x^\top]` and means of the inputs x that a layer's outputs read.

    For a convolution x is the patch that its kernel covers, zero padding included, where patches are small; else a
    position's channels. Sums are float64, over a bounded number of positions of every batch, drawn by the batch's
    number; over an eighth as many once there are 16 for each input, and 16,384 in all. Batches go into two halves in
    turn, so that what one half suggests can be checked on the other.

    Args:
        channels: C.
        features: values of a channel that are kept apart (`layer_kind.Consumer.features`).
        device: of the sums.

    Attributes:
        sums: of [x, 1] times itself for each half, float64, shape [2, C * features + 1, C * features + 1].
        batches: seen so far.
    """

    def __init__(self, channels: int, features: int, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.batches = self._rows_read = 0
        self._earlier = 0, 0  # batches and rows of what this goes on from
        size = channels * features + 1
        self._inverse: tuple[int, float, Tensor] | None = None
        self._sums = torch.zeros(2, size, size, dtype=torch.float64, device=device)
        self._mirrored = True
        # of each half, rows that are too few to be worth a product
        self._pending: tuple[list[Tensor], list[Tensor]] = [], []

    @property
    def sums(self) -> Tensor:
        for half in (0, 1):
            self._multiply(half)
        if not self._mirrored:  # once, however many batches were added
            for half in self._sums:
                mirror(half)
            self._mirrored = True
        return self._sums

    @property
    def channels(self) -> int:
        return (self._sums.shape[1] - 1) // self.features

    @property
    def rows(self) -> int:
        """Positions read."""
        return round(float(self.sums[:, -1, -1].sum()))

    @torch.no_grad()
    def update(self, module: nn.Module, a: Tensor) -> None:
        """Adds a batch.

        Args:
            module: the layer.
            a: its input.
        """
        self.add(self.read(module, a))

    def add(self, x: Tensor) -> None:
        """Adds the rows that were read of a batch, shape [R, C * features]."""
        half = (self._earlier[0] + self.batches) % 2
        self._pending[half].append(x)
        if sum(map(len, self._pending[half])) >= _FEW:
            self._multiply(half)
        self.batches += 1
        self._rows_read += len(x)

    def go_on_from(self, other: Moments) -> None:
        """Counts on where others end, with which this will be merged, so that other positions are drawn."""
        self._earlier = other.batches, other._rows_read

    def _multiply(self, half: int) -> None:
        if self._pending[half]:
            add_outer_products(self._sums[half], torch.cat(self._pending[half]))
            self._pending[half].clear()
            self._mirrored = False

    def read(self, module: nn.Module, a: Tensor) -> Tensor:
        """What counts of the input of the next batch, in float32 or wider, shape [R, in * features]."""
        x = self._rows(module, a.detach())
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _rows(self, module: nn.Module, a: Tensor) -> Tensor:
        batches, rows_read = self._earlier[0] + self.batches, self._earlier[1] + self._rows_read
        generator = torch.Generator().manual_seed(batches)

        def drawn(samples: int, positions: int) -> tuple[slice, Tensor]:
            step = -(-samples // _MANY)
            rows = min(max(_PER_SAMPLE * samples, _FEW), _MANY)
            if rows_read >= max(_ENOUGH * self.channels * self.features, _LEAST):
                rows = round(_LATER * rows)
            count = max(1, min(positions, rows * step // samples))
            return slice(None, None, step), torch.randperm(positions, generator=generator)[:count]

        kind = consumer(module)
        if self.features > 1:
            a = kind.batched(a)
            which, where = drawn(len(a), kind.positions(a))
            return kind.rows(a[which], where)
        values = kind.by_channel(a)
        which, where = drawn(len(values), values.shape[2])
        return values[which].transpose(1, 2)[:, where.to(a.device)].flatten(0, 1)

    @property
    def blocks(self) -> list[Moments]:
        """All inputs are one block."""
        return [self]

    def merged(self, other: Moments) -> Moments:
        """Of both together."""
        both = self._copy()
        both._sums, both.batches = self.sums + other.sums.to(self.sums.device), self.batches + other.batches
        both._rows_read += other._rows_read
        return both

    def kept(self, channels: Tensor) -> Moments:
        """Of these channels alone, in this order."""
        columns = torch.cat([self.columns(channels).flatten(), torch.tensor([self._sums.shape[1] - 1])])
        sums, kept = self.sums, self._copy()
        columns = columns.to(sums.device)
        kept._sums = submatrix(sums, columns, columns)
        return kept

    def _copy(self) -> Moments:
        """The same in all but sums, which are still these."""
        other = copy.copy(self)
        other._inverse, other._pending = None, ([], [])
        return other

    def state_dict(self) -> dict[str, Any]:
        """Sums on the CPU, and how many batches they are of; a copy, since sums grow in place."""
        return {"sums": self.sums.to("cpu", copy=True), "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned, for as many inputs."""
        self.sums.copy_(state["sums"])
        self.batches, self._rows_read = state["batches"], self.rows
        self._inverse = None

    def columns(self, channels: Tensor) -> Tensor:
        """Numbers of the inputs that belong to channels: [K] -> [K, features], int64."""
        return channels[:, None] * self.features + torch.arange(self.features)

    def mean_and_covariance(self, half: int | None = None) -> tuple[Tensor, Tensor]:
        """Of the inputs, features apart, on the CPU.

        Args:
            half: 0 or 1, of the batches; None for both together.

        Returns:
            Float64, shapes [F] and [F, F], F = C * features.
        """
        second = (self.sums.sum(0) if half is None else self.sums[half]).cpu()
        second = second / second[-1, -1].clamp_min(1.0)
        mean, covariance = second[:-1, -1].clone(), second[:-1, :-1]
        # where means are large the difference is of rounding, and may be negative
        rounding = _ROUNDING * covariance.diagonal().mean()
        covariance = torch.addr(covariance, mean, mean, alpha=-1)
        covariance.diagonal().add_(rounding)
        return mean, covariance

    def inverse(self, damping: float) -> Tensor:
        """Of the covariance, damped as in `linalg.factor`; remembered, for the many groups that a concatenation holds.

        Returns:
            Float64, shape [F, F]; not to be changed.
        """
        if self._inverse is None or self._inverse[:2] != (self.rows, damping):
            self._inverse = self.rows, damping, damped_inverse(self.mean_and_covariance()[1], damping)
        return self._inverse[2]


class BlockMoments:
    """Second moments of blocks of neighbouring channels, for layers that read too many for one matrix.

    What channels of different blocks have to do with each other is not known, as if they were independent.

    Args:
        channels: C.
        blocks: how many, equally wide up to one channel.
        device: of the sums.

    Attributes:
        blocks: in the order of their channels.
        features: values of a channel: 1.
    """

    features = 1

    def __init__(self, channels: int, blocks: int, device: torch.device | str = "cpu") -> None:
        edges = [channels * number // blocks for number in range(blocks + 1)]
        self.blocks = [Moments(stop - start, 1, device) for start, stop in itertools.pairwise(edges)]

    def update(self, module: nn.Module, a: Tensor) -> None:
        """Adds a batch; see `Moments.update`."""
        parts = torch.split(self.blocks[0].read(module, a), [block.channels for block in self.blocks], 1)
        for block, x in zip(self.blocks, parts, strict=True):
            block.add(x)

    def go_on_from(self, other: BlockMoments) -> None:
        """See `Moments.go_on_from`."""
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            mine.go_on_from(theirs)

    def merged(self, other: BlockMoments) -> BlockMoments:
        """Of both together."""
        return self._of([mine.merged(theirs) for mine, theirs in zip(self.blocks, other.blocks, strict=True)])

    def kept(self, channels: Tensor) -> BlockMoments:
        """Of these channels alone, in ascending order."""
        kept, start = [], 0
        for block in self.blocks:
            here = channels[(channels >= start) & (channels < start + block.channels)]
            kept.append(block.kept(here - start))
            start += block.channels
        return self._of([block for block in kept if block.channels] or kept[:1])

    def _of(self, blocks: list[Moments]) -> BlockMoments:
        other = copy.copy(self)
        other.blocks = blocks
        return other

    def state_dict(self) -> dict[str, Any]:
        """See `Moments.state_dict`."""
        return {"blocks": [block.state_dict() for block in self.blocks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned, for as many inputs."""
        for block, values in zip(self.blocks, state["blocks"], strict=True):
            block.load_state_dict(values)


def share(moments: Iterable[Moments]) -> None:
    """Lets those that are the same to the bit keep one copy of their sums, as query, key and value do.

    Args:
        moments: to which no batch will be added.
    """
    known: dict[tuple[Any, ...], list[Moments]] = {}
    for own in moments:
        alike = known.setdefault((own.sums.shape, own.batches, float(own.sums.sum())), [])
        twin = next((other for other in alike if torch.equal(other.sums, own.sums)), None)
        if twin is None:
            alike.append(own)
        else:
            own._sums = twin._sums


def moments_of(module: nn.Module, device: torch.device | str) -> Moments | BlockMoments | None:
    """Empty ones for what a layer reads; None for groups of channels that are too wide for memory."""
    kind = consumer(module)
    channels, features, groups = kind.channels[0], kind.features(MAX_PATCH), kind.blocks
    if channels * features <= MAX_FEATURES:
        return Moments(channels, features, device)
    if channels // groups > MAX_FEATURES and groups > 1:
        return None
    return BlockMoments(channels, groups if groups > 1 else -(-channels // BLOCK), device)
