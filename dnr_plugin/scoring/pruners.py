"""What a criterion can know of the pruner of Torch-Pruning that asks it, which tells it nothing.

Pruners for sparse training (`GroupNormPruner`, `GrowingRegPruner`) ask the criterion twice: in ``regularize`` and
``update_reg`` for a penalty on weights, for every group, the classifier's included, and in ``step`` for what to remove.
None, which in ``step`` leaves a group alone, is an error in ``regularize``, where NaN does so.

What a pruner takes is its ratio of the groups that it has and that get a score. Layers that are in none of these stay
as they are, without a word of Torch-Pruning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, MutableSet

import torch_pruning as tp
from torch import nn

from dnr_plugin.network.kinds import has_weights

_PENALTIES = ("regularize", "update_reg")
_REACH = 0.5  # share of the parameters
_DEEPEST = 8  # calls between a pruner's method and the criterion: estimate_importance, and torch's decorators


def asked_by() -> tuple[tp.pruner.BasePruner, str] | None:
    """The pruner that asks, and the method of it that does; None where someone else asks."""
    frame = sys._getframe(1)
    for _ in range(_DEEPEST):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        pruner = frame.f_locals.get("self")
        if isinstance(pruner, tp.pruner.BasePruner) and frame.f_code.co_name != "estimate_importance":
            return pruner, frame.f_code.co_name
    return None


def for_a_penalty(asked: tuple[tp.pruner.BasePruner, str] | None) -> bool:
    """Whether it is asked on the way to a penalty on weights."""
    return asked is not None and asked[1] in _PENALTIES


def warn_of_little(
    asked: tuple[tp.pruner.BasePruner, str] | None,
    known: MutableSet[tp.pruner.BasePruner],
    why_unscored: Callable[[tp.dependency.Group], str | None],
) -> None:
    """Warns, once, where a pruner reaches so few layers of a model that it takes much less than it was asked for.

    Args:
        asked: the pruner that asks (`asked_by`).
        known: pruners that were looked at; it is added to them.
        why_unscored: see `within_reach`.
    """
    if asked is None or asked[0] in known:
        return
    known.add(pruner := asked[0])
    share, left = within_reach(pruner, why_unscored)
    if share >= _REACH:
        return
    wanted = f"{pruner.pruning_ratio:.0%}" if isinstance(pruner.pruning_ratio, int | float) else "some"
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    warnings.warn(
        f"Torch-Pruning was asked to remove {wanted} of the channels, and reaches layers with {share:.0%} of the "
        f"parameters alone; left: {', '.join(left[:3])}{more}. plan_removal tells why, layer by layer",
        stacklevel=4,
    )


def within_reach(
    pruner: tp.pruner.BasePruner, why_unscored: Callable[[tp.dependency.Group], str | None]
) -> tuple[float, list[str]]:
    """Share of the parameters of a model's layers that a pruner could take from, and the layers that it leaves.

    Args:
        pruner: with its graph and ignored layers.
        why_unscored: of a group, None where it gets a score.

    Returns:
        Of convolutions, linear layers and other consumers but for the ignored ones, in [0, 1]; 1 where there are none.
    """
    graph, reached = pruner.DG, set[nn.Module]()
    ignored = {part for layer in pruner.ignored_layers if isinstance(layer, nn.Module) for part in layer.modules()}
    groups = graph.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types)
    for group in groups:
        if why_unscored(group) is None and not _lost(pruner, group):
            reached.update(dep.target.module for dep, _ in group if isinstance(dep.target.module, nn.Module))
    sizes = {
        name: (sum(p.numel() for p in module.parameters()), module)
        for name, module in pruner.model.named_modules()
        if has_weights(module) and module not in ignored
    }
    left = [name for name, (_, module) in sizes.items() if module not in reached]
    total = sum(size for size, _ in sizes.values())
    return (sum(size for size, module in sizes.values() if module in reached) / total if total else 1.0), left


def _lost(pruner: tp.pruner.BasePruner, group: tp.dependency.Group) -> bool:
    """Whether the pruner drops the group without asking, as it does with attention whose heads it cannot place."""
    attention = getattr(pruner, "_is_atten_group", lambda group: (False, None))(group)[0]
    return bool(attention) and pruner._downstream_node_as_root_if_attention(group) is None
