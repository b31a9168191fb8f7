"""Kinds of layers: everything that observing, scoring, removal and repair ask about a layer's type.

One class a kind, one table from module types to kinds. `kind_of` puts a module into the class that fits its type; a
type that is not in the table gets `Kind`, which uses no neurons, has no channels that are known and is not repaired. A
layer of one's own becomes known by `register_layer`. What each has to answer stands in `layer_kind`.

A subclass of a layer of torch that runs by a ``forward`` of its own (not `Kind.stock`) is pruned and observed like its
base, as Torch-Pruning does, but never computed in its place: repair leaves it as it is, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_plugin.network.attention import AttentionHeads, AttentionScores
from dnr_plugin.network.layer_kind import Consumer, Kind, channels_second, l2_norm, widened
from dnr_plugin.network.sequence_kinds import Attention, Heads, Recurrent, Scores


class _Weighted(Consumer):
    """A layer whose ``weight`` has a row for each output, and no other part in what it computes than its bias."""

    @property
    def unrepaired(self) -> str | None:
        return None if self.stock else _own_forward(self.module)

    @property
    def unknowns(self) -> int:
        return int(self.module.weight[0].numel())


class Linear(_Weighted):
    """``nn.Linear``; the last dimension holds the channels."""

    @property
    def channels(self) -> tuple[int, int]:
        return int(self.module.in_features), int(self.module.out_features)

    def by_channel(self, a: Tensor) -> Tensor:
        return channels_second(a)

    def matrices(self, each: int) -> list[Tensor]:
        return [widened(self.module.weight)]

    def assign(self, each: int, matrices: Sequence[Tensor]) -> None:
        self.module.weight.copy_(matrices[0])

    def norms(self) -> Tensor:
        return l2_norm(self.module.weight.detach(), 0)

    def run(self, a: Tensor, weights: Tensor, constants: Tensor) -> Tensor:
        return F.linear(a, weights.view_as(self.module.weight).to(a), constants.to(a))

    @property
    def folds_exactly(self) -> bool:
        return True

    def shift(self, inputs: Tensor) -> Tensor:
        return widened(self.module.weight) @ inputs


class Convolution(_Weighted):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, grouped or not."""

    @property
    def channels(self) -> tuple[int, int]:
        return int(self.module.in_channels), int(self.module.out_channels)

    @property
    def blocks(self) -> int:
        return int(self.module.groups)

    def batched(self, a: Tensor) -> Tensor:
        return a if a.dim() == len(self.module.kernel_size) + 2 else a.unsqueeze(0)

    def by_channel(self, a: Tensor) -> Tensor:
        a = self.batched(a)
        return a.flatten(2) if a.dim() > 2 else a.unsqueeze(-1)

    def mask(self, channels: Tensor) -> Tensor:
        return channels.view(-1, *[1] * len(self.module.kernel_size))

    @property
    def taps(self) -> int:
        return math.prod(self.module.kernel_size)

    def features(self, most: int) -> int:
        return self.taps if self.channels[0] * self.taps <= most else 1

    def rows(self, a: Tensor, places: Tensor) -> Tensor:
        module, a = self.module, self.batched(a)
        sizes, margins = self.output_size(a), module._reversed_padding_repeated_twice
        if module.padding_mode != "zeros" and any(margins):
            a, margins = F.pad(a, margins, module.padding_mode), [0] * len(margins)
        rows = []
        for place in places.tolist():
            window, outside = a, list[int]()
            for dim in reversed(range(len(sizes))):
                place, index = divmod(place, sizes[dim])
                start = index * module.stride[dim] - margins[-2 * dim - 2]
                extent, size = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1, a.shape[dim + 2]
                first = min(max(start, 0), size)
                last = min(max(start + extent, first), size)
                before = min(max(first - start, 0), extent)
                window = window.narrow(dim + 2, first, last - first)
                outside += [before, extent - before - (last - first)]
            if any(outside):  # of a few windows, where padding all of the input would copy it
                window = F.pad(window, outside)
            steps = (slice(None), slice(None), *(slice(None, None, step) for step in module.dilation))
            rows.append(window[steps].flatten(1))
        return torch.stack(rows, 1).flatten(0, 1)

    def output_size(self, a: Tensor) -> list[int]:
        """Height, width and so on of the output for an input [N, C, *spatial]."""
        module = self.module
        padding = module._reversed_padding_repeated_twice[::-1]
        return [
            (size + padding[2 * k] + padding[2 * k + 1] - module.dilation[k] * (module.kernel_size[k] - 1) - 1)
            // module.stride[k]
            + 1
            for k, size in enumerate(a.shape[2:])
        ]

    def positions(self, a: Tensor) -> int:
        return math.prod(self.output_size(self.batched(a)))

    def matrices(self, each: int) -> list[Tensor]:
        weight, groups = widened(self.module.weight), self.module.groups
        if each > 1:
            return [*weight.flatten(1).chunk(groups)]
        return [part.movedim(1, -1).flatten(0, -2) for part in weight.chunk(groups)]

    def assign(self, each: int, matrices: Sequence[Tensor]) -> None:
        shape = self.module.weight.shape
        if each == 1:
            outputs = shape[0] // self.module.groups
            matrices = [part.view(outputs, *shape[2:], -1).movedim(-1, 1) for part in matrices]
        self.module.weight.copy_(torch.cat([*matrices]).reshape(shape))

    def norms(self) -> Tensor:
        """Grouped: an input channel is read by the filters of its own group only."""
        weight = self.module.weight.detach()
        blocked = weight.reshape(self.module.groups, -1, weight.shape[1], weight[0, 0].numel())
        return l2_norm(blocked, (1, 3)).flatten()

    def run(self, a: Tensor, weights: Tensor, constants: Tensor) -> Tensor:
        out: Tensor = self.module._conv_forward(a, weights.view_as(self.module.weight).to(a), constants.to(a))
        return out

    @property
    def folds_exactly(self) -> bool:
        module = self.module
        if module.padding_mode != "zeros" or module.padding == "valid":
            return True
        return not any(k - 1 for k in module.kernel_size) if module.padding == "same" else not any(module.padding)

    def shift(self, inputs: Tensor) -> Tensor:
        taps = widened(self.module.weight).flatten(2).sum(2)  # [out, in / groups]
        by_group = inputs.view(self.module.groups, -1)
        return torch.einsum("goi,gi->go", taps.view(self.module.groups, -1, by_group.shape[1]), by_group).flatten()


class Depthwise(Convolution):
    """A convolution with one filter a channel: it hands each on, and what it makes of it is used further down."""

    consumes = False
    scaling = "linear"

    @property
    def blocks(self) -> int:
        return 1


class TransposedConvolution(Convolution):
    """``nn.ConvTranspose1d``, ``2d`` and ``3d``; read channel by channel, and not repaired."""

    @property
    def unrepaired(self) -> str | None:
        return f"{type(self.module).__name__} is not repaired"

    def features(self, most: int) -> int:
        return 1

    def rows(self, a: Tensor, places: Tensor) -> Tensor:
        return Consumer.rows(self, a, places)

    def positions(self, a: Tensor) -> int:
        return Consumer.positions(self, a)

    def matrices(self, each: int) -> list[Tensor]:  # of [in, out / groups, *kernel]
        return [part.flatten(1).T.contiguous() for part in widened(self.module.weight).chunk(self.module.groups)]

    def assign(self, each: int, matrices: Sequence[Tensor]) -> None:
        self.module.weight.copy_(torch.cat([part.T for part in matrices]).reshape(self.module.weight.shape))

    def norms(self) -> Tensor:
        return l2_norm(self.module.weight.detach().flatten(1), 1)

    @property
    def no_constant(self) -> str | None:
        if any(stride > 1 for stride in self.module.stride):
            return "a strided transposed convolution spreads a constant unevenly"
        return None

    @property
    def folds_exactly(self) -> bool:
        return False

    def shift(self, inputs: Tensor) -> Tensor:
        taps = widened(self.module.weight).flatten(2).sum(2)  # [in, out / groups]
        by_group = inputs.view(self.module.groups, -1)
        return torch.einsum("gio,gi->go", taps.view(self.module.groups, by_group.shape[1], -1), by_group).flatten()

    def makes(self, parameter: Tensor) -> int | None:
        if parameter.dim() == 1:
            return 0
        return 1 if self.module.groups == 1 else None  # grouped ones mix their outputs in one dimension


class Norm(Kind):
    """BatchNorm and InstanceNorm."""

    @property
    def channels(self) -> tuple[int, int]:
        return int(self.module.num_features), int(self.module.num_features)


class GroupNorm(Kind):
    """``nn.GroupNorm``: each group is normalised together, so that all must stay equally wide."""

    @property
    def channels(self) -> tuple[int, int]:
        return int(self.module.num_channels), int(self.module.num_channels)

    @property
    def separate(self) -> bool:
        return int(self.module.num_groups) == int(self.module.num_channels)

    @property
    def blocks(self) -> int:
        return 1 if self.separate else int(self.module.num_groups)


class LayerNorm(Kind):
    """``nn.LayerNorm``; the last dimension holds the channels."""

    @property
    def channels(self) -> tuple[int, int]:
        return int(self.module.normalized_shape[-1]), int(self.module.normalized_shape[-1])


# By type, since networks of all kinds carry attributes called in_channels or num_features.
_KINDS: dict[type[nn.Module], type[Kind]] = {
    nn.modules.conv._ConvTransposeNd: TransposedConvolution,
    nn.modules.conv._ConvNd: Convolution,
    nn.Linear: Linear,
    nn.MultiheadAttention: Attention,
    nn.RNNBase: Recurrent,
    AttentionScores: Scores,
    AttentionHeads: Heads,
    nn.modules.batchnorm._NormBase: Norm,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
}


def register_layer(module: type[nn.Module], kind: type[Kind]) -> None:
    """Makes a layer type known to observing, scoring and repair; to be called before models with it are looked at.

    Torch-Pruning has to know it as well (``customized_pruners``).

    Args:
        module: the layer's class, with its subclasses; a class that is known already is known as this from now on.
        kind: how such layers are read, a subclass of `Kind`, or of `Consumer` for one that mixes its channels.
    """
    _KINDS[module] = kind


def kind_of(module: nn.Module) -> Kind:
    """A layer in the class of its kind: that of the nearest of its base classes that is known, else `Kind`."""
    kind = next((_KINDS[base] for base in type(module).__mro__ if base in _KINDS), Kind)(module)
    if isinstance(kind, Convolution) and kind.module.groups > 1 and kind.channels == (kind.module.groups,) * 2:
        return Depthwise(module)
    return kind


def consumer(module: nn.Module) -> Consumer:
    """`kind_of` a layer that is known to consume.

    Raises:
        TypeError: it does not.
    """
    kind = kind_of(module)
    if not isinstance(kind, Consumer) or not kind.consumes:
        raise TypeError(f"{type(module).__name__} is not a consumer")
    return kind


def is_consumer(module: nn.Module) -> bool:
    """Whether the module mixes its input channels, so that a neuron's activation is "used" there."""
    return kind_of(module).consumes


def has_weights(module: nn.Module) -> bool:
    """Whether it is a consumer with weights of its own, which can be corrected."""
    return is_consumer(module) and next(module.parameters(), None) is not None


def is_batchnorm(module: nn.Module | None) -> bool:
    """Whether it is torch's BatchNorm with running statistics, and nothing else: in eval mode one affine map."""
    norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    return norm and kind_of(module).stock  # type: ignore[arg-type]


def _own_forward(module: nn.Module) -> str:
    return f"{type(module).__name__} has a forward of its own"
