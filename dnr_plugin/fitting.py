"""One layer, with what it reads and what should come out, fitted in place by least squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .affine import Affine
from .errors import RunError
from .least_squares import Task
from .patches import channels_second, patches
from .places import Places

SAME = 1e-12  # share of the variance that rounding explains


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
    """

    layer: str
    error_before: float = 0.0
    error_after: float = 0.0
    damping: float | None = None
    left: str | None = None


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
    """

    name: str
    layer: Affine
    rectified: bool
    a: Tensor
    goal: Tensor
    other: Tensor | None
    places: Places

    def rows(self) -> Tensor:
        """What the weights of the layer's outputs are multiplied with, shape [R, in * taps]."""
        module, a, places = self.layer.module, self.a, self.places
        if isinstance(module, nn.modules.conv._ConvNd):
            chunks = range(0, len(a), places.chunk)
            parts = [patches(module, a[start : start + places.chunk], places.of_chunk(start)) for start in chunks]
            return torch.cat(parts).to(self.goal)
        return places.pick(channels_second(module, a), 0).to(self.goal)

    def solve(self) -> LayerRepair:
        """Fits the layer in place; where that does not lower its error it gives what it gave.

        Raises:
            RunError: what it reads is not finite.
        """
        layer, x = self.layer, self.rows()
        if not x.isfinite().all():
            raise RunError(f"{self.name}: expected inputs that are finite, found others: nothing can be fitted to them")
        other = torch.zeros_like(self.goal) if self.other is None else self.other
        weights, constants = layer.weights.chunk(layer.groups), layer.constants.chunk(layer.groups)
        x_parts, goals, others = (part.chunk(layer.groups, 1) for part in (x, self.goal, other))
        parts = zip(x_parts, goals, others, weights, constants, strict=True)
        tasks = [Task(*part, constant=layer.movable, rectified=self.rectified) for part in parts]
        variance = max(sum(task.variance for task in tasks), 1e-30)
        lacks = [task.lacking(task.outputs()) for task in tasks]
        before = sum(lacks) / variance
        if before < SAME:
            return LayerRepair(self.name, before, before)
        tasks = [task.fitted(lack) for task, lack in zip(tasks, lacks, strict=True)]
        outputs = [task.outputs() for task in tasks]
        after = sum(task.lacking(found) for task, found in zip(tasks, outputs, strict=True)) / variance
        fitted = torch.cat([task.weights for task in tasks]), torch.cat([task.constants for task in tasks])
        layer.assign(*fitted, torch.cat(outputs, 1))
        damping = max((task.damping for task in tasks if task.damping is not None), default=None)
        return LayerRepair(self.name, before, before if damping is None else after, damping)
