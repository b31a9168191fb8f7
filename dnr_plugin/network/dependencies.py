"""Questions asked of Torch-Pruning's dependency graph: what a group's neurons feed, and what stands in the way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from dnr_plugin.errors import InputError, first_line
from dnr_plugin.network.calling import call, kept_modes, tensors
from dnr_plugin.network.kinds import is_consumer, kind_of
from dnr_plugin.network.looking import OutOfTime, at_most, prepared
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


_LONGEST = 8  # times the widest layer: more indices no layer of a group has; beyond, they are multiplied without end
_MEMBERS = 5000  # of a group, at most
_SECONDS = 120.0  # that Torch-Pruning may take to build a graph


class Unbounded(Exception):
    """A group's indices or members grow beyond what the network has."""


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


class _RecurrentInputs(tp.pruner.function.BasePruningFunc):  # type: ignore[misc]
    """How Torch-Pruning shrinks what a recurrent layer reads; it knows of LSTM alone."""

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        gone = set(idxs)
        kept = [k for k in range(layer.input_size) if k not in gone]  # type: ignore[arg-type]
        for name, parameter in [*layer.named_parameters()]:
            if name.startswith("weight_ih_l0"):
                setattr(layer, name, self._prune_parameter_and_grad(parameter, kept, pruning_dim=1))
        layer.input_size = len(kept)  # type: ignore[assignment]
        layer.flatten_parameters()  # type: ignore[operator]
        return layer

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError("the hidden units of a recurrent layer are not pruned")

    def get_out_channels(self, layer: nn.Module) -> int:
        return kind_of(layer).channels[1]

    def get_in_channels(self, layer: nn.Module) -> int:
        return kind_of(layer).channels[0]


class _Norms(tp.pruner.function.BasePruningFunc):  # type: ignore[misc]
    """How Torch-Pruning shrinks a norm, also one without weights, with running statistics or without."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        gone = set(idxs)
        kept = [k for k in range(kind_of(layer).channels[1]) if k not in gone]
        for name in ("weight", "bias"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, self._prune_parameter_and_grad(getattr(layer, name), kept, 0))
        for name in ("running_mean", "running_var"):
            buffer = getattr(layer, name, None)
            if buffer is not None:
                setattr(layer, name, buffer[torch.tensor(kept, device=buffer.device)])
        if isinstance(layer, nn.GroupNorm):
            if layer.num_groups == layer.num_channels:
                layer.num_groups = len(kept)
            layer.num_channels = len(kept)
        else:
            layer.num_features = len(kept)  # type: ignore[assignment]
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        return kind_of(layer).channels[1]

    get_in_channels = get_out_channels

    def get_out_channel_groups(self, layer: nn.Module) -> int:
        return kind_of(layer).blocks

    get_in_channel_groups = get_out_channel_groups


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """A dependency graph that shrinks norms of every make, and whose groups end.

    Indices that are multiplied without bound are refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self._longest: int | None = None
        norms = _Norms()
        self._in_channel_pruning_fn.add(norms.prune_in_channels)
        self._out_channel_pruning_fn.add(norms.prune_out_channels)
        for kind in (ops.OPTYPE.IN, ops.OPTYPE.GN):  # that of BatchNorm is known by name to Torch-Pruning's criteria
            self.REGISTERED_PRUNERS[kind] = norms

    def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Any) -> tp.dependency.Group:
        if self._longest is None:  # widths only fall
            widths = (max(kind_of(m).channels) for m in self.module2node if isinstance(m, nn.Module))
            self._longest = _LONGEST * max(1, *widths)
        longest = self._longest
        scope = tp.DependencyGraph.get_pruning_group.__globals__

        class Bounded(scope["Group"]):  # type: ignore[misc, name-defined, valid-type]
            def add_dep(self, dep: Any, idxs: Any) -> None:
                if len(idxs) > longest or len(self.items) > _MEMBERS:
                    raise Unbounded
                super().add_dep(dep, idxs)

        before, scope["Group"] = scope["Group"], Bounded
        try:
            return super().get_pruning_group(module, pruning_fn, idxs)
        finally:
            scope["Group"] = before


def build_graph(model: nn.Module, example_inputs: Any, **kwargs: Any) -> tp.DependencyGraph:
    """`DependencyGraph.build_dependency`, leaving the model's modes, flags, hooks and attributes as they were.

    Tracing switches the whole model to eval mode and follows autograd, so frozen parameters would be invisible. What
    Torch-Pruning cannot follow stands aside meanwhile (`looking.prepared`).

    Args:
        model: the network.
        example_inputs: a tensor, a sequence of tensors or a dict of them, as Torch-Pruning takes them.
        **kwargs: handed on to ``build_dependency``.

    Raises:
        InputError: the model cannot be called or traced.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    hooks = {module: set(module._forward_hooks) for module in model.modules()}
    kwargs.setdefault("forward_fn", call)  # Torch-Pruning would unpack a batch of one into an image without a batch
    pruners = {nn.RNN: _RecurrentInputs(), nn.GRU: _RecurrentInputs(), nn.LSTM: _RecurrentInputs()}
    kwargs["customized_pruners"] = {**pruners, **(kwargs.get("customized_pruners") or {})}
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with kept_modes(model), prepared(model), torch.enable_grad(), warnings.catch_warnings(), at_most(_SECONDS):
            warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
            return _Graph().build_dependency(model, example_inputs=example_inputs, **kwargs)
    except OutOfTime as error:
        raise InputError(
            f"model: expected a network whose graph Torch-Pruning builds, found that {type(model).__name__} takes it "
            f"more than {_SECONDS:g} s"
        ) from error
    except Exception as error:  # Torch-Pruning raises whatever its tracing stumbles over
        raise InputError(
            f"model: expected a network that Torch-Pruning can trace, found that {type(model).__name__} fails with "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, before in hooks.items():  # Torch-Pruning leaves its own behind when the model fails
            for added in set(module._forward_hooks) - before:
                del module._forward_hooks[added]


def all_groups(graph: tp.DependencyGraph) -> tuple[list[tp.dependency.Group], list[tuple[nn.Module, str]]]:
    """`DependencyGraph.get_all_groups`, where one root that fails does not end the search.

    Returns:
        Groups of all indices, and the roots that Torch-Pruning fails at, with the reason.
    """
    groups: list[tp.dependency.Group] = []
    failed: list[tuple[nn.Module, str]] = []
    visited: set[nn.Module] = set(graph.IGNORED_LAYERS_IN_TRACING)
    root: nn.Module
    for root in graph.module2node:
        if root in visited or not isinstance(root, (ops.TORCH_CONV, ops.TORCH_LINEAR)):
            continue
        pruner = graph.get_pruner_of_module(root)
        channels = None if pruner is None else pruner.get_out_channels(root)
        if channels is None:
            continue
        try:
            group = graph.get_pruning_group(root, pruner.prune_out_channels, [*range(channels)])
        except Unbounded:
            failed.append((root, "Torch-Pruning multiplies its channels without end"))
            continue
        except Exception as error:  # Torch-Pruning raises whatever its index mapping stumbles over
            failed.append((root, f"Torch-Pruning fails at its group with {type(error).__name__}: {first_line(error)}"))
            continue
        outwards = graph.is_out_channel_pruning_fn
        visited.update(m for m in (dep.target.module for dep, _ in group if outwards(dep.handler)) if callable(m))
        groups.append(group)
    return groups, failed


def uses(group: tp.dependency.Group) -> list[Use]:
    """The consumers of a group's neurons (METHOD: a neuron is one root index of a dependency group).

    Args:
        group: with full or partial indices.

    Raises:
        LookupError: Torch-Pruning lost track of which root index a channel belongs to.
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
            raise LookupError("Torch-Pruning does not say which neuron each of its input channels belongs to")
        if tied:
            carried = [(c, k) for c, r in zip(channels, item.root_idxs, strict=True) for k in members[int(unit[r])]]
            channels, neurons = map(list, zip(*carried, strict=True))
        else:
            neurons = [position[root] for root in item.root_idxs]
        consumers.append(Use(module, torch.tensor(channels), torch.tensor(neurons)))
    return consumers


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


def inexact_reason(group: tp.dependency.Group) -> str | None:
    """Why removing a neuron that is zero at every consumer may still change the outputs, or None."""
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
        with kept_modes(model), torch.enable_grad():
            model.eval()
            outputs = [out for out in tensors(call(model, example_inputs)) if out.grad_fn is not None]
            if not outputs:
                raise InputError(f"model: expected outputs that are tensors, found none from {type(model).__name__}")
            total = torch.stack([out.double().sum() for out in outputs]).sum()
            gradients = torch.autograd.grad(total, list(owners), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
    return {module for (_, module), gradient in zip(owners.items(), gradients, strict=True) if gradient is not None}


def isomorphism_class(group: tp.dependency.Group) -> tuple[tuple[str, str, bool], ...]:
    """Groups of the same class have the same sequence of layer types and pruning directions.

    Source: Fang et al., *Isomorphic Pruning for Vision Models*, ECCV 2024, as Torch-Pruning computes it.
    """
    outwards = group._DG.is_out_channel_pruning_fn
    return tuple(
        (type(dep.source.module).__name__, type(dep.target.module).__name__, outwards(dep.handler)) for dep, _ in group
    )
