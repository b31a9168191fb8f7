"""How far the removals that a dependency graph has recorded were carried over to statistics."""

from __future__ import annotations

import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.network.calling import module_names


class Pending:
    """Which lasting channel numbers of a consumer go when certain root indices go."""

    def __init__(self, consumer: str, ids: Tensor, roots: Tensor) -> None:
        self.consumer, self.ids, self.roots = consumer, ids, roots


class Followed:
    """How far a dependency graph's pruning history has been carried over."""

    def __init__(self, graph: tp.DependencyGraph) -> None:
        self.names: dict[nn.Module, str] = {
            module: name for name, module in graph.model.named_modules()
        }  # as the history has them
        self.consumers = module_names(graph.model)
        self.seen = len(graph.pruning_history())
        self.pending: dict[tuple[str, bool], list[Pending]] = {}
