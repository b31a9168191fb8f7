"""Measured times of single layers, kept in a file: what latency is predicted from.

A layer's time hardly depends on its weights, so one is made anew at every width that is asked for. All widths are timed
in turn, in an order of its own each round, so that drift hits all alike.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.devices import device_name, now
from dnr_plugin.errors import InputError, RunError, first_line
from dnr_plugin.files import atomic_write, read_json
from dnr_plugin.network.runtimes import RUNTIMES

_FORMAT = 1
NOISY = 0.25  # share by which times may differ between the even and the odd rounds
_TRIES = 3  # with further rounds each
_ALONG = 32  # layers that are measured again when others are new
_TOGETHER = 2**30  # bytes of weights that are timed in turn; more are timed in parts
_SECONDS, _LEAST, _MOST = 20.0, 5, 25  # rounds that are timed: within so many seconds, but no fewer and no more
_THREADS = 256  # of all layers of ONNX Runtime that are timed in turn: each has its own, and a file that is open
_CUDA_REPEATS = 10  # calls of a layer until the GPU is waited for, which a network does once for all its layers


@dataclass(frozen=True)
class LayerShape:
    """What decides how long a layer takes.

    Attributes:
        type: class of torch.
        options: arguments of its constructor beside channels, by name.
        channels: inputs and outputs.
        sizes: the input's dimensions but for its channels: batch, then positions.
        dtype: of the input, as torch names it.
        channels_last: whether the input lies so in memory.
        runtime: of `runtimes.RUNTIMES`, which runs it.
    """

    type: str
    options: tuple[tuple[str, Any], ...]
    channels: tuple[int, int]
    sizes: tuple[int, ...]
    dtype: str = "float32"
    channels_last: bool = False
    runtime: str = "eager"

    @property
    def key(self) -> str:
        """Names it in the table's file."""
        options = " ".join(f"{name}={value}" for name, value in self.options)
        layout = " channels_last" if self.channels_last else ""
        sizes, (inputs, outputs) = "x".join(map(str, self.sizes)), self.channels
        runtime = RUNTIMES[self.runtime].version
        return f"{runtime} {self.type} {inputs}->{outputs} at {sizes} {options} {self.dtype}{layout}"

    def with_channels(self, inputs: int, outputs: int) -> LayerShape:
        """The same layer of other widths."""
        return replace(self, channels=(inputs, outputs))

    def module(self) -> nn.Module:
        """A layer of this shape; behind a norm of images follows the ReLU that is there nearly always."""
        (inputs, outputs), options = self.channels, dict(self.options)
        kind = getattr(nn, self.type)
        if self.type.startswith("Conv"):
            if options["groups"] == "depthwise":
                options["groups"] = inputs
            return kind(inputs, outputs, **options)  # type: ignore[no-any-return]
        if self.type == "Linear":
            return nn.Linear(inputs, outputs, **options)
        if self.type == "GroupNorm":
            return nn.GroupNorm(options.pop("num_groups"), outputs, **options)
        if self.type == "LayerNorm":
            return nn.LayerNorm(outputs, **options)
        return nn.Sequential(kind(outputs, **options), nn.ReLU(inplace=True))

    def input_shape(self) -> tuple[int, ...]:
        """With the channels where the layer has them."""
        inputs = self.channels[0]
        if self.type in ("Linear", "LayerNorm"):
            return (*self.sizes, inputs)
        return (self.sizes[0], inputs, *self.sizes[1:])


# Seconds of every round of each layer, all in turn.
Measure = Callable[[Sequence[LayerShape]], list[list[float]]]


class LatencyTable:
    """Seconds of one forward pass of layers, in eval mode.

    Args:
        device: that they are measured on.
        file: where they are kept, `table_file` by default; None: nowhere. A file of another machine, or a damaged one,
            is not used and written anew, with a warning.
        measure: what times layers, `timed_layers` by default.
    """

    def __init__(
        self, device: torch.device, file: str | os.PathLike[str] | None = "", *, measure: Measure | None = None
    ) -> None:
        self.device, self.machine = device, machine(device)
        self.file = None if file is None else Path(file) if file else table_file(self.machine)
        self._measure = measure or (lambda shapes: timed_layers(shapes, device))
        self._layers: dict[str, float] = self._stored(tell=True)

    def __len__(self) -> int:
        return len(self._layers)

    def seconds(self, shape: LayerShape) -> float:
        """Of a layer that was asked for by `require`."""
        return self._layers[shape.key]

    def require(self, shapes: Iterable[LayerShape]) -> None:
        """Measures those layers that the table lacks, and writes it.

        Some of those that it has are measured along, and what is new is scaled to them: a machine may be slower now.

        Raises:
            RunError: the times spread so much that they say nothing.
        """
        asked = {shape.key: shape for shape in shapes}
        missing = [shape for key, shape in asked.items() if key not in self._layers]
        if not missing:
            return
        known = [shape for key, shape in asked.items() if key in self._layers]
        known = known[:: -(-len(known) // _ALONG) or 1]
        measured = [*missing, *known]
        rounds: list[list[float]] = [[] for _ in measured]
        spread = math.inf
        for _ in range(_TRIES):
            rounds = [[*before, *after] for before, after in zip(rounds, self._measure(measured), strict=True)]
            spread = _spread(rounds)
            if spread <= NOISY:
                break
        else:
            raise RunError(
                f"latency: expected layer times that repeat within {NOISY:.0%}, found a spread of {spread:.0%} after "
                f"{len(rounds[0])} rounds: this machine is too busy to tell; try again when it is not"
            )
        times = [undisturbed(of_layer) for of_layer in rounds]
        again, before = sum(times[len(missing) :]), sum(map(self.seconds, known))
        scale = before / again if known else 1.0
        self._layers |= {shape.key: scale * seconds for shape, seconds in zip(missing, times, strict=False)}
        self._write()

    def _stored(self, tell: bool = False) -> dict[str, float]:
        """What the file holds, if it is of this machine."""
        if self.file is None or not self.file.exists():
            return {}
        try:
            stored = read_json(self.file)
            if not isinstance(stored, dict) or stored.get("format") != _FORMAT or not _sound(stored.get("layers")):
                raise InputError(f"{self.file}: expected a table of layer times, found damage or another format")
            if stored.get("machine") != self.machine:
                other = stored["machine"].get("device") if isinstance(stored.get("machine"), dict) else None
                raise InputError(
                    f"{self.file}: expected layer times of this machine ({self.machine['device']}, torch "
                    f"{self.machine['torch']}), found those of another ({other})"
                )
        except InputError as error:
            if tell:
                warnings.warn(f"{error}; they are measured anew", stacklevel=4)
            return {}
        layers: dict[str, float] = stored["layers"]
        return layers

    def _write(self) -> None:
        if self.file is None:
            return
        self._layers = {**self._stored(), **self._layers}  # with what another process has measured meanwhile
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.file) as file:
                json.dump({"format": _FORMAT, "machine": self.machine, "layers": self._layers}, file, indent=1)
        except OSError as error:
            warnings.warn(f"{self.file}: layer times are not kept: {first_line(error)}", stacklevel=4)


def machine(device: torch.device) -> dict[str, str]:
    """What layer times hold for: device with vector units and threads, torch, what cuDNN may choose."""
    cudnn = torch.backends.cudnn
    settings = f"cudnn {cudnn.version()}, benchmark {cudnn.benchmark}" if device.type == "cuda" else ""  # type: ignore[no-untyped-call]
    return {"device": device_name(device), "torch": torch.__version__, "settings": settings}


def table_file(machine: Mapping[str, str]) -> Path:
    """Where the layer times of a machine are kept: one file each, in ``$XDG_CACHE_HOME/dnr_plugin``."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache).expanduser() / "dnr_plugin" / f"layer-times-{digest}.json"


def timed_layers(shapes: Sequence[LayerShape], device: torch.device) -> list[list[float]]:
    """A `Measure` that runs the layers; their inputs lie in the cache as far as they fit, their weights do not."""
    largest = max(math.prod(shape.input_shape()) for shape in shapes)
    inputs = {kind: torch.randn(largest, device=device).to(getattr(torch, kind)) for kind in {s.dtype for s in shapes}}
    rounds: list[list[float]] = []
    alone = any(shape.runtime != "eager" for shape in shapes)  # with threads of its own
    most = max(1, _THREADS // torch.get_num_threads()) if alone else len(shapes)
    for part in _parts([_weights(shape) for shape in shapes], most):
        calls = [_call(shapes[number], inputs[shapes[number].dtype], device) for number in part]
        measured = _rounds(calls, _SECONDS * len(part) / len(shapes), device)
        runtimes = [RUNTIMES[shapes[number].runtime] for number in part]
        for runtime, (layer, _), times in zip(runtimes, calls, measured, strict=True):
            rounds.append(runtime.seconds(layer, times)[1:])
    return rounds


def _weights(shape: LayerShape) -> int:
    """Bytes of its weights, roughly."""
    kernel: tuple[int, ...] = dict(shape.options).get("kernel_size", ())
    return 4 * math.prod(shape.channels) * math.prod(kernel)


def _parts(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of layers that are timed together: in each part up to so many, as far as memory has room for them."""
    part, held = list[int](), 0
    for number, size in enumerate(sizes):
        if part and (held + size > _TOGETHER or len(part) == most):
            yield part
            part, held = [], 0
        part.append(number)
        held += size
    if part:
        yield part


def _call(shape: LayerShape, buffer: Tensor, device: torch.device) -> tuple[nn.Module, Tensor]:
    sizes = shape.input_shape()
    given = buffer[: math.prod(sizes)].view(sizes)
    layer = shape.module().eval().to(device=device, dtype=given.dtype)
    if shape.channels_last:
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch, channels, *positions = sizes
        given = buffer[: math.prod(sizes)].view(batch, *positions, channels).movedim(-1, 1)
    return RUNTIMES[shape.runtime].layer(layer, sizes), given


def _rounds(
    calls: Sequence[tuple[nn.Module, Tensor]],
    seconds: float,
    device: torch.device,
) -> list[list[float]]:
    repeats = _CUDA_REPEATS if device.type == "cuda" else 1
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    number = -1  # the first does not count
    order, draws = [*range(len(calls))], random.Random(0)
    with torch.no_grad():
        while number < _LEAST or (number < _MOST and time.perf_counter() < end):
            draws.shuffle(order)  # what ran before decides on caches and on the memory that is free
            for index in order:
                layer, given = calls[index]
                given.abs_()  # as a network has just made it
                start = now(device)
                for _ in range(repeats):
                    layer(given)
                times[index].append((now(device) - start) / repeats)
            number += 1
    return times


def undisturbed(times: Sequence[float]) -> float:
    """The lower quartile: what else runs on a machine only ever adds to a time, and often to half of the rounds."""
    return statistics.quantiles(times, n=4, method="inclusive")[0] if len(times) > 1 else times[0]


def _spread(rounds: Sequence[Sequence[float]]) -> float:
    """By how much the even and the odd rounds disagree, as a share of the times; over all layers, each by its time."""
    halves = [(undisturbed(times[::2]), undisturbed(times[1::2])) for times in rounds]
    return sum(abs(even - odd) for even, odd in halves) / sum(max(half) for half in halves)


def _sound(layers: Any) -> bool:
    """Whether it is seconds by keys."""
    return isinstance(layers, dict) and all(
        isinstance(seconds, float) and 0.0 < seconds < math.inf for seconds in layers.values()
    )
