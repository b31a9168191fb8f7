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
    """A dependency group, and the portions in which it may shrink."""

    name: str
    group: tp.dependency.Group
    size: int  # neurons now
    blocks: int
    first: int  # neurons in the dense model
    portions: list[int]  # offsets taken by each removal step, in order
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


def prunable_layers(
    model: nn.Module, example_inputs: Any, limits: Limits, sizes: Mapping[str, int]
) -> tuple[list[Layer], list[tuple[str, str]], int]:
    """Groups that may shrink with their portions, those that may not with the reason, and all hidden neurons."""
    names = {module: name for name, module in model.named_modules()}
    ignored = _ignored(model, limits.ignored)
    graph = build_graph(model, one_sample(example_inputs))
    outputs = output_layers(model, one_sample(example_inputs))
    layers: list[Layer] = []
    skipped: list[tuple[str, str]] = []
    neurons = 0
    for group in graph.get_all_groups():
        name, size = names[group[0].dep.target.module], len(group[0].idxs)
        members = [dep.target.module for dep, _ in group]
        if any(
            module in outputs and graph.is_out_channel_pruning_fn(dep.handler)
            for (dep, _), module in zip(group.items, members, strict=True)
            if isinstance(module, nn.Module)
        ):
            skipped.append((name, "its outputs are the model's outputs"))
            continue
        neurons += size
        touched = next((names[m] for m in members if isinstance(m, nn.Module) and m in ignored), None)
        if touched is not None:
            skipped.append((name, f"{touched} is ignored"))
            continue
        blocks = channel_groups(group)
        if not _divides(group, blocks):
            skipped.append((name, f"its {size} channels do not fall into {blocks} equal channel groups"))
            continue
        first = sizes.get(name, size)
        portions = _portions(size // blocks, first // blocks, blocks, limits)
        layers.append(Layer(name, group, size, blocks, first, portions, effect_per_neuron(group, names)))
    if not layers:
        raise InputError(
            "model: expected at least one layer whose channels may be removed, found none"
            + "".join(f"; {name}: {reason}" for name, reason in skipped[:3])
        )
    return layers, skipped, neurons


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
    found: set[nn.Module] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(
                f"prune.ignored: expected the name of a layer or a pattern that fits one, found {pattern!r}"
                f"{did_you_mean(pattern, names)}"
            )
        for name in matched:
            found.update(model.get_submodule(name).modules())
    return found


def _portions(offsets: int, first: int, blocks: int, limits: Limits) -> list[int]:
    """How many offsets each removal step takes, until what must stay is left."""
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
