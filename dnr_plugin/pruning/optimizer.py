"""Keeps an optimizer working through a prune.

Torch-Pruning puts new, smaller parameters in place of the old ones, so that an optimizer made before goes on updating
tensors that no layer uses any more: training stands still without an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Dimension of a parameter -> the indices that were kept of it.
KeptIndices = dict[int, Tensor]


class _Selections(TorchFunctionMode):
    """Notes what `torch.index_select`, by which Torch-Pruning shrinks everything, keeps of certain tensors."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        # by address: a Parameter shares it with the tensor it was made from; both are held here, so none is reused
        self.known: dict[int, tuple[Tensor, Tensor, KeptIndices]] = {p.data_ptr(): (p, p, {}) for p in parameters}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.index_select, Tensor.index_select) and not kwargs and args[0].data_ptr() in self.known:
            _, source, before = self.known[args[0].data_ptr()]
            dim, indices = args[1] % args[0].dim(), args[2]
            kept = {**before, dim: before[dim][indices] if dim in before else indices}
            self.known[result.data_ptr()] = (result, source, kept)
        return result


@contextlib.contextmanager
def follow_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> Iterator[None]:
    """Hands an optimizer's parameters and state on to the channels that are kept by the prunes inside the context.

    Momentum, Adam moments and gradients are sliced exactly as the parameters are, ``requires_grad`` is kept, parameter
    groups keep their options and order, and learning rate schedulers, which hold the optimizer, go on.

    Works with whatever shrinks parameters by ``torch.index_select``, as Torch-Pruning does.

    Args:
        optimizer: any torch optimizer whose state tensors have a parameter's shape or a single element; None to keep
            only the flags.
        model: the network that is pruned inside.

    Raises:
        ValueError: before anything is changed: a state tensor has a shape of its own, as in factored optimizers.
        RuntimeError: a parameter was replaced inside by something other than a prune of it.

    Example:
        >>> with follow_optimizer(optimizer, model):
        ...     pruner.step()
    """
    before = dict(model.named_parameters())
    if optimizer is not None:
        _check(optimizer, before)
    selections = _Selections(list(before.values()))
    try:
        with selections:
            yield
    finally:
        after = dict(model.named_parameters())
        foreign: list[str] = []
        replaced: dict[Tensor, tuple[nn.Parameter, KeptIndices]] = {}
        for name, old in before.items():
            new = after.get(name)
            if new is None or new is old:
                continue
            _, source, kept = selections.known.get(new.data_ptr(), (None, None, {}))
            if source is not old or new.shape != _selected(old.detach(), kept).shape:
                foreign.append(name)
                continue
            new.requires_grad_(old.requires_grad)
            replaced[old] = (new, kept)
        if optimizer is not None:
            _replace(optimizer, replaced)
        if foreign:
            raise RuntimeError(
                f"{', '.join(foreign)}: replaced inside follow_optimizer by something other than a prune of it"
            )


def _selected(value: Tensor, kept: KeptIndices) -> Tensor:
    for dim, indices in kept.items():
        value = value.index_select(dim, indices.to(value.device))
    return value


def _check(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"{type(optimizer).__name__}: expected state of the shape of {name} {tuple(parameter.shape)}, "
                    f"found {key} of shape {tuple(value.shape)}, which cannot follow a prune"
                )


def _replace(optimizer: torch.optim.Optimizer, replaced: dict[Tensor, tuple[nn.Parameter, KeptIndices]]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [replaced[p][0] if p in replaced else p for p in group["params"]]
    for old, (new, kept) in replaced.items():
        if old in optimizer.state:
            optimizer.state[new] = {
                key: _selected(value, kept)
                if isinstance(value, Tensor) and value.shape == old.shape and value.numel() > 1
                else value
                for key, value in optimizer.state.pop(old).items()
            }
