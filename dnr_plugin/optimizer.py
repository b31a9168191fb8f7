"""Keeps an optimizer working through a prune.

Torch-Pruning puts new, smaller parameters in place of the old ones, so that an optimizer made before goes on updating
tensors that no layer uses any more: training stands still without an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_CODES = {4: torch.int32, 8: torch.int64}


@contextlib.contextmanager
def follow_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> Iterator[None]:
    """Hands an optimizer's parameters and state on to the channels that are kept by the prunes inside the context.

    Momentum, Adam moments and gradients are sliced exactly as the parameters are, ``requires_grad`` is kept, parameter
    groups keep their options and order, and learning rate schedulers, which hold the optimizer, go on.

    Works with whatever slices a parameter's gradient along with the parameter, as Torch-Pruning does: each gradient
    carries, during the context, the position of every element, so that afterwards it tells what was kept.

    Args:
        optimizer: any torch optimizer whose state tensors have a parameter's shape or a single element; None to keep
            only gradients and flags.
        model: the network that is pruned inside.

    Gradients are not to be read inside: a criterion that needs them, such as Taylor's, has to score its groups before.

    Raises:
        ValueError: before anything is changed: a parameter is of a type that cannot carry positions (16 bits), or a
            state tensor has a shape of its own, as in factored optimizers.
        RuntimeError: parameters were changed inside by something other than taking away channels.

    Example:
        >>> with follow_optimizer(optimizer, model):
        ...     pruner.step()
    """
    before = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in before.items()}
    if optimizer is not None:
        _check(optimizer, before)
    positions = [_positions(parameter) for parameter in before.values()]
    for parameter, numbers in zip(before.values(), positions, strict=True):
        parameter.grad = numbers
    try:
        yield
    finally:
        after = dict(model.named_parameters())
        foreign: list[str] = []
        replaced: dict[Tensor, tuple[nn.Parameter, Tensor]] = {}
        for name, old in before.items():
            new, carried = after.get(name), None
            if new is not None:
                carried, new.grad = new.grad, None
            old.grad = None
            if new is None or new is old:
                old.grad = gradients[name]
                continue
            if carried is None or carried.shape != new.shape:
                foreign.append(name)
                continue
            kept = carried.flatten().view(_CODES[carried.element_size()]).long()
            gradient = gradients[name]
            if gradient is not None:
                new.grad = gradient.flatten()[kept].view(new.shape)
            new.requires_grad_(old.requires_grad)
            replaced[old] = (new, kept)
        if optimizer is not None:
            _replace(optimizer, replaced)
        if foreign:
            raise RuntimeError(
                f"{', '.join(foreign)}: replaced inside follow_optimizer by something other than a prune of it"
            )


def _positions(parameter: nn.Parameter) -> Tensor:
    """0, 1, 2, ... as bit patterns in a tensor of the parameter's own type and shape, as a gradient must be."""
    codes = _CODES.get(parameter.element_size())
    if codes is None or not parameter.is_floating_point():
        raise ValueError(f"expected float32 or float64 parameters, found {parameter.dtype}")
    numbers = torch.arange(parameter.numel(), dtype=codes, device=parameter.device)
    return numbers.view(parameter.dtype).view(parameter.shape)


def _check(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"{type(optimizer).__name__}: expected state of the shape of {name} {tuple(parameter.shape)}, "
                    f"found {key} of shape {tuple(value.shape)}, which cannot follow a prune"
                )


def _replace(optimizer: torch.optim.Optimizer, replaced: dict[Tensor, tuple[nn.Parameter, Tensor]]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [replaced[p][0] if p in replaced else p for p in group["params"]]
    for old, (new, kept) in replaced.items():
        if old in optimizer.state:
            optimizer.state[new] = {
                key: value.flatten()[kept].view(new.shape)
                if isinstance(value, Tensor) and value.shape == old.shape and value.numel() > 1
                else value
                for key, value in optimizer.state.pop(old).items()
            }
