"""Torch-Pruning's dependency graph of a model: built from a model as it is, bounded in time and size, and quick."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning import ops

from dnr_plugin.errors import InputError, first_line
from dnr_plugin.network.attention import AttentionHeads, AttentionScores, CosineScores, split_modules
from dnr_plugin.network.calling import call, kept_modes
from dnr_plugin.network.kinds import kind_of
from dnr_plugin.network.looking import OutOfTime, at_most, prepared

_LONGEST = 8  # times the widest layer: more indices no layer of a group has; beyond, they are multiplied without end
_MEMBERS = 5000  # of a group, at most
_SECONDS = 120.0  # that Torch-Pruning may take to build a graph


# Roots of a model whose groups have no end, which takes long to see: they stay so while the model shrinks.
_endless: weakref.WeakKeyDictionary[nn.Module, set[nn.Module]] = weakref.WeakKeyDictionary()


class Unbounded(Exception):
    """A group's indices or members grow beyond what the network has."""


class Unmapped(Exception):
    """A group passes an operation through which Torch-Pruning cannot follow its indices."""


# Operations that number channels anew, and Torch-Pruning's word for each.
_MAPPED = {
    ops.OPTYPE.CONCAT: "concat",
    ops.OPTYPE.SPLIT: "split",
    ops.OPTYPE.RESHAPE: "reshape",
    ops.OPTYPE.UNBIND: "unbind",
    ops.OPTYPE.EXPAND: "expand",
    ops.OPTYPE.SLICE: "slice",
}


class _Counted(tp.pruner.function.BasePruningFunc):  # type: ignore[misc]
    """Layers whose channels their kind counts."""

    def get_out_channels(self, layer: nn.Module) -> int:
        return kind_of(layer).channels[1]

    def get_in_channels(self, layer: nn.Module) -> int:
        return kind_of(layer).channels[0]


class _RecurrentInputs(_Counted):
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


class _AttentionScores(_Counted):
    """How the channels of query and key are counted, which shrink themselves."""

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        layer.remove(idxs)  # type: ignore[operator]
        return layer

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError("scores of attention are not pruned")

    get_out_channels = _Counted.get_in_channels


class _AttentionHeads(_AttentionScores):
    """How heads are counted, with what belongs to each."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        kept = [head for head, left in enumerate(layer.remaining(idxs)) if left]  # type: ignore[operator]
        for name, dim in layer.held_dims.items():  # type: ignore[operator, union-attr]
            setattr(layer, name, self._prune_parameter_and_grad(getattr(layer, name), kept, dim))
        layer.remove(idxs)  # type: ignore[operator]
        return layer

    prune_in_channels = prune_out_channels


class _Norms(_Counted):
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

    def get_out_channel_groups(self, layer: nn.Module) -> int:
        return kind_of(layer).blocks

    get_in_channel_groups = get_out_channel_groups


class _Group(tp.dependency.Group):  # type: ignore[misc]
    """A group that finds its members by what they act on, where Torch-Pruning goes through all, and that ends."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self._longest = longest
        self._members: dict[tuple[Any, Any], list[int]] = {}
        self._merged: dict[int, dict[int, Any]] = {}

    def add_dep(self, dep: Any, idxs: Any) -> None:
        if len(idxs) > self._longest or len(self.items) > _MEMBERS:
            raise Unbounded
        self._members.setdefault((dep.target, dep.handler), []).append(len(self.items))
        super().add_dep(dep, idxs)

    def has_pruning_op(self, dep: Any, idxs: Any) -> bool:
        members = self._members.get((dep.target, dep.handler), ())
        return any(self.items[k].idxs is idxs or self.items[k].idxs == idxs for k in members)

    def add_and_merge(self, dep: Any, idxs: Any) -> None:
        members = self._members.get((dep.target, dep.handler))
        if members is None:
            self.add_dep(dep, idxs)
            return
        at = members[0]
        if at not in self._merged:
            item, self._merged[at] = self.items[at], {}
            self[at] = type(item)(item.dep, [])
            self._merge(at, item.idxs)
        self._merge(at, idxs)

    def _merge(self, at: int, idxs: Any) -> None:
        """Of what has one index the first is kept."""
        merged = self._merged[at]
        before = len(merged)
        for index in idxs:
            merged.setdefault(index.idx, index)
        self.items[at].idxs.extend([*merged.values()][before:])


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """A dependency graph that shrinks norms of every make, whose groups end, and which maps indices anew only where a
    width has changed."""

    def __init__(self) -> None:
        super().__init__()
        self._longest: int | None = None
        self._mapped: list[torch.Size] | None = None
        self._unmapped: dict[Any, str] = {}
        norms = _Norms()
        self._in_channel_pruning_fn.add(norms.prune_in_channels)
        self._out_channel_pruning_fn.add(norms.prune_out_channels)
        for kind in (ops.OPTYPE.IN, ops.OPTYPE.GN):  # that of BatchNorm is known by name to Torch-Pruning's criteria
            self.REGISTERED_PRUNERS[kind] = norms

    def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Any) -> tp.dependency.Group:
        if self._longest is None:  # widths only fall
            widths = (max(kind_of(m).channels) for m in self.module2node if isinstance(m, nn.Module))
            self._longest = _LONGEST * max(1, *widths)
        with self._instead(Group=partial(_Group, self._longest)):
            group = super().get_pruning_group(module, pruning_fn, idxs)
        for dep, _ in group:
            if dep.target in self._unmapped:
                raise Unmapped(self._unmapped[dep.target])
        return group

    def check_pruning_group(self, group: tp.dependency.Group) -> bool:
        """Whether every layer keeps a channel. An index may be there several times, once for each that drew it in."""
        for dep, idxs in group:
            for mine, channels in (
                (self.is_out_channel_pruning_fn, self.get_out_channels),
                (self.is_in_channel_pruning_fn, self.get_in_channels),
            ):
                size = channels(dep.target.module) if mine(dep.handler) else None
                if size is not None and size <= len(set(idxs)):
                    return False
        return True

    def build_dependency(self, *args: Any, **kwargs: Any) -> tp.DependencyGraph:
        with self._instead():
            return super().build_dependency(*args, **kwargs)

    @contextlib.contextmanager
    def _instead(self, **own: Any) -> Iterator[None]:
        """Lets Torch-Pruning's own methods call what stands here instead of what they call by these names."""
        scope = tp.DependencyGraph.get_pruning_group.__globals__
        own["index_mapping"] = SimpleNamespace(update_index_mapping=type(self)._map_indices)
        before = {name: scope[name] for name in own}
        scope.update(own)
        try:
            yield
        finally:
            scope.update(before)

    def _map_indices(self) -> None:
        """`update_index_mapping`, node by node: what fails at one of them costs the groups that pass there alone."""
        shapes = [parameter.shape for parameter in self.model.parameters()]
        if shapes == self._mapped:
            return
        self._mapped = shapes
        for node in self.module2node.values():
            if node.type in _MAPPED:
                try:
                    getattr(tp.dependency.index_mapping, f"update_{_MAPPED[node.type]}_index_mapping")(self, node)
                except Exception as error:  # Torch-Pruning raises whatever its inference of shapes stumbles over
                    self._unmapped[node] = (
                        f"Torch-Pruning cannot follow its channels through a {_MAPPED[node.type]} "
                        f"({type(error).__name__}: {first_line(error)})"
                    )


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
    forward = kwargs.pop("forward_fn", call)  # Torch-Pruning would unpack a batch of one into an image without a batch
    pruners: dict[Any, Any] = {nn.RNN: _RecurrentInputs(), nn.GRU: _RecurrentInputs(), nn.LSTM: _RecurrentInputs()}
    scores = _AttentionScores()  # Torch-Pruning does not look for base classes
    pruners |= {AttentionScores: scores, CosineScores: scores, AttentionHeads: _AttentionHeads()}
    kwargs["customized_pruners"] = {**pruners, **(kwargs.get("customized_pruners") or {})}
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with (
            kept_modes(model), prepared(model) as aside, torch.enable_grad(), warnings.catch_warnings(),
            at_most(_SECONDS),
        ):  # fmt: skip
            warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
            return _Graph().build_dependency(
                model, example_inputs=example_inputs, forward_fn=lambda *a: [forward(*a), aside], **kwargs
            )
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


def group_of(graph: tp.DependencyGraph, root: nn.Module, neurons: Sequence[int]) -> tp.dependency.Group:
    """The group of some outputs of a layer."""
    return graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, list(neurons))


def all_groups(graph: tp.DependencyGraph) -> tuple[list[tp.dependency.Group], list[tuple[nn.Module, str]]]:
    """`DependencyGraph.get_all_groups`, where one root that fails does not end the search.

    Returns:
        Groups of all indices, and the roots that Torch-Pruning fails at, with the reason.
    """
    groups: list[tp.dependency.Group] = []
    failed: list[tuple[nn.Module, str]] = []
    visited: set[nn.Module] = set(graph.IGNORED_LAYERS_IN_TRACING)
    keys = {attention.key for attention in split_modules(graph.model).values()}  # known by their queries
    root: nn.Module
    for root in sorted(graph.module2node, key=lambda module: module in keys):
        if root in visited or not isinstance(root, (ops.TORCH_CONV, ops.TORCH_LINEAR)):
            continue
        pruner = graph.get_pruner_of_module(root)
        channels = None if pruner is None else pruner.get_out_channels(root)
        if channels is None:
            continue
        endless = _endless.setdefault(graph.model, set())
        try:
            if root in endless:
                raise Unbounded
            group = graph.get_pruning_group(root, pruner.prune_out_channels, [*range(channels)])
        except Unbounded:
            endless.add(root)
            failed.append((root, "Torch-Pruning multiplies its channels without end"))
            continue
        except Unmapped as error:
            failed.append((root, str(error)))
            continue
        except Exception as error:  # Torch-Pruning raises whatever its index mapping stumbles over
            failed.append((root, f"Torch-Pruning fails at its group with {type(error).__name__}: {first_line(error)}"))
            continue
        outwards = graph.is_out_channel_pruning_fn
        visited.update(m for m in (dep.target.module for dep, _ in group if outwards(dep.handler)) if callable(m))
        groups.append(group)
    return groups, failed
