"""Times of layers that follow from their shapes alone, in place of measured ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dnr_plugin.pruning.latency import layer_shapes
from dnr_plugin.pruning.latency_table import LayerShape

Clock = Callable[[LayerShape], float]


def stairs(step: int = 16, base: float = 1e-5) -> Clock:
    """Seconds that grow with multiply-adds of widths rounded up to a step, on top of what each call takes."""

    def seconds(shape: LayerShape) -> float:
        options = dict(shape.options)
        inputs, outputs = (math.ceil(width / step) * step for width in shape.channels)
        mixed = 1 if "Norm" in shape.type or options.get("groups") == "depthwise" else inputs
        kernel: tuple[int, ...] = options.get("kernel_size", ())
        return base + 1e-9 * mixed * outputs * math.prod(kernel) * math.prod(shape.sizes)

    return seconds


def network_seconds(model: nn.Module, inputs: Any, clock: Clock, rest: float = 0.0) -> float:
    """Of all layers of a network, and what it does beside."""
    shapes = layer_shapes(model, inputs).values()
    return rest + sum(times * clock(shape) for called in shapes for shape, times in called.items())


class Measured:
    """A `latency_table.Measure` by a clock; ``asked`` lists what it was asked for."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.asked = clock, list[LayerShape]()

    def __call__(self, shapes: Sequence[LayerShape]) -> list[list[float]]:
        self.asked += shapes
        return [[self.clock(shape)] * 5 for shape in shapes]
