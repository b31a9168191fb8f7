"""Second moments of what a layer reads: by these redundancy is judged and weights are corrected."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.linalg import add_outer_products, damped_inverse, mirror
from dnr_plugin.network.kinds import consumer

# Patches of up to this many values are read whole; of wider layers, and transposed ones, channels alone.
MAX_PATCH = 1152
# Layers that read more than this have no second moments, which would outgrow memory.
MAX_FEATURES = 4096
# Rows that are read of small and of large batches, and of each sample in between.
_FEW, _MANY, _PER_SAMPLE = 512, 2048, 16
_ROUNDING = 1e-6  # of sums of float32 products


class Moments:
    r"""Running second moments :math:`H = E[x x^\top]` and means of the inputs x that a layer's outputs read.

    For a convolution x is the patch that its kernel covers, zero padding included, where patches are small; else a
    position's channels. Sums are float64, over a bounded number of positions of every batch, drawn by the batch's
    number. Batches go into two halves in turn, so that what one half suggests can be checked on the other.

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
        self.batches = 0
        size = channels * features + 1
        self._inverse: tuple[int, float, Tensor] | None = None
        self._sums = torch.zeros(2, size, size, dtype=torch.float64, device=device)
        self._mirrored = True

    @property
    def sums(self) -> Tensor:
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
        return round(float(self._sums[:, -1, -1].sum()))

    @torch.no_grad()
    def update(self, module: nn.Module, a: Tensor) -> None:
        """Adds a batch.

        Args:
            module: the layer.
            a: its input.
        """
        x = self._read(module, a.detach())
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        add_outer_products(self._sums[self.batches % 2], x)
        self._mirrored = False
        self.batches += 1

    def _read(self, module: nn.Module, a: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.batches)

        def drawn(samples: int, positions: int) -> tuple[slice, Tensor]:
            step = -(-samples // _MANY)
            rows = min(max(_PER_SAMPLE * samples, _FEW), _MANY)
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

    def merged(self, other: Moments) -> Moments:
        """Of both together."""
        both = copy.copy(self)
        both._inverse = None
        both._sums, both.batches = self.sums + other.sums.to(self.sums.device), self.batches + other.batches
        return both

    def kept(self, channels: Tensor) -> Moments:
        """Of these channels alone, in this order."""
        columns = torch.cat([self.columns(channels).flatten(), torch.tensor([self._sums.shape[1] - 1])])
        sums, kept = self.sums, copy.copy(self)
        columns = columns.to(sums.device)
        kept._inverse = None
        kept._sums = sums[:, columns][:, :, columns]
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Sums on the CPU, and how many batches they are of; a copy, since sums grow in place."""
        return {"sums": self.sums.to("cpu", copy=True), "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned, for as many inputs."""
        self.sums.copy_(state["sums"])
        self.batches = state["batches"]
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
