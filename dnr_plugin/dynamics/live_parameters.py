"""Which parts of a network's parameters make dead neurons, so that noise can leave these asleep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dnr_plugin.network.kinds import kind_of
from dnr_plugin.pruning.layers import Layer


def live_factors(dead: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> dict[Tensor, Tensor]:
    """Parameter -> 0 for each part of it that makes a dead neuron, 1 elsewhere; broadcasts to the parameter.

    The weights of grouped transposed convolutions, which mix their outputs in one dimension, are left out.

    Args:
        dead: root layer -> bool, shape [n].
        layers: the same root layers, as the network is now.
    """
    factors: dict[Tensor, Tensor] = {}
    for name, which in dead.items():
        for parameter, factor in _of_layer(layers[name], which).items():
            known = factors.get(parameter)  # of another layer, as for a BatchNorm behind a concatenation
            factors[parameter] = factor if known is None else known * factor
    return factors


def _of_layer(layer: Layer, dead: Tensor) -> dict[Tensor, Tensor]:
    graph = layer.group._DG
    factors: dict[Tensor, Tensor] = {}
    for item in layer.group.items:
        module = item.dep.target.module
        if not isinstance(module, nn.Module) or not graph.is_out_channel_pruning_fn(item.dep.handler):
            continue
        out = torch.tensor(item.idxs)[dead[torch.tensor(item.root_idxs)]]
        kind = kind_of(module)
        for parameter in kind.maker.parameters(recurse=False):
            dim = kind.makes(parameter)
            if dim is None or parameter.shape[dim] == 1:  # shared by all channels, as in PReLU
                continue
            shape = [1] * parameter.dim()
            shape[dim] = parameter.shape[dim]
            factor = torch.ones(shape, dtype=parameter.dtype, device=parameter.device)
            factors[parameter] = factor.index_fill_(dim, out.to(parameter.device), 0.0)
    return factors
