"""Statistics of a layer's activations: pure functions of counts, and the running sums that feed them.

No hooks and no model here: `observer.py` feeds an `Activity` from a live network. Everything kept is a sum, a count,
a maximum or a minimum with a declared reduction, so that batches, ranks and resumed runs merge exactly.

Notation: ``a`` is the activation of one channel, read at the input of the layer that consumes it, over samples ``n``
and positions ``p``; ``theta`` is the threshold above which a neuron fires.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dnr_plugin.observation.entropy import entropy_bits, octaves, on_off_entropy_bits
from dnr_plugin.observation.moments import BlockMoments, Moments


def dormancy(magnitude: Tensor) -> Tensor:
    """Mean magnitude of each neuron relative to its layer's, ``d_c = m_c / mean_k m_k``, >= 0.

    A neuron is tau-dormant iff ``d_c <= tau`` (ReDo: Sokar et al., ICML 2023). A layer that is silent as a whole has
    dormancy 0 everywhere, not NaN.

    Args:
        magnitude: mean absolute activations, shape [C].
    """
    mean = magnitude.double().mean()
    return torch.where(mean > 0, magnitude / mean, torch.zeros_like(magnitude))


_AT_ONCE = 2**16  # values that are summed in float64 together
_POSITIONS = 256  # of a sample that rates are read at, at least, where it has as many
_ROW = 32  # values that torch reads side by side at its best


def _count(index: Tensor, size: int) -> Tensor:
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=size)
    # bincount would wait for the device to learn the largest index
    ones = torch.ones(index.numel(), dtype=torch.int64, device=index.device)
    return torch.zeros(size, dtype=torch.int64, device=index.device).scatter_add_(0, index.long(), ones)


def _sums(a: Tensor) -> list[Tensor]:
    """Of ``a``, ``|a|`` and ``a^2`` over samples and positions, [N, C, P] -> three of [C], float64."""
    samples, channels, positions = a.shape
    rows = a.flatten(0, 1)
    # a few at a time: new pages for wide copies of all would take several times as long as the sums
    size = max(1, _AT_ONCE // max(positions, 1)) if a.device.type == "cpu" else max(1, len(rows))
    totals, magnitudes, squares = list[Tensor](), list[Tensor](), list[Tensor]()
    for part in torch.split(rows, size):
        wide = part.to(torch.float64, copy=True)
        totals.append(wide.sum(1))
        squares.append((wide * wide).sum(1))
        magnitudes.append(wide.abs_().sum(1))
    return [torch.cat(sums).view(samples, channels).sum(0) for sums in (totals, magnitudes, squares)]


def _extremes(a: Tensor) -> list[Tensor]:
    """Highest and lowest value of each sample, [N, C, P] -> two of [N, C]."""
    samples, channels, positions = a.shape
    # where channels lie side by side, torch is up to 17 times slower unless a row has a multiple of 32
    together = _ROW // math.gcd(channels, _ROW)
    if a.stride()[1:] != (1, channels) or a.device.type != "cpu":
        together = 1
    whole = positions - positions % together
    found = list[Tensor]()
    for extreme, both in ((torch.amax, torch.maximum), (torch.amin, torch.minimum)):
        if together == 1 or not whole:
            found.append(extreme(a, 2))
            continue
        rows = a[..., :whole].transpose(1, 2).reshape(samples, -1, together * channels)
        value = extreme(extreme(rows, 1).view(samples, together, channels), 1)
        found.append(value if whole == positions else both(value, extreme(a[..., whole:], 2)))
    return found


class Activity:
    """Running statistics of the C channels of one observed tensor.

    ``update`` reads every sample for the highest and lowest value and for "did it fire at all in this sample", which
    decide what is dead, and a ``share`` of the samples for means, rates and histograms, whose cost would show; of large
    maps evenly spaced positions, 256 or more.
    Memory is fixed by C and ``bins``; nothing is copied to the CPU and no device is synchronised.

    Attributes:
        samples: samples seen.
        values: positions of the sampled share seen, per channel.
        moments: second moments as well, where a layer's observer gathers them.
        REDUCTIONS: how each tensor merges: "sum", "max" or "min".
    """

    REDUCTIONS: ClassVar[dict[str, str]] = {
        "fired_samples": "sum",
        "highest": "max",
        "lowest": "min",
        "fired": "sum",
        "total": "sum",
        "total_magnitude": "sum",
        "total_square": "sum",
        "histogram": "sum",
    }

    def __init__(
        self,
        channels: int,
        *,
        threshold: float = 0.0,
        share: float = 0.125,
        bins: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            channels: C.
            threshold: theta >= 0; a neuron fires where ``a > theta``.
            share: share in (0, 1] of each batch that means, rates and histograms read: every ``round(1 / share)``-th
                sample. With 1, everything.
            bins: of the histogram, in [2, 64].
            device: where the sums live; the device of the activations.
        """
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share: expected a number in (0, 1], found {share}")
        if not 2 <= bins <= 64:
            raise ValueError(f"bins: expected 2 to 64, found {bins}")
        self.threshold, self.share, self.bins = threshold, share, bins
        self.moments: Moments | BlockMoments | None = None
        self.stride = max(1, round(1.0 / share))
        self.samples = 0
        self.values = 0
        counts: dict[str, Any] = {"dtype": torch.int64, "device": device}
        # float64: a float32 sum stops growing after 2**24 equal terms, a tenth of an ImageNet epoch of 14x14 maps
        sums: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.fired_samples = torch.zeros(channels, **counts)
        self.highest = torch.full((channels,), -torch.inf, device=device)
        self.lowest = torch.full((channels,), torch.inf, device=device)
        self.fired = torch.zeros(channels, **counts)
        self.total = torch.zeros(channels, **sums)
        self.total_magnitude = torch.zeros(channels, **sums)
        self.total_square = torch.zeros(channels, **sums)
        self.histogram = torch.zeros(channels, bins, **counts)

    @property
    def channels(self) -> int:
        return self.highest.numel()

    @torch.no_grad()
    def update(self, a: Tensor) -> None:
        """Adds one batch.

        Args:
            a: activations, shape [N, C, P], any floating type, on the device of the sums.
        """
        self.merge(self.of_batch(a))

    @torch.no_grad()
    def of_batch(self, a: Tensor) -> Activity:
        """The statistics of one batch alone, with the settings of this one; see `update`."""
        batch = Activity.__new__(Activity)
        batch.threshold, batch.share, batch.bins, batch.stride = self.threshold, self.share, self.bins, self.stride
        batch.moments = None
        # compared in float32 like the sampled share: a bfloat16 comparison would round the threshold
        wide = torch.float64 if a.dtype is torch.float64 else torch.float32
        top, bottom = (values.to(wide) for values in _extremes(a))  # [N, C]
        # an odd step meets all columns of maps whose width is even
        step = 1 if self.stride == 1 else max(1, a.shape[2] // _POSITIONS - 1) | 1
        picked = a[:: self.stride, :, ::step].contiguous()
        sampled = picked.float()
        batch.samples = a.shape[0]
        batch.values = sampled.shape[0] * sampled.shape[2]
        batch.fired_samples = (top > self.threshold).sum(0)
        # maximum and minimum hand NaN on, so one non-finite activation anywhere stays visible
        batch.highest, batch.lowest = top.amax(0), bottom.amin(0)
        batch.total, batch.total_magnitude, batch.total_square = _sums(picked)
        index = octaves(sampled, self.threshold, self.bins)
        index += torch.arange(0, self.channels * self.bins, self.bins, device=a.device, dtype=torch.int32)[:, None]
        batch.histogram = _count(index.flatten(), self.channels * self.bins).view(self.channels, self.bins)
        batch.fired = batch.histogram[:, 1:].sum(1)
        return batch

    def merge(self, other: Activity) -> None:
        """Adds the statistics of other samples of the same channels, as if both had been seen here.

        Raises:
            ValueError: the other has another threshold, or other bins or channels.
        """
        if (self.threshold, self.bins, self.channels) != (other.threshold, other.bins, other.channels):
            raise ValueError("only activities with the same threshold, bins and channels can be merged")
        self.samples += other.samples
        self.values += other.values
        combine: dict[str, Callable[[Tensor, Tensor], Tensor]]
        combine = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
        for name, how in self.REDUCTIONS.items():
            mine, theirs = getattr(self, name), getattr(other, name).to(self.highest.device)
            setattr(self, name, combine[how](mine, theirs))
        if other.moments is not None:
            self.moments = other.moments if self.moments is None else self.moments.merged(other.moments)  # type: ignore[arg-type]

    def all_reduce(self) -> None:
        """Merges over the ranks of the default process group; every rank ends with the same statistics."""
        import torch.distributed as dist

        counts = torch.tensor([self.samples, self.values], device=self.highest.device)
        dist.all_reduce(counts)
        self.samples, self.values = counts.tolist()
        # backends may drop NaN from a maximum, but not infinity: `finite` must be false on every rank
        self.highest = self.highest.masked_fill(self.highest.isnan(), torch.inf)
        self.lowest = self.lowest.masked_fill(self.lowest.isnan(), -torch.inf)
        for name, how in self.REDUCTIONS.items():
            value = getattr(self, name)
            dist.all_reduce(value, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[how])
        if self.moments is not None:
            for block in self.moments.blocks:
                dist.all_reduce(block.sums)

    def keep(self, channels: Tensor) -> None:
        """Follows a removal: from now on only these channels exist, in this order.

        Args:
            channels: indices of the kept channels, shape [K].
        """
        for name in self.REDUCTIONS:
            value = getattr(self, name)
            setattr(self, name, value[channels.to(value.device)])
        if self.moments is not None:
            self.moments = self.moments.kept(channels)

    def state_dict(self) -> dict[str, Any]:
        """All sums and counts; tensors on the CPU."""
        tensors = {name: getattr(self, name).cpu() for name in self.REDUCTIONS}
        moments = {} if self.moments is None else {"moments": self.moments.state_dict()}
        return {"samples": self.samples, "values": self.values, **tensors, **moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned.

        Raises:
            ValueError: other channels or bins.
        """
        self.samples, self.values = state["samples"], state["values"]
        for name in self.REDUCTIONS:
            mine = getattr(self, name)
            if mine.shape != state[name].shape:
                raise ValueError(f"{name}: expected shape {list(mine.shape)}, found {list(state[name].shape)}")
            setattr(self, name, state[name].to(mine.device))
        if self.moments is not None:
            self.moments.load_state_dict(state["moments"])

    @property
    def finite(self) -> bool:
        """Whether every activation seen was finite."""
        return bool(torch.isfinite(self.highest).all() and torch.isfinite(self.lowest).all())

    @property
    def firing_rate(self) -> Tensor:
        """``r_c = mean_{n,p} 1[a > theta]`` over the sampled share, in [0, 1], shape [C]."""
        return self.fired.double() / max(self.values, 1)

    @property
    def sample_activity(self) -> Tensor:
        """``s_c = mean_n 1[max_p a > theta]`` over all samples, in [0, 1], shape [C]."""
        return self.fired_samples.double() / max(self.samples, 1)

    @property
    def mean(self) -> Tensor:
        """Mean of ``a`` over the sampled share, float64, shape [C]."""
        return self.total / max(self.values, 1)

    @property
    def variance(self) -> Tensor:
        """Population variance of ``a`` over the sampled share, >= 0, shape [C]."""
        return (self.total_square / max(self.values, 1) - self.mean.square()).clamp_min(0.0)

    @property
    def mean_magnitude(self) -> Tensor:
        """``m_c = mean_{n,p} |a|`` over the sampled share, shape [C]."""
        return self.total_magnitude / max(self.values, 1)

    @property
    def dormancy(self) -> Tensor:
        """See `dormancy`; shape [C]."""
        return dormancy(self.mean_magnitude)

    @property
    def entropy(self) -> Tensor:
        """Entropy in bits of the activation histogram (`octaves`), in [0, log2 bins], shape [C]."""
        return entropy_bits(self.histogram)

    @property
    def on_off_entropy(self) -> Tensor:
        """Entropy in bits of "fires or not", in [0, 1], shape [C]."""
        return on_off_entropy_bits(self.firing_rate)

    @property
    def silent(self) -> Tensor:
        """Never fired at any position of any sample: ``r_c = 0`` over all of them. Bool, shape [C]."""
        return self.fired_samples == 0

    @property
    def zero(self) -> Tensor:
        """``max |a| = 0`` over all samples: removing such a channel changes nothing. Bool, shape [C]."""
        return (self.highest == 0) & (self.lowest == 0)
