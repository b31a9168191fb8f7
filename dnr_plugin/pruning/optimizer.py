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

from dnr_plugin.network.calling import eager, tensors

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
        optimizer: any torch optimizer whose state tensors have a parameter's shape or a single element, or one that
            wraps such a one, whatever it calls it; None to keep only the flags.
        model: the network that is pruned inside.

    Raises:
        InputError: before anything is changed: the model was scripted, traced or exported, or is quantised.
        ValueError: before anything is changed: a state tensor has a shape of its own, as in factored optimizers.
        RuntimeError: a parameter was replaced inside by something other than a prune of it.

    Example:
        >>> with follow_optimizer(optimizer, model):
        ...     pruner.step()
    """
    model = eager(model)
    before = dict(model.named_parameters())
    optimizers = _optimizers_in(optimizer)
    for one in optimizers:
        _check(one, before)
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
        for one in optimizers:
            _replace(one, replaced)
        if foreign:
            raise RuntimeError(
                f"{', '.join(foreign)}: replaced inside follow_optimizer by something other than a prune of it"
            )


def _selected(value: Tensor, kept: KeptIndices) -> Tensor:
    for dim, indices in kept.items():
        value = value.index_select(dim, indices.to(value.device))
    return value


def _optimizers_in(optimizer: Any) -> list[Any]:
    """An optimizer and those that it wraps, as Lookahead and SAM do, in attributes of any name."""
    known: dict[int, Any] = {}

    def look(value: Any) -> None:
        if id(value) in known:
            return
        if hasattr(value, "param_groups") and hasattr(value, "state"):
            known[id(value)] = value
            for inner in vars(value).values():
                look(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                look(inner)

    look(optimizer)
    return list(known.values())


def _check(optimizer: Any, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        for key, state in optimizer.state.get(parameter, {}).items():
            for value in tensors(state):
                if value.numel() > 1 and value.shape != parameter.shape:
                    raise ValueError(
                        f"{type(optimizer).__name__}: expected state of the shape of {name} {tuple(parameter.shape)}, "
                        f"found {key} of shape {tuple(value.shape)}, which cannot follow a prune"
                    )


def _replace(optimizer: Any, replaced: dict[Tensor, tuple[nn.Parameter, KeptIndices]]) -> None:
    groups = [group["params"] for group in optimizer.param_groups]
    # an optimizer may hold lists of its own, or the same ones by another name, as LBFGS does
    for held in [*groups, *(value for value in vars(optimizer).values() if type(value) is list)]:
        held[:] = [replaced[p][0] if isinstance(p, Tensor) and p in replaced else p for p in held]
    for by_parameter in (value for value in vars(optimizer).values() if isinstance(value, dict)):  # the state is one
        for old, (new, kept) in replaced.items():
            if old in by_parameter:
                by_parameter[new] = _kept_of(by_parameter.pop(old), old.shape, kept)


def _kept_of(state: Any, shape: torch.Size, kept: KeptIndices) -> Any:
    """State of a parameter, with its tensors of the parameter's shape as narrow as it has become."""
    if isinstance(state, Tensor):
        return _selected(state, kept) if state.shape == shape and state.numel() > 1 else state
    if isinstance(state, dict):
        return type(state)((key, _kept_of(value, shape, kept)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(_kept_of(value, shape, kept) for value in state)
    return state
