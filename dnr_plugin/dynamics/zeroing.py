"""Zeroes channels where they are used, without ending their training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.network.calling import input_of
from dnr_plugin.network.kinds import consumer


class _Zeroed(torch.autograd.Function):
    """``a * keep`` forwards, the gradient unchanged backwards (straight-through)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, keep: Tensor) -> Tensor:
        return a * keep

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _ZeroHook:
    """A forward pre-hook. A class, not a closure, so that the model can be copied and pickled with it."""

    def __init__(self, gone: Tensor) -> None:
        self.keep = ~gone

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a = input_of(args, kwargs)
        if a is None:  # the layer will say what is wrong
            return args, kwargs
        keep = self.keep = self.keep.to(a.device)  # replicas of a DataParallel model share the hook
        zeroed = _Zeroed.apply(a, consumer(module).mask(keep).to(a.dtype))

        def replaced(value: Any) -> Any:  # self-attention takes the same tensor three times
            return zeroed if value is a else value

        return tuple(map(replaced, args)), {key: replaced(value) for key, value in kwargs.items()}


class SoftZeros:
    """Channels that are zero where they are used, although the layers that make them go on learning.

    The network computes exactly what it would compute without these channels, so that removing them later changes
    nothing; their gradient is passed on as if they were used (straight-through), so that they can come back. After
    SFP (He et al., IJCAI 2018), which zeroes filters and goes on training them.
    """

    def __init__(self) -> None:
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def set(self, channels: Mapping[nn.Module, Tensor]) -> None:
        """Zeroes these channels and no others.

        Args:
            channels: consumer -> which of its input channels are zero, bool, shape [in_channels].
        """
        self.clear()
        for module, gone in channels.items():
            if gone.any():
                self._handles.append(module.register_forward_pre_hook(_ZeroHook(gone), with_kwargs=True))

    def clear(self) -> None:
        """Zeroes nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
