"""Questions asked of Torch-Pruning's dependency graph: what a group's neurons feed, and what stands in the way."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from dnr_plugin.errors import InputError
from dnr_plugin.network.attention import CosineScores
from dnr_plugin.network.calling import call, in_eval, tensors
from dnr_plugin.network.kinds import is_consumer, kind_of
from dnr_plugin.network.units import joined, ties

# Operations in which every channel depends on the others, so that a channel that is zero later is not without effect
# earlier. By Torch-Pruning's node type, or by the autograd name of an elementwise node.
_MIXING_TYPES = {ops.OPTYPE.LN: "LayerNorm", ops.OPTYPE.GN: "GroupNorm"}
_MIXING_GRADS = {
    "Softmax": "softmax",
    "NativeGroupNorm": "group_norm",
    "NativeLayerNorm": "layer_norm",
    "LinalgVectorNorm": "a norm",
}


class Unscored(LookupError):
    """Why the neurons of a group cannot be judged by what reads them."""


@dataclass(frozen=True)
class Use:
    """Where a group's neurons are used: channels ``channels[k]`` of ``module`` carry the neurons ``neurons[k]``.

    Neurons that can only go together (`units.ties`) are all carried by each channel that carries one of them.

    Attributes:
        module: the consumer.
        channels: its input channels, shape [K], int64.
        neurons: positions among the group's root indices, shape [K], int64, in [0, n).
    """

    module: nn.Module
    channels: Tensor
    neurons: Tensor


def uses(group: tp.dependency.Group) -> list[Use]:
    """The consumers of a group's neurons (METHOD: a neuron is one root index of a dependency group).

    Args:
        group: with full or partial indices.

    Raises:
        Unscored: Torch-Pruning lost track of which root index a channel belongs to.
    """
    position = {root: k for k, root in enumerate(group[0].idxs)}
    unit = ties(group)
    tied = bool((unit != torch.arange(len(unit))).any())
    members: dict[int, list[int]] = {}
    for root in group[0].idxs if tied else ():
        members.setdefault(int(unit[root]), []).append(position[root])
    consumers = []
    for item in group.items:
        dep, channels = item
        module = dep.target.module
        if not isinstance(module, nn.Module) or not is_consumer(module):
            continue
        if not group._DG.is_in_channel_pruning_fn(dep.handler):
            continue
        if any(root is None for root in item.root_idxs):
            raise Unscored("Torch-Pruning does not say which neuron each of its input channels belongs to")
        if tied:
            carried = [(c, k) for c, r in zip(channels, item.root_idxs, strict=True) for k in members[int(unit[r])]]
            channels, neurons = map(list, zip(*carried, strict=True))
        else:
            neurons = [position[root] for root in item.root_idxs]
        consumers.append(Use(module, torch.tensor(channels), torch.tensor(neurons)))
    return consumers


def channels_carrying(marked: Iterable[tuple[tp.dependency.Group, Tensor]]) -> dict[nn.Module, Tensor]:
    """Consumer -> which of its input channels carry marked neurons, bool, shape [in]; without those that carry none.

    Args:
        marked: groups with all indices, each with its marked neurons, bool, shape [n].
    """
    channels: dict[nn.Module, Tensor] = {}
    for group, neurons in marked:
        for use in uses(group) if neurons.any() else ():
            mask = torch.zeros(kind_of(use.module).channels[0], dtype=torch.bool)
            channels.setdefault(use.module, mask)[use.channels[neurons[use.neurons]]] = True
    return {module: mask for module, mask in channels.items() if mask.any()}


def channel_groups(group: tp.dependency.Group) -> int:
    """Number of equal blocks whose channels must go together, offset by offset.

    Grouped convolutions, GroupNorm and attention heads must stay equally wide, so that only the same offset of every
    block can be removed. 1 where nothing of the kind is in the group.
    """
    return math.lcm(*(kind_of(dep.target.module).blocks for dep, _ in group))


def units(group: tp.dependency.Group) -> Tensor:
    """Number of the unit of each neuron of a group, from 0: those that go together, tied or at one offset of blocks.

    Args:
        group: with all indices.

    Returns:
        int64, shape [n], in [0, units), by their first neurons.
    """
    size, blocks = len(group[0].idxs), channel_groups(group)
    unit = ties(group)
    if blocks > 1 and size % blocks == 0:
        unit = joined(unit, torch.arange(size) % (size // blocks))
    numbered: Tensor = torch.unique(unit, return_inverse=True)[1]
    return numbered


def parts(group: tp.dependency.Group, unit: Tensor) -> Tensor:
    """Number of the part that each unit belongs to, from 0: those of a part have channels in the same members.

    Most groups are one part; where layers are concatenated in front of a sum, or outputs are split, there are several,
    and each has layers to itself that run empty without it.

    Args:
        group: with all indices.
        unit: `units` of it.
    """
    touches = torch.zeros(int(unit.max()) + 1, len(group.items), dtype=torch.bool)
    for number, item in enumerate(group.items):
        touches[unit[torch.tensor(item.root_idxs)], number] = True
    if bool((touches == touches[0]).all()):
        return torch.zeros(len(touches), dtype=torch.int64)
    numbered: Tensor = torch.unique(touches, dim=0, return_inverse=True)[1]
    return numbered


def inexact_reason(group: tp.dependency.Group) -> str | None:
    """Why removing a neuron that is zero at every consumer may still change the outputs, or None."""
    if any(isinstance(dep.target.module, CosineScores) for dep, _ in group):
        return "cosine attention divides by the lengths of query and key, of which one may be zero alone"
    return mixing_reason(group)


def mixing_reason(group: tp.dependency.Group) -> str | None:
    """Why removing a neuron may be another thing than setting it to zero at the inputs of all consumers, or None."""
    for dep, _ in group:
        module, kind = dep.target.module, dep.target.type
        if kind in _MIXING_TYPES and not kind_of(module).separate:
            return f"{_MIXING_TYPES[kind]} mixes its channels"
        if kind == ops.OPTYPE.ELEMENTWISE:
            grad = str(getattr(module, "_grad_fn", ""))
            for name, plain in _MIXING_GRADS.items():
                if name in grad:
                    return f"{plain} mixes its channels"
    return None


def output_layers(model: nn.Module, example_inputs: Any) -> set[nn.Module]:
    """Layers whose outputs reach the model's outputs without passing a consumer: their channels are not ours to remove.

    The classifier, and any feature map that the model returns as well. Found by cutting the autograd graph at every
    consumer's input: only what is left connected to the outputs still receives a gradient.

    Args:
        model: in any mode; run once in eval mode.
        example_inputs: as Torch-Pruning takes them.

    Raises:
        InputError: the model returns no tensor.
    """

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        def detach(value: Any) -> Any:
            return value.detach() if isinstance(value, Tensor) else value

        return tuple(map(detach, args)), {key: detach(value) for key, value in kwargs.items()}

    owners = {
        parameter: module
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.is_floating_point()
    }
    frozen = [parameter for parameter in owners if not parameter.requires_grad]
    handles = [
        module.register_forward_pre_hook(cut, with_kwargs=True) for module in model.modules() if is_consumer(module)
    ]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with in_eval(model, handles), torch.enable_grad():
            outputs = [out for out in tensors(call(model, example_inputs)) if out.grad_fn is not None]
            if not outputs:
                raise InputError(f"model: expected outputs that are tensors, found none from {type(model).__name__}")
            total = torch.stack([out.double().sum() for out in outputs]).sum()
            gradients = torch.autograd.grad(total, list(owners), allow_unused=True)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return {module for (_, module), gradient in zip(owners.items(), gradients, strict=True) if gradient is not None}


def shared_reason(group: tp.dependency.Group) -> str | None:
    """Why a group cannot shrink, where a layer of it shares a parameter with another layer; or None.

    Torch-Pruning shrinks layers one by one: each would go on with a parameter of its own.
    """
    graph = group._DG
    if graph not in _shared:
        names = {module: name for name, module in graph.model.named_modules()}
        owners: dict[nn.Parameter, list[nn.Module]] = {}
        for module in names:
            for parameter in {*module.parameters(recurse=False)}:
                owners.setdefault(parameter, []).append(module)
        pairs = [(own, (names[own[0]], names[own[1]])) for own in owners.values() if len(own) > 1]
        _shared[graph] = {module: pair for own, pair in pairs for module in own}
    for dep, _ in group:
        if dep.target.module in _shared[graph]:
            return "{} and {} share a parameter".format(*_shared[graph][dep.target.module])
    return None


# Layers that share parameters, with the names of two of them: these layers do not shrink, so it stays true.
_shared: weakref.WeakKeyDictionary[tp.DependencyGraph, dict[nn.Module, tuple[str, str]]] = weakref.WeakKeyDictionary()


def isomorphism_class(group: tp.dependency.Group) -> tuple[tuple[str, str, bool], ...]:
    """Groups of the same class have the same sequence of layer types and pruning directions.

    Source: Fang et al., *Isomorphic Pruning for Vision Models*, ECCV 2024, as Torch-Pruning computes it.
    """
    outwards = group._DG.is_out_channel_pruning_fn
    return tuple(
        (type(dep.source.module).__name__, type(dep.target.module).__name__, outwards(dep.handler)) for dep, _ in group
    )
