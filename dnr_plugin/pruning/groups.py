"""Which dependency groups of a model may shrink, and why others may not."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.errors import InputError, did_you_mean
from dnr_plugin.network.attention import split_modules
from dnr_plugin.network.calling import eager, one_sample
from dnr_plugin.network.dependencies import channel_groups, output_layers, shared_reason
from dnr_plugin.network.graph import all_groups, build_graph
from dnr_plugin.network.kinds import kind_of
from dnr_plugin.network.sequence_kinds import Attention, Recurrent
from dnr_plugin.pruning.layers import Layer, Limits, divides, layer_of
from dnr_plugin.pruning.verification import verified


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

    Attributes:
        unplaced: layers whose neurons are in no group, as (layer, reason).

    Raises:
        InputError: the model cannot be traced.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        model = eager(model)
        self.model, self.names = model, {module: name for name, module in model.named_modules()}
        self.example = one_sample(example_inputs)
        self.graph = build_graph(model, self.example)
        self._outputs = output_layers(model, self.example)
        self.groups, failed = all_groups(self.graph)
        self.unplaced = [(self.names[root], reason) for root, reason in failed] + self._without_group(failed)

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
        skipped = [*self.unplaced]
        neurons = 0
        for group in self.groups:
            name, size = self.names[group[0].dep.target.module], len(group[0].idxs)
            if self._returned(group):
                skipped.append((name, "its outputs are the model's outputs"))
                continue
            neurons += size
            reason = self._untouchable(group, ignored)
            if reason is not None:
                skipped.append((name, reason))
                continue
            layers.append(layer_of(group, name, sizes.get(name), self.names, limits))
        if limits.verify:
            reasons = verified(self.model, self.example, self.names, layers)
            skipped += reasons.items()
            layers = [layer for layer in layers if layer.name not in reasons]
        if not layers:
            raise InputError(
                "model: expected at least one layer whose channels may be removed, found none"
                + "".join(f"; {name}: {reason}" for name, reason in skipped[:3])
            )
        return Prunable(layers, skipped, neurons)

    def _untouchable(self, group: tp.dependency.Group, ignored: set[nn.Module]) -> str | None:
        """Why nothing may be taken from a group, as far as its members tell."""
        outwards = self.graph.is_out_channel_pruning_fn
        for item in group.items:
            module = item.dep.target.module
            if not isinstance(module, nn.Module) or module not in self.names:
                continue
            name, kind = self.names[module], kind_of(module)
            side = "out" if outwards(item.dep.handler) else "in"
            if module in ignored:
                return f"{name} is ignored"
            computed = [key for key in ("weight", "bias") if _computed(module, key)]
            if computed:
                return f"the {computed[0]} of {name} is computed when it runs, as by weight_norm or a pruning mask"
            if isinstance(kind, Recurrent) and side == "out":
                return f"{name} adds to it, and the hidden units of a recurrent layer are not pruned"
            channels = kind.channels[side == "out"]
            if None in item.root_idxs:
                return f"Torch-Pruning does not say which neuron each channel of {name} belongs to"
            if channels and max(item.idxs, default=0) >= channels:
                return f"Torch-Pruning takes channels from {name} that it does not have"
        shared = shared_reason(group)
        if shared is not None:
            return shared
        blocks = channel_groups(group)
        if not divides(group, blocks):
            return f"its {len(group[0].idxs)} channels do not fall into {blocks} equal channel groups"
        return None

    def _without_group(self, failed: Sequence[tuple[nn.Module, str]]) -> list[tuple[str, str]]:
        """Layers with neurons that no group holds, with what keeps them out."""
        outwards, known = self.graph.is_out_channel_pruning_fn, {root for root, _ in failed}
        whole: dict[nn.Module, set[int]] = {}
        for group in self.groups:
            for dep, channels in group:
                if isinstance(dep.target.module, nn.Module) and outwards(dep.handler):
                    whole.setdefault(dep.target.module, set()).update(channels)
        attention = (module for module in self.names if isinstance(kind_of(module), Attention))
        parts = {part for module in attention for part in module.modules()}  # its projections, which run without it
        cores = {f"{name}.core": attention.core for name, attention in split_modules(self.model).items()}
        reasons = [(name, core.whole) for name, core in cores.items() if core.whole is not None]
        for module, name in self.names.items():
            kind = kind_of(module)
            if not kind.consumes or module in known or module in parts:
                continue
            if isinstance(kind, Recurrent):
                reasons.append((name, "the hidden units of a recurrent layer are not pruned"))
            elif module not in self.graph.module2node:
                reasons.append((name, "it is not called in eval mode, or under no_grad"))
            elif len(whole.get(module, ())) < kind.channels[1]:
                reasons.append((name, "Torch-Pruning puts its channels into no group, as where one stands for many"))
        return reasons

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


def _computed(module: nn.Module, name: str) -> bool:
    """Whether what should be a parameter is made from others each time the layer runs."""
    stored = module._parameters.get(name) is not None
    return not stored and isinstance(getattr(module, name, None), Tensor) and name not in module._buffers


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
