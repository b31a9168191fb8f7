"""A layer and the BatchNorm behind it as one affine map, which least squares fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnr_plugin.errors import RunError
from dnr_plugin.network.batchnorm import affine, assign_affine
from dnr_plugin.network.kinds import consumer
from dnr_plugin.repair.least_squares import Task
from dnr_plugin.repair.places import Places

_FLAT = 1e-6  # of a BatchNorm's scale
# Share of the variance that rounding explains; in 16 bits of the mean square, since means are rounded as well.
_SAME, _SAME_16_BITS = 1e-12, 1e-4


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

    def __init__(self, module: nn.Module, norm: nn.Module | None) -> None:
        assert norm is None or isinstance(norm, nn.modules.batchnorm._BatchNorm)
        self.kind = consumer(module)
        self.module, self.norm = self.kind.module, norm
        self._bias = self.module.bias if isinstance(self.module.bias, Tensor) else None
        self.movable = norm is not None or self._bias is not None
        weights: Tensor = self.kind.module.weight.detach().double().flatten(1)
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

    def outputs(self, x: Tensor) -> Tensor:
        """What comes out where the weights are multiplied with x, shape [R, in * taps]; [R, out]."""
        parts = zip(
            *(t.chunk(self.kind.blocks, d) for t, d in ((x, 1), (self.weights, 0), (self.constants, 0))), strict=True
        )
        return torch.cat([a @ weights.T.to(a) + constants.to(a) for a, weights, constants in parts], 1)

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
            wide = outputs.double()
            mean, variance = (wide.mean(0) - shift) / self._scale, wide.var(0, correction=0) / self._scale.square()
            assign_affine(self.norm, self._scale, shift, mean, variance)
        elif self._bias is not None:
            self._bias.copy_(constants)
        self.weights, self.constants = weights, constants


@dataclass(frozen=True)
class LayerRepair:
    """What repair did to one layer.

    Attributes:
        layer: its name.
        error_before, error_after: mean square of what its outputs lack, behind a BatchNorm and together with what they
            are added to, relative to their variance in the dense network; on all images. The second is never above the
            first. Of the first of a pair, as it was fitted for itself.
        damping: lambda, as a share of the mean variance of its inputs; None where the layer was left as it was, since
            no fit served it better.
        left: why it was left as it was, or None.
        few: whether it was fitted at no more places than an output has weights: more images would serve it.
        narrow: whether the networks ran in 16 bits (`Reference`'s ``amp``).
    """

    layer: str
    error_before: float = 0.0
    error_after: float = 0.0
    damping: float | None = None
    left: str | None = None
    few: bool = False
    narrow: bool = False


@dataclass
class Fit:
    """A layer of a pruned network and what it should give.

    Attributes:
        name: of the layer.
        layer: with the BatchNorm behind it.
        rectified: whether a ReLU follows.
        a: its input, shape [N, ...].
        goal: what should come out at the places, with ``other`` added, shape [R, out].
        other: what is added in the pruned network, shape [R, out], or None.
        places: where.
        narrow: whether networks run in 16 bits.
    """

    name: str
    layer: Affine
    rectified: bool
    a: Tensor
    goal: Tensor
    other: Tensor | None
    places: Places
    narrow: bool = False

    @functools.cached_property
    def variance(self) -> float:
        """Sum of squares of the goal around its means; > 0."""
        goal = self.goal.relu() if self.rectified else self.goal
        return max(float((goal - goal.mean(0)).double().square().sum()), 1e-30)

    @functools.cached_property
    def same(self) -> float:
        """Error up to which there is nothing to fit."""
        if not self.narrow:
            return _SAME
        return _SAME_16_BITS * float(self.goal.square().sum(1).double().sum()) / self.variance

    def rows(self) -> Tensor:
        """What the weights of the layer's outputs are multiplied with, shape [R, in * taps]."""
        kind, a, places = self.layer.kind, self.a, self.places
        chunks = range(0, len(a), places.chunk)
        parts = [kind.rows(a[start : start + places.chunk], places.of_chunk(start)) for start in chunks]
        return torch.cat(parts).to(self.goal)

    def solve(self) -> LayerRepair:
        """Fits the layer in place; where that does not lower its error it gives what it gave.

        Raises:
            RunError: what it reads is not finite.
        """
        layer, x = self.layer, self.rows()
        if not x.isfinite().all():
            raise RunError(f"{self.name}: expected inputs that are finite, found others: nothing can be fitted to them")
        other = torch.zeros_like(self.goal) if self.other is None else self.other
        weights, constants = layer.weights.chunk(layer.kind.blocks), layer.constants.chunk(layer.kind.blocks)
        x_parts, goals, others = (part.chunk(layer.kind.blocks, 1) for part in (x, self.goal, other))
        parts = zip(x_parts, goals, others, weights, constants, strict=True)
        tasks = [Task(*part, constant=layer.movable, rectified=self.rectified) for part in parts]
        lacks = [task.lacking(task.outputs) for task in tasks]
        before = sum(lacks) / self.variance
        if before < self.same:
            return LayerRepair(self.name, before, before, narrow=self.narrow)
        tasks = [task.fitted(lack) for task, lack in zip(tasks, lacks, strict=True)]
        outputs = [task.outputs for task in tasks]
        after = sum(task.lacking(result) for task, result in zip(tasks, outputs, strict=True)) / self.variance
        fitted = torch.cat([task.weights for task in tasks]), torch.cat([task.constants for task in tasks])
        layer.assign(*fitted, torch.cat(outputs, 1))
        damping = max((task.damping for task in tasks if task.damping is not None), default=None)
        few = damping is not None and any(task.few for task in tasks)
        return LayerRepair(
            self.name, before, before if damping is None else after, damping, few=few, narrow=self.narrow
        )
