"""Dependency groups that may shrink: their neurons, the units that go together, and the portions in which these go."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.network.dependencies import parts, units
from dnr_plugin.network.kinds import kind_of
from dnr_plugin.pruning.cost_model import effect_per_unit

MAX_PRUNING_RATIO = 0.9  # of one group, where groups are ranked against each other


@dataclass(frozen=True)
class Limits:
    """What may be taken, and in which portions.

    Attributes:
        ignored: layers left exactly as they are, neither outputs nor inputs removed; names or shell patterns. A name
            covers everything inside it.
        round_to: keep a multiple of this many channels; "auto": of as many below which smaller steps save no time, as
            `plan_removal` measures on its inputs. Until it has, any number.
        max_pruning_ratio: largest share in (0, 1] taken from one group, of its size in the dense model; None: all but
            `min_channels` in scope "local", and 0.9 in the others, which else leave some layers with one channel.
        min_channels: units that every part of a group keeps, >= 1: neurons, in every channel group.
        verify: check Torch-Pruning's groups before they are used (`verification.verified`).
    """

    ignored: Sequence[str] = ()
    round_to: int | Literal["auto"] | None = None
    max_pruning_ratio: float | None = None
    min_channels: int = 1
    verify: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.round_to, str) and self.round_to != "auto":
            raise ValueError(f"round_to: expected a number, auto or None, found {self.round_to!r}")

    def in_scope(self, scope: str) -> Limits:
        """With the share that may be taken from one group in a scope of `order.SCOPES`."""
        if self.max_pruning_ratio is not None:
            return self
        return replace(self, max_pruning_ratio=1.0 if scope == "local" else MAX_PRUNING_RATIO)

    def in_training(self, scope: str) -> Limits:
        """`in_scope`, where nothing is timed, since what is could not be resumed.

        Raises:
            ValueError: it would have to be.
        """
        if self.round_to == "auto":
            raise ValueError("limits: expected a number for round_to, which is not measured while training, found auto")
        return self.in_scope(scope)


@dataclass(frozen=True)
class Part:
    """Units of a group of which each takes channels from the same layers, and the portions in which they may go.

    Most groups are one part; where layers are concatenated in front of a sum or a depthwise convolution, each of these
    has units of its own.

    Attributes:
        units: their numbers in the layer.
        portions: how many of them each removal step takes, in order.
        effect: channels that each side of a layer loses for one unit, on average.
    """

    units: list[int]
    portions: list[int]
    effect: dict[tuple[str, str], float]


@dataclass
class Layer:
    """A dependency group, and the units in which it may shrink.

    Attributes:
        name: of its root layer.
        group: with all indices.
        size: neurons now.
        first: neurons in the dense model.
        unit: number of the unit that each neuron belongs to, from 0, by their first neurons; int64, shape [size].
        parts: that may shrink one without the other.
    """

    name: str
    group: tp.dependency.Group
    size: int
    first: int
    unit: Tensor
    parts: list[Part]

    @property
    def units(self) -> int:
        """How many there are."""
        return int(self.unit.max()) + 1

    @functools.cached_property
    def _members(self) -> list[list[int]]:
        members: list[list[int]] = [[] for _ in range(self.units)]
        for neuron, unit in enumerate(self.unit.tolist()):
            members[unit].append(neuron)
        return members

    def neurons(self, units: Iterable[int]) -> list[int]:
        """The neurons of these units."""
        return [neuron for unit in units for neuron in self._members[unit]]

    def by_unit(self, values: Tensor) -> Tensor:
        """Mean over the neurons of each unit, float64, shape [units]."""
        values, sizes = values.detach().cpu().double(), {len(members) for members in self._members}
        if len(sizes) == 1:
            return values[torch.tensor(self._members)].mean(1)
        return torch.stack([values[members].mean() for members in self._members])

    def all_of(self, marked: Tensor) -> Tensor:
        """Units of which every neuron is marked; bool, shape [size] -> [units]."""
        return ~self.any_of(~marked)

    def any_of(self, marked: Tensor) -> Tensor:
        """Units of which some neuron is marked; bool, shape [size] -> [units]."""
        units = torch.zeros(self.units, dtype=torch.bool)
        units[self.unit[marked]] = True
        return units

    def whole(self, marked: Tensor) -> Tensor:
        """Of marked neurons, shape [size], those whose whole unit is marked: only these can go."""
        return self.all_of(marked)[self.unit]

    def touched(self, marked: Tensor) -> Tensor:
        """Neurons of whose unit any is marked, shape [size]."""
        return self.any_of(marked)[self.unit]


def layer_of(
    group: tp.dependency.Group, name: str, first: int | None, names: Mapping[nn.Module, str], limits: Limits
) -> Layer:
    """A group as a layer.

    Args:
        group: with all indices, whose channel groups are equal (`divides`).
        name: of its root layer.
        first: its neurons in the dense model, by default those that it has.
        names: of the model's modules.
        limits: that its portions keep to.
    """
    size = len(group[0].idxs)
    layer = Layer(name, group, size, size if first is None else first, units(group), [])
    layer.parts = _parts(layer, names, limits)
    return layer


def _parts(layer: Layer, names: Mapping[nn.Module, str], limits: Limits) -> list[Part]:
    made, part = [], parts(layer.group, layer.unit)
    for number in range(int(part.max()) + 1):
        members = (part == number).nonzero().flatten().tolist()
        first = max(len(members), round(layer.first / layer.size * len(members)))
        portions = _portions(len(members), first, max(1, layer.size // layer.units), limits)
        made.append(Part(members, portions, effect_per_unit(layer.group, names, layer.unit, members)))
    return made


def divides(group: tp.dependency.Group, blocks: int) -> bool:
    """Whether neurons at the same offset of every block are at the same offset of every channel group they reach."""
    size = len(group[0].idxs)
    if blocks == 1:
        return True
    if any(len(idxs) % blocks for _, idxs in group):
        return False
    for item in group.items:
        module = item.dep.target.module
        kind = kind_of(module)
        parts = kind.blocks
        inwards = group._DG.is_in_channel_pruning_fn(item.dep.handler)
        if parts == 1:
            continue
        if len(item.idxs) != kind.channels[0 if inwards else 1] or None in item.root_idxs:
            return False  # other channels share its blocks, as after a concatenation
        root_of = dict(zip(item.idxs, item.root_idxs, strict=True))
        offsets = torch.tensor([root_of[k] % (size // blocks) for k in sorted(root_of)]).view(parts, -1)
        if (offsets != offsets[0]).any():
            return False
    return True


def _portions(units: int, first: int, each: int, limits: Limits) -> list[int]:
    """How many units each removal step takes, until what must stay is left.

    Args:
        units: of a part; first: in the dense model.
        each: neurons of a unit.
    """
    rounded = limits.round_to if isinstance(limits.round_to, int) else 1
    multiple = rounded // math.gcd(rounded, each) if rounded else 1
    ratio = 1.0 if limits.max_pruning_ratio is None else limits.max_pruning_ratio
    floor = max(limits.min_channels, math.ceil(first * (1.0 - ratio) - 1e-9), 1)
    portions: list[int] = []
    kept = units
    while True:
        fewer = (kept - 1) // multiple * multiple
        if fewer < floor:
            return portions
        portions.append(kept - fewer)
        kept = fewer
