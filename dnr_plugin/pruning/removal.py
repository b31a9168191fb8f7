"""Takes neurons out of a network, with everything in their dependency groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.network.dependencies import build_graph
from dnr_plugin.pruning.folding import fold_means
from dnr_plugin.pruning.optimizer import follow_optimizer
from dnr_plugin.scoring.importance import DyingNeuronImportance


def prune_neurons(
    model: nn.Module,
    example_inputs: Any,
    removals: Mapping[str, Sequence[int]],
    *,
    importance: DyingNeuronImportance | None = None,
    fold: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Physically removes neurons and everything in their dependency groups.

    Afterwards modes, ``requires_grad``, gradients and the memory format are as they were, on the new shapes.

    Args:
        model: changed in place.
        example_inputs: as Torch-Pruning takes them.
        removals: root layer -> neurons, as in `Plan`.
        importance: whose statistics then follow, and whose means are folded.
        fold: move the means of the removed neurons into the next bias or BatchNorm; needs ``importance``.
        optimizer: taken along (`follow_optimizer`).

    Returns:
        Number of consumers that took a mean.

    Raises:
        RuntimeError: a removal would leave a layer without channels.
    """
    if fold and importance is None:
        raise ValueError("fold: expected an importance, whose statistics hold the means, found none")
    modules = dict(model.named_modules())
    channels_last = [name for name, p in model.named_parameters() if _is_channels_last(p)]
    folded = 0
    with follow_optimizer(optimizer, model):
        graph = build_graph(model, example_inputs)
        for name, neurons in removals.items():
            if not neurons:
                continue
            root = modules[name]
            prune = graph.get_pruner_of_module(root).prune_out_channels
            group = graph.get_pruning_group(root, prune, list(neurons))
            if not graph.check_pruning_group(group):
                raise RuntimeError(f"{name}: removing {len(neurons)} neurons would leave a layer without channels")
            if importance is not None:
                importance.follow(group)
                if fold:
                    done = fold_means(graph, importance.evidence(group))
                    folded += sum(what in ("bias", "BatchNorm") for _, what, _ in done)
            group.prune()
    for name in channels_last:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return folded


def _is_channels_last(value: Tensor) -> bool:
    return value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
