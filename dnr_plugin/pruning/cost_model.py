"""Predicts FLOPs and parameters while channels are taken away, without pruning or tracing anything.

Planning asks for the cost after each of thousands of removals. The FLOPs of a convolution or linear layer are a product
of its input and output channels, those of other layers grow with their channels, so that counting once is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from dnr_plugin.network.attention import AttentionHeads, beside
from dnr_plugin.network.cost import FlopReport
from dnr_plugin.network.kinds import kind_of

# (module name, "in" or "out") -> channels that go
Effect = Mapping[tuple[str, str], float]


@dataclass
class _Layer:
    flops: int
    matrix: int  # parameters that scale with inputs times outputs
    vector: int  # parameters that scale with outputs
    scaling: str  # `kinds.Kind.scaling`
    reading: float  # `kinds.Kind.reading`
    first: tuple[int, int]
    gone: list[float]

    def cost(self) -> tuple[float, float]:
        """(FLOPs, parameters) with the channels that remain."""
        kept_out = scale = max(0.0, 1 - self.gone[1] / self.first[1])
        if self.scaling == "product":
            scale *= 1 - self.reading * min(1.0, self.gone[0] / self.first[0])
        elif self.scaling == "square":
            scale *= kept_out
        return self.flops * scale, self.matrix * scale + self.vector * kept_out


class CostModel:
    """Running FLOPs and parameters of a model as channels go.

    Exact for convolutions, linear and recurrent layers and normalisation; operations outside of these (pooling,
    attention scores) are held constant, a difference that the planner then measures.

    Args:
        model: the network as it is now.
        report: its `cost.flop_report`.
    """

    def __init__(self, model: nn.Module, report: FlopReport) -> None:
        self.flops, self.params = float(report.flops), float(report.params)
        flops = {layer.name: layer.flops for layer in report.layers}
        self._layers: dict[str, _Layer] = {}
        for name, module in model.named_modules():
            kind = kind_of(module)
            if not kind.channels[1]:
                continue
            parameters = list(module.parameters())  # attention owns its output projection
            matrix = sum(p.numel() for p in parameters if p.dim() > 1)
            vector = sum(p.numel() for p in parameters if p.dim() <= 1)
            self._layers[name] = _Layer(
                flops.get(name, 0), matrix, vector, kind.scaling, kind.reading, kind.channels, [0.0, 0.0]
            )
        for name, parameter in model.named_parameters():  # of modules that Torch-Pruning does not know
            bare = _Layer(0, 0, parameter.numel(), "linear", 1.0, (1, 1), [0.0, 0.0])
            self._layers.setdefault(f"parameter {name}", bare)

    def remove(self, effect: Effect) -> None:
        """Takes channels away from the sides of layers.

        Args:
            effect: (module name, "in" or "out") -> channels that go.
        """
        flops, params = self._change(effect)
        self.flops += flops
        self.params += params

    def saved(self, effect: Effect) -> tuple[float, float]:
        """(FLOPs, parameters) that `remove` would take; takes nothing."""
        gone = {name: [*self._layers[name].gone] for name, _ in effect}
        flops, params = self._change(effect)
        for name, before in gone.items():
            self._layers[name].gone = before
        return -flops, -params

    def _change(self, effect: Effect) -> tuple[float, float]:
        flops = params = 0.0
        for (name, side), count in effect.items():
            layer = self._layers[name]
            before = layer.cost()
            layer.gone[side == "out"] += count
            after = layer.cost()
            flops += after[0] - before[0]
            params += after[1] - before[1]
        return flops, params


def effect_per_unit(
    group: tp.dependency.Group, names: Mapping[nn.Module, str], unit: Tensor, members: Sequence[int]
) -> dict[tuple[str, str], float]:
    """Channels that each layer of a group loses for one of some units, on average.

    Args:
        group: with all indices.
        names: of the model's modules.
        unit: number of the unit of each neuron, shape [n].
        members: the units, by number.
    """
    inside = torch.isin(unit, torch.tensor([*members]))
    effect: dict[tuple[str, str], float] = {}
    for item in group.items:
        dep, module, kind = item.dep, item.dep.target.module, item.dep.target.type
        channels = int(inside[torch.tensor(item.root_idxs)].sum())
        if kind == ops.OPTYPE.PARAMETER:
            name = group._DG._param_to_name[module]
            effect[f"parameter {name}", "out"] = channels / len(members) / module.shape[dep.target.pruning_dim]
        elif channels and module in names and kind_of(module).channels[1]:
            inwards = kind_of(module).scaling == "product" and group._DG.is_in_channel_pruning_fn(dep.handler)
            key = (names[module], "in" if inwards else "out")
            effect[key] = effect.get(key, 0.0) + channels / len(members)
        if channels and isinstance(module, AttentionHeads):  # whose query and key go along
            for projection, width in beside(names[module], group._DG.model).items():
                effect[projection, "out"] = channels / kind_of(module).channels[1] * width / len(members)
    return effect
