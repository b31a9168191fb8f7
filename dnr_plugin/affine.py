"""A layer and the BatchNorm behind it as one affine map, which least squares fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batchnorm import affine, assign_affine

_FLAT = 1e-6  # of a BatchNorm's scale


class Affine:
    """A Linear or a convolution, and what a BatchNorm in eval mode makes of its outputs.

    Args:
        module: the layer.
        norm: the BatchNorm behind it, if any.

    Attributes:
        weights: by what they are multiplied with, float64, shape [out, in / groups * taps].
        constants: what is added, float64, shape [out].
        movable: whether something can take a change of the constants.
    """

    def __init__(self, module: nn.Linear | nn.modules.conv._ConvNd, norm: nn.Module | None) -> None:
        assert norm is None or isinstance(norm, nn.modules.batchnorm._BatchNorm)
        self.module, self.norm = module, norm
        self._bias = module.bias if isinstance(module.bias, Tensor) else None
        self.movable = norm is not None or self._bias is not None
        weights = module.weight.detach().double().flatten(1)
        self._scale = weights.new_ones(len(weights))
        shift = torch.zeros_like(self._scale)
        if norm is not None:
            scale, shift = affine(norm)
            self._scale = torch.where(scale.abs() < _FLAT, _FLAT, scale)  # switched off: whatever it is multiplied with
        self.weights = weights * self._scale[:, None]
        self.constants = self._inner * self._scale + shift

    @property
    def _inner(self) -> Tensor:
        """The layer's own constants, in front of the BatchNorm."""
        return torch.zeros_like(self._scale) if self._bias is None else self._bias.detach().double()

    @property
    def groups(self) -> int:
        """Of a grouped convolution; else 1."""
        return int(getattr(self.module, "groups", 1))

    def run(self, a: Tensor, weights: Tensor, constants: Tensor) -> Tensor:
        """What comes out of an input with some weights and constants, shaped as this layer's."""
        weights, constants = weights.view_as(self.module.weight).to(a), constants.to(a)
        if isinstance(self.module, nn.Linear):
            return F.linear(a, weights, constants)
        found: Tensor = self.module._conv_forward(a, weights, constants)
        return found

    def snapshot(self) -> Callable[[], None]:
        """What makes layer and BatchNorm again what they are now, to the bit."""
        modules = [module for module in (self.module, self.norm) if module is not None]
        tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
        saved = [tensor.detach().clone() for tensor in tensors]
        weights, constants = self.weights, self.constants

        def restore() -> None:
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
            self.weights, self.constants = weights, constants

        return restore

    def assign(self, weights: Tensor, constants: Tensor, outputs: Tensor) -> None:
        """Changes layer and BatchNorm, in place.

        Args:
            weights, constants: what they should come to.
            outputs: what then comes out at some places, shape [R, out], from which BatchNorm's statistics are taken.
        """
        shift = constants - self._scale * self._inner
        self.module.weight.copy_((weights / self._scale[:, None]).view_as(self.module.weight))
        if isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            found = outputs.double()
            mean, variance = (found.mean(0) - shift) / self._scale, found.var(0, correction=0) / self._scale.square()
            assign_affine(self.norm, self._scale, shift, mean, variance)
        elif self._bias is not None:
            self._bias.copy_(constants)
        self.weights, self.constants = weights, constants
