"""Runtimes that a network is timed in: as it is written, compiled, or in ONNX Runtime. One class each, in `RUNTIMES`.

A new one is a class here with an entry in `RUNTIMES`, and a word of ``prune.runtime`` and ``report.runtimes``.
"""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import sys
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from dnr_plugin.errors import InputError, RunError, did_you_mean, first_line
from dnr_plugin.network.calling import (
    call,
    call_as_it_is,
    copied,
    eval_outputs,
    mapped,
    output_difference,
    tensors,
)
from dnr_plugin.network.onnx_runtime import INSTALL, OnnxLayer, OnnxNetwork, missing_package, silent

_OTHER = 0.01  # of the largest output: what computes so differently is another network


class Runtime(ABC):
    """How networks are run when they are timed.

    Attributes:
        name: of it.
        layers: the runtime whose times of single layers predict this one.
    """

    name: ClassVar[str]
    layers: ClassVar[str]

    @property
    def version(self) -> str:
        """What times of layers hold for: names them in a table."""
        return self.name

    def problem(self) -> str | None:
        """What it needs and this machine lacks, in words; None where it can be used."""
        return None

    def device(self, device: torch.device) -> torch.device:
        """Where it computes what torch keeps on a device."""
        return device

    def inputs(self, inputs: Any) -> Any:
        """One batch where it computes."""
        return mapped(lambda given: given.to(self.device(given.device)), inputs)

    @abstractmethod
    def prepared(self, model: nn.Module, inputs: Any) -> nn.Module:
        """A module that runs a network in eval mode, to be timed.

        Args:
            model: stays as it is.
            inputs: of `inputs`; the module is called with these sizes alone.

        Raises:
            RunError: the network cannot be run so.
        """

    @abstractmethod
    def layer(self, layer: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
        """A module that runs a single layer, to be timed.

        Args:
            layer: in eval mode.
            sizes: of its input.
        """

    def seconds(self, layer: nn.Module, measured: list[float]) -> list[float]:
        """Of each call of what `layer` returned, given what they took from outside."""
        return measured


class Eager(Runtime):
    """As it is written, operator by operator."""

    name = layers = "eager"

    def prepared(self, model: nn.Module, inputs: Any) -> nn.Module:
        return model

    def layer(self, layer: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
        return layer


class Compiled(Runtime):
    """By `torch.compile` with its defaults (inductor), for fixed sizes.

    Compiling takes seconds for a layer and 20 s to minutes for a network, so whole networks alone are compiled: their
    layers are predicted as eager ones, and measuring corrects that.
    """

    name = "compiled"
    layers = "eager"

    def problem(self) -> str | None:
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if shutil.which(compiler) is None:
            return f"no C++ compiler: torch.compile looks for {compiler}, or what CXX names"
        return None

    def prepared(self, model: nn.Module, inputs: Any) -> nn.Module:
        try:
            return _CompiledNetwork(copied(model).eval(), inputs)
        except RunError:
            raise
        except Exception as error:  # whatever a compiler makes of the user's network
            cause: Exception = error
            while isinstance(inner := getattr(cause, "inner_exception", None), Exception):
                cause = inner  # torch's own first line does not say what failed
            raise RunError(f"torch.compile cannot compile this model: {first_line(cause)}") from error

    def layer(self, layer: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
        raise NotImplementedError("layers are not compiled alone: see `Compiled.layers`")


class _CompiledNetwork(nn.Module):
    def __init__(self, network: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.network, self.graphs = network, 0
        inductor: Any = importlib.import_module("torch._dynamo").lookup_backend("inductor")

        def counted(graph: Any, given: Any) -> Any:
            done = inductor(graph, given)
            self.graphs += 1
            return done

        def run(*args: Any, **kwargs: Any) -> Any:
            return network(*args, **kwargs)

        # Torch keeps what it compiled by code object, of each of which it soon compiles no more: this one is new, and
        # what runs behind breaks of the graph is kept apart where torch can do so.
        run.__code__ = run.__code__.replace()
        can = "isolate_recompiles" in inspect.signature(torch.compile).parameters
        apart: dict[str, Any] = {"isolate_recompiles": True} if can else {}
        self._run = torch.compile(run, backend=counted, dynamic=False, **apart)
        with silent(), torch.no_grad():
            call_as_it_is(self, inputs)
        if not self.graphs:
            raise RunError("torch.compile compiled nothing of this model, which would run as it is written")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU, wherever the network is, with as many threads as torch uses."""

    name = layers = "onnxruntime"

    @property
    def version(self) -> str:
        return f"{self.name} {importlib.import_module('onnxruntime').__version__}"

    def problem(self) -> str | None:
        missing = missing_package()
        return None if missing is None else f"no {missing}: {INSTALL}"

    def device(self, device: torch.device) -> torch.device:
        return torch.device("cpu")

    def prepared(self, model: nn.Module, inputs: Any) -> nn.Module:
        network = copied(model).cpu().eval()
        try:
            exported = OnnxNetwork(network, inputs)
            outputs = [*tensors(call(exported, inputs))]
        except Exception as error:  # whatever an exporter makes of the user's network
            raise RunError(f"ONNX cannot express this model: {first_line(error)}") from error
        _, difference = output_difference(eval_outputs(network, inputs), outputs)
        if not difference <= _OTHER:  # NaN too
            raise RunError(f"in ONNX Runtime this model computes something else: outputs differ by {difference:.0%}")
        return exported

    def layer(self, layer: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
        return OnnxLayer(layer, sizes)

    def seconds(self, layer: nn.Module, measured: list[float]) -> list[float]:
        assert isinstance(layer, OnnxLayer)
        return layer.seconds()


RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (Eager(), Compiled(), OnnxRuntime())}


def runtime_of(name: str) -> Runtime:
    """A runtime by name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in RUNTIMES:
        raise ValueError(
            f"runtime: expected one of {', '.join(RUNTIMES)}, found {name!r}{did_you_mean(name, RUNTIMES)}"
        )
    return RUNTIMES[name]


def check_runtime(name: str, field: str = "runtime") -> None:
    """Refuses a runtime that this machine lacks something for.

    Args:
        name: one of `RUNTIMES`.
        field: that names it, for the error.

    Raises:
        InputError: in one line, with what to install.
    """
    problem = runtime_of(name).problem()
    if problem is not None:
        raise InputError(f"{field}: expected a runtime that can be used here, found {name} and {problem}")
