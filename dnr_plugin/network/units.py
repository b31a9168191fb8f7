"""Which neurons of a group can only go together, as Torch-Pruning's dependency graph says: the units of removal.

A gate (``chunk``, then a product or a maximum), a fused query, key and value, or a linear layer whose outputs become
the positions of a feature map tie neurons of one layer to each other: Torch-Pruning takes index 16 as well when it is
asked for index 0. In the group of all indices this cannot be seen; it has to be asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import torch_pruning as tp
from torch import Tensor

from dnr_plugin.network.attention import AttentionHeads

_Key = tuple[object, bool, int]
_known: weakref.WeakKeyDictionary[tp.DependencyGraph, dict[_Key, Tensor]] = weakref.WeakKeyDictionary()


def ties(group: tp.dependency.Group) -> Tensor:
    """Number of the unit of each channel of a group's root layer: channels of one number go together.

    Args:
        group: with full or partial indices.

    Returns:
        int64, shape [channels of the root]; a unit has the number of its first channel.
    """
    graph, dep = group._DG, group[0].dep
    outwards = graph.is_out_channel_pruning_fn(dep.handler)
    size = int((graph.get_out_channels if outwards else graph.get_in_channels)(dep.target.module))
    known = _known.setdefault(graph, {})
    key = dep.target.module, outwards, size
    if key not in known:
        known[key] = _ties(group, size)
    return known[key]


def _ties(group: tp.dependency.Group, size: int) -> Tensor:
    graph, module, prune = group._DG, group[0].dep.target.module, group[0].dep.handler

    def closure(indices: Sequence[int]) -> set[int]:
        return set(graph.get_pruning_group(module, prune, list(indices))[0].idxs)

    unit = _heads(group, size)
    steps = (step for item in group.items for step in item.dep.target.dependencies)
    if all(mapping is None for step in steps for mapping in step.index_mapping):
        return unit  # every member is numbered as the root is
    # any two indices differ in some digit: where no half of them, by any digit, draws others in, none does
    digits = range((size - 1).bit_length())
    halves = [[k for k in range(size) if k >> digit & 1 == side] for digit in digits for side in (0, 1)]
    if all(closure(half) == set(half) for half in halves):
        return unit
    for index in range(size):
        together = unit[torch.tensor(sorted(closure([index]) | {index}))]
        unit[torch.isin(unit, together)] = int(together.min())
    return unit


def _heads(group: tp.dependency.Group, size: int) -> Tensor:
    """Of values of attention, of which whole heads go: the first channel of each one's head; else each its own."""
    for dep, _ in group:
        module = dep.target.module
        if isinstance(module, AttentionHeads) and module.channels == size:
            return torch.arange(size) // module.width * module.width
    return torch.arange(size)


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Units of which each holds whole units of two numberings of the same neurons, shape [n] each."""
    joint, before = first.clone(), torch.full_like(first, -1)
    while not torch.equal(joint, before):
        before = joint
        for numbers in (second, first):
            least = torch.full((int(numbers.max()) + 1,), len(numbers), dtype=torch.int64)
            joint = least.scatter_reduce(0, numbers, joint, "amin")[numbers]
    return joint
