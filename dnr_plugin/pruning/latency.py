"""Predicts the latency of a network while channels are taken away, from measured times of its layers.

In whole layers time is a staircase: hardware works on blocks of channels, and a block that is not full takes as long as
one that is. Widths are rounded up to such a block; between measured blocks time is bilinear in the channels in and out.
In a network layers take longer than alone, or less long, as what they read is in the cache, and between them is what
works element by element: all this goes with their time. What multiplies matrices outside of layers that can be timed
alone, as attention does, is constant: a share of the latency as of the FLOPs.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.network.calling import call, in_eval, input_of, uncompiled
from dnr_plugin.network.cost import FlopReport
from dnr_plugin.network.kinds import Depthwise, kind_of
from dnr_plugin.pruning.cost_model import Effect
from dnr_plugin.pruning.latency_table import LatencyTable, LayerShape
from dnr_plugin.pruning.layers import Layer

MULTIPLES = (4, 8, 16, 32)  # of channels that hardware may round to, beside 1
_NOTHING = 0.35  # of what half a step would save without stairs: so little is nothing
_PROBED = 64  # channels at which stairs are looked for: wide enough for the largest, and they are steep there
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm2d", "GroupNorm", "LayerNorm")


def layer_shapes(model: nn.Module, inputs: Any, runtime: str = "eager") -> dict[str, Counter[LayerShape]]:
    """The layers of a network that a table has times of, with the shapes that they are called with and how often.

    Args:
        model: stays as it is.
        inputs: one batch.
        runtime: of `runtimes.RUNTIMES`, which runs the layers. In ONNX Runtime, which folds a BatchNorm right behind a
            convolution into it, such a one has no shape.
    """
    noted: dict[str, Counter[LayerShape]] = {}
    names = {module: name for name, module in model.named_modules()}
    convolved: tuple[Any, int] = None, 0  # what the last convolution gave, and its version

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = input_of(args, kwargs)
        shape = _shape_of(module, given, runtime) if given is not None else None
        if shape is None:
            return
        called = noted.setdefault(names[module], Counter())
        folded = given is convolved[0] and given is not None and given._version == convolved[1]
        if not (folded and shape.type.startswith("BatchNorm")):
            called[shape] += 1

    def note_output(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        nonlocal convolved
        if isinstance(out, Tensor) and not out.is_inference():  # which have no version
            convolved = out, out._version

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in names]
    if runtime == "onnxruntime":
        convolutions = [module for module in names if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
        handles += [module.register_forward_hook(note_output) for module in convolutions]
    with in_eval(model, handles), uncompiled(), torch.no_grad():
        call(model, inputs)
    return noted


def _shape_of(module: nn.Module, given: Tensor, runtime: str) -> LayerShape | None:
    kind, name = kind_of(module), type(module).__name__
    if type(module) is not getattr(nn, name, None) or not kind.channels[1]:
        return None
    dtype, last = str(given.dtype).removeprefix("torch."), given.dim() - 1
    held: Any = module
    if runtime == "onnxruntime" and (dtype != "float32" or getattr(held, "padding_mode", "zeros") != "zeros"):
        return None  # what `onnx_runtime.layer_graph` does not make
    options: dict[str, Any]
    if name in _CONVOLUTIONS and given.dim() == len(held.kernel_size) + 2:
        options = {key: getattr(held, key) for key in ("kernel_size", "stride", "padding", "dilation")}
        groups = "depthwise" if isinstance(kind, Depthwise) else held.groups
        options |= {"groups": groups, "bias": held.bias is not None, "padding_mode": held.padding_mode}
        at = 1
    elif name == "Linear":
        options, at = {"bias": held.bias is not None}, last
    elif name == "LayerNorm" and len(held.normalized_shape) == 1:
        options, at = {"elementwise_affine": held.elementwise_affine}, last
    elif name == "GroupNorm" and not kind.separate:
        options, at = {"num_groups": held.num_groups, "affine": held.affine}, 1
    elif name in _NORMS and hasattr(held, "track_running_stats") and given.dim() > 2:
        options, at = {"affine": held.affine, "track_running_stats": held.track_running_stats}, 1
    else:
        return None
    sizes = tuple(size for dim, size in enumerate(given.shape) if dim != at)
    images = given.dim() == 4 and not given.is_contiguous()
    channels_last = images and given.is_contiguous(memory_format=torch.channels_last) and runtime != "onnxruntime"
    return LayerShape(name, tuple(options.items()), kind.channels, sizes, dtype, channels_last, runtime)


class _Curve:
    """Seconds of a layer by its widths.

    Args:
        shape: of the layer as it is now.
        sides: which of its widths may shrink, inputs and outputs; where these are one, outputs.
        table: of times.
    """

    def __init__(self, shape: LayerShape, sides: tuple[bool, bool], table: LatencyTable) -> None:
        self.shape, self.table = shape, table
        groups = dict(shape.options).get("groups", dict(shape.options).get("num_groups", 1))
        self.single = groups == "depthwise" or shape.type in _NORMS
        self.blocks = groups if isinstance(groups, int) else 1
        self.sides = (False, any(sides)) if self.single else sides
        self.multiple = self.blocks
        self.grids: list[list[int]] = []
        self._known: dict[tuple[int, int], float] = {}

    def at(self, inputs: int, outputs: int) -> LayerShape:
        return self.shape.with_channels(outputs if self.single else inputs, outputs)

    def probes(self) -> list[LayerShape]:
        """The layer at widths that show its stairs: the base, half a step of each of `MULTIPLES` less, and half."""
        if not any(self.sides):
            return []
        narrowest = min(width for width, side in zip(self.shape.channels, self.sides, strict=True) if side)
        base = _PROBED if narrowest >= _PROBED else _PROBED // 2
        widths = [base, *(base - multiple // 2 for multiple in MULTIPLES if multiple <= base // 2), base // 2]
        if any(width % self.blocks for width in widths):
            return []
        full = self.shape.channels
        return [self.at(*(w if side else k for k, side in zip(full, self.sides, strict=True))) for w in widths]

    def half_steps(self) -> list[tuple[float, float]]:
        """For each of `MULTIPLES`, what half a step saves, and what it would without stairs: shares of the layer."""
        probes = self.probes()
        if not probes:
            return []
        first, *halves, half = (self.table.seconds(shape) for shape in probes)
        base, *less, least = (shape.channels[1] if self.sides[1] else shape.channels[0] for shape in probes)
        slope = max(first - half, 0.0) / (base - least)
        return [
            ((first - seconds) / first, slope * (base - width) / first)
            for seconds, width in zip(halves, less, strict=True)
        ]

    def use_stairs(self) -> None:
        """Rounds widths to what the probes show."""
        self.multiple = math.lcm(_largest(self.half_steps()), self.blocks)
        self.grids = [
            _grid(width, self.multiple) if side else [width]
            for width, side in zip(self.shape.channels, self.sides, strict=True)
        ]

    def points(self) -> list[LayerShape]:
        """The layer at all widths between which times are interpolated."""
        if self.single:
            return [self.at(width, width) for width in self.grids[1]]
        return [self.at(inputs, outputs) for inputs in self.grids[0] for outputs in self.grids[1]]

    def seconds(self, inputs: float, outputs: float) -> float:
        """At any widths up to those that it has now."""
        pair = (self.rounded(inputs, 0), self.rounded(outputs, 1))
        if pair not in self._known:
            (low, high, share), (first, last, part) = (
                _between(grid, width) for grid, width in zip(self.grids, pair, strict=True)
            )
            corners = [
                (1 - share) * self.table.seconds(self.at(low, k)) + share * self.table.seconds(self.at(high, k))
                for k in (first, last)
            ]
            self._known[pair] = (1 - part) * corners[0] + part * corners[1]
        return self._known[pair]

    def rounded(self, width: float, side: int) -> int:
        """The width that takes as long: of the inputs, side 0, or of the outputs."""
        full = self.shape.channels[side]
        if not self.sides[side]:
            return full
        return min(full, max(1, math.ceil(width / self.multiple - 1e-6)) * self.multiple)


@dataclass(frozen=True)
class LayerTime:
    """What a table says of a layer, all its calls together.

    Attributes:
        before, after: seconds, of the layer as it was and with the channels that it keeps.
        least: seconds at the narrowest widths that the table has, which are ``narrowest``.
        kept: channels in and out, on average where not all parts of the network lose as many.
        rounded: channels in and out that take as long.
    """

    before: float
    after: float
    least: float
    narrowest: tuple[int, int]
    kept: tuple[float, float]
    rounded: tuple[int, int]


@dataclass
class _Timed:
    curves: list[tuple[_Curve, int]]
    first: tuple[int, int]
    gone: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def kept(self) -> tuple[float, float]:
        return self.first[0] - self.gone[0], self.first[1] - self.gone[1]

    @property
    def shrinks(self) -> bool:
        return any(self.curves[0][0].sides)

    def seconds(self, widths: tuple[float, float] | None = None) -> float:
        return sum(times * curve.seconds(*(widths or self.kept)) for curve, times in self.curves)

    def time(self) -> LayerTime:
        curve, kept = self.curves[0][0], self.kept
        narrowest = curve.grids[0][0], curve.grids[1][0]
        rounded = curve.rounded(kept[0], 0), curve.rounded(kept[1], 1)
        if curve.single:  # its inputs are its outputs
            kept, rounded, narrowest = (kept[1], kept[1]), (rounded[1], rounded[1]), (narrowest[1], narrowest[1])
        least = self.seconds(narrowest)
        return LayerTime(self.seconds(self.first), self.seconds(), least, narrowest, kept, rounded)


class LatencyModel:
    """Running latency of a model as channels go, as a share of its latency now.

    Args:
        model: the network as it is now; stays as it is.
        inputs: the batch that it is timed on.
        layers: that may shrink.
        report: of its FLOPs.
        table: of layer times; what it lacks is measured.
        stairs_only: whether only `multiple` is asked for, which takes fewer measurements.

    Attributes:
        multiple: of channels below which smaller steps save nothing, over all layers that shrink: 1 or one of
            `MULTIPLES`.
        share: of the latency now that remains.
        rest: share of the latency now that stays constant.

    Raises:
        RunError: the machine is too noisy to tell.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        layers: Iterable[Layer],
        report: FlopReport,
        table: LatencyTable,
        *,
        runtime: str = "eager",
        stairs_only: bool = False,
    ) -> None:
        shrinking = {side for layer in layers for part in layer.parts for side in part.effect}
        curves: dict[tuple[LayerShape, tuple[bool, bool]], _Curve] = {}
        self._layers: dict[str, _Timed] = {}
        for name, shapes in layer_shapes(model, inputs, runtime).items():
            sides = ((name, "in") in shrinking, (name, "out") in shrinking)
            used = [(curves.setdefault((s, sides), _Curve(s, sides, table)), times) for s, times in shapes.items()]
            self._layers[name] = _Timed(used, next(iter(shapes)).channels if shapes else (0, 0))
        known = list(curves.values())
        table.require(shape for curve in known for shape in (curve.shape, *curve.probes()))
        self.multiple = self._multiple()
        self.share, self._scale = 1.0, 0.0
        timed = sum(layer.flops for layer in report.layers if layer.name in self._layers)
        self.rest = 1.0 - timed / report.flops if report.flops else 0.0
        if stairs_only:
            return
        for curve in known:
            curve.use_stairs()
        table.require(point for curve in known for point in curve.points())
        whole = sum(layer.seconds() for layer in self._layers.values())
        self._scale = (1.0 - self.rest) / whole if whole else 0.0

    def _multiple(self) -> int:
        """By what half steps save of all layers together."""
        sums = [(0.0, 0.0)] * len(MULTIPLES)
        for layer in self._layers.values():
            for curve, times in layer.curves:
                weight = times * curve.table.seconds(curve.shape)
                for number, (saved, expected) in enumerate(curve.half_steps()):
                    sums[number] = sums[number][0] + weight * saved, sums[number][1] + weight * expected
        return _largest(sums)

    def remove(self, effect: Effect) -> float:
        """Takes channels away from the sides of layers; negative numbers give them back.

        Args:
            effect: (module name, "in" or "out") -> channels that go.

        Returns:
            The share of the latency that it saves.
        """
        touched = {name for name, _ in effect if name in self._layers}
        before = sum(self._layers[name].seconds() for name in touched)
        for (name, side), count in effect.items():
            if name in touched:
                self._layers[name].gone[side == "out"] += count
        after = sum(self._layers[name].seconds() for name in touched)
        saved = (before - after) * self._scale
        self.share -= saved
        return saved

    def times(self) -> dict[str, LayerTime]:
        """Of the layers that take time and may shrink, with the channels that they have by now."""
        return {name: layer.time() for name, layer in self._layers.items() if layer.curves and layer.shrinks}


def _largest(half_steps: Sequence[tuple[float, float]]) -> int:
    """The largest of `MULTIPLES` up to which half steps save nothing; 1 where the first ones do.

    Args:
        half_steps: for each, what half a step saves, and what it would without stairs.
    """
    multiple = 1
    for candidate, (saved, expected) in zip(MULTIPLES, half_steps, strict=False):
        if expected <= 0.0 or saved > _NOTHING * expected:  # time that no width changes has no stairs
            break
        multiple = candidate
    return multiple


def _grid(width: int, multiple: int) -> list[int]:
    """Widths up to one: powers of two from a sixteenth on, halfway between these from a half on, the width."""
    powers = [2**k for k in range(width.bit_length())]
    wanted = {power for power in powers if 16 * power >= width}
    wanted |= {3 * power // 2 for power in powers if 2 * power >= width and power > 1}
    rounded = {multiple} | {value for value in wanted if value % multiple == 0}
    return sorted({value for value in rounded if value < width} | {width})


def _between(grid: Sequence[int], width: float) -> tuple[int, int, float]:
    """The grid's widths around one, and how far between them it is."""
    index = min(bisect.bisect_left(grid, width), len(grid) - 1)
    low, high = grid[max(index - 1, 0)], grid[index]
    if index == 0 or high <= width:
        return high, high, 0.0
    return low, high, (width - low) / (high - low)
