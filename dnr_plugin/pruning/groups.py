"""Which dependency groups of a model may shrink, and in which portions."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.errors import InputError, did_you_mean
from dnr_plugin.network.calling import one_sample
from dnr_plugin.network.dependencies import build_graph, channel_groups, output_layers
from dnr_plugin.network.kinds import kind_of
from dnr_plugin.pruning.cost_model import effect_per_neuron


@dataclass(frozen=True)
class Limits:
    """What may be taken, and in which portions.

    Attributes:
        ignored: layers left exactly as they are, neither outputs nor inputs removed; names or shell patterns. A name
            covers everything inside it.
        round_to: keep a multiple of this many channels.
        max_pruning_ratio: largest share in (0, 1] taken from one group, of its size in the dense model.
        min_channels: neurons that every group keeps, in every channel group, >= 1.
    """

    ignored: Sequence[str] = ()
    round_to: int | None = None
    max_pruning_ratio: float = 1.0
    min_channels: int = 1


@dataclass
class Layer:
    """A dependency group, and the portions in which it may shrink.

    Attributes:
        name: of its root layer.
        group: with all indices.
        size: neurons now.
        blocks: equal channel groups that stay equally wide.
        first: neurons in the dense model.
        portions: offsets taken by each removal step, in order.
        effect: (module name, "in" or "out") -> channels that go with one neuron (`cost_model.effect_per_neuron`).
    """

    name: str
    group: tp.dependency.Group
    size: int
    blocks: int
    first: int
    portions: list[int]
    effect: dict[tuple[str, str], float]

    def neurons(self, offsets: Sequence[int]) -> list[int]:
        """The neurons at these offsets of every block."""
        width = self.size // self.blocks
        return [block * width + offset for block in range(self.blocks) for offset in offsets]

    def whole(self, marked: Tensor) -> Tensor:
        """Of marked neurons, shape [size], those whose offset is marked in every block: only these can go."""
        return marked.view(self.blocks, -1).all(0).repeat(self.blocks)

    def touched(self, marked: Tensor) -> Tensor:
        """Neurons whose offset is marked in any block, shape [size]."""
        return marked.view(self.blocks, -1).any(0).repeat(self.blocks)


@dataclass(frozen=True)
class Prunable:
    """What may be taken from a model within some limits.

    Attributes:
        layers: groups that may shrink.
        skipped: those that may not, as (root layer, reason).
        neurons: all hidden neurons.
    """

    layers: list[Layer]
    skipped: list[tuple[str, str]]
    neurons: int


class Survey:
    """The dependency groups of a model as it is now, whatever may be taken from them.

    Args:
        model: traced here, once.
        example_inputs: as Torch-Pruning takes them.

    Raises:
        InputError: the model cannot be traced.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model, self._names = model, {module: name for name, module in model.named_modules()}
        graph = build_graph(model, one_sample(example_inputs))
        self._outputs = output_layers(model, one_sample(example_inputs))
        self._groups = [*graph.get_all_groups()]

    def within(self, limits: Limits, sizes: Mapping[str, int]) -> Prunable:
        """What may be taken within limits.

        Args:
            limits: of what may be taken.
            sizes: root layer -> neurons in the dense model; those that it has now, by default.

        Raises:
            InputError: nothing may, or the limits name a layer that there is not.
        """
        ignored = _ignored(self.model, limits.ignored)
        layers: list[Layer] = []
        skipped: list[tuple[str, str]] = []
        neurons = 0
        for group in self._groups:
            name, size = self._names[group[0].dep.target.module], len(group[0].idxs)
            if self._returned(group):
                skipped.append((name, "its outputs are the model's outputs"))
                continue
            neurons += size
            members = (dep.target.module for dep, _ in group)
            touched = next((self._names[m] for m in members if isinstance(m, nn.Module) and m in ignored), None)
            if touched is not None:
                skipped.append((name, f"{touched} is ignored"))
                continue
            blocks = channel_groups(group)
            if not _divides(group, blocks):
                skipped.append((name, f"its {size} channels do not fall into {blocks} equal channel groups"))
                continue
            first = sizes.get(name, size)
            portions = _portions(size // blocks, first // blocks, blocks, limits)
            layers.append(Layer(name, group, size, blocks, first, portions, effect_per_neuron(group, self._names)))
        if not layers:
            raise InputError(
                "model: expected at least one layer whose channels may be removed, found none"
                + "".join(f"; {name}: {reason}" for name, reason in skipped[:3])
            )
        return Prunable(layers, skipped, neurons)

    def _returned(self, group: tp.dependency.Group) -> bool:
        """Whether the model returns what a layer of the group makes."""
        outwards = group._DG.is_out_channel_pruning_fn
        return any(
            isinstance(dep.target.module, nn.Module) and dep.target.module in self._outputs and outwards(dep.handler)
            for dep, _ in group
        )


def prunable_layers(model: nn.Module, example_inputs: Any, limits: Limits, sizes: Mapping[str, int]) -> Prunable:
    """`Survey.within`, for a model that is asked once."""
    return Survey(model, example_inputs).within(limits, sizes)


def _divides(group: tp.dependency.Group, blocks: int) -> bool:
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


def _ignored(model: nn.Module, patterns: Sequence[str]) -> set[nn.Module]:
    names = [name for name, _ in model.named_modules() if name]
    ignored: set[nn.Module] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(
                f"prune.ignored: expected the name of a layer or a pattern that fits one, found {pattern!r}"
                f"{did_you_mean(pattern, names)}"
            )
        for name in matched:
            ignored.update(model.get_submodule(name).modules())
    return ignored


def _portions(offsets: int, first: int, blocks: int, limits: Limits) -> list[int]:
    """How many offsets each removal step takes, until what must stay remains."""
    multiple = limits.round_to // math.gcd(limits.round_to, blocks) if limits.round_to else 1
    floor = max(limits.min_channels, math.ceil(first * (1.0 - limits.max_pruning_ratio) - 1e-9), 1)
    portions: list[int] = []
    kept = offsets
    while True:
        fewer = (kept - 1) // multiple * multiple
        if fewer < floor:
            return portions
        portions.append(kept - fewer)
        kept = fewer
