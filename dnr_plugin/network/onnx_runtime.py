"""Networks and single layers in ONNX Runtime on the CPU; its packages are imported when they are needed."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.files import read_json
from dnr_plugin.network.calling import tensors

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INSTALL = 'pip install "dnr_plugin[export]"'
_OPSET = 21  # the first one whose GroupNormalization has a scale for each channel


def missing_package() -> str | None:
    """The first of `PACKAGES` that cannot be imported."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            return name
    return None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what exporters and compilers log, print and warn about themselves: a failure is one line of ours."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        printed = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def session(model: str | bytes, profile: Path | None = None) -> Any:
    """An ``InferenceSession`` on the CPU, with as many threads as torch uses.

    Args:
        model: path of an ONNX file, or what is in one.
        profile: how paths of a profile begin; None: none is written.
    """
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    # else threads of a session that has just run slow down the next one, when several are timed in turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxNetwork(nn.Module):
    """A network in ONNX Runtime, exported with the sizes of one batch.

    Args:
        model: in eval mode, on the CPU.
        inputs: one batch: a tensor, a sequence or a dict of tensors.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        by_name = isinstance(inputs, dict)
        args = () if by_name else tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
        with silent():
            program = torch.onnx.export(model, args, kwargs=inputs if by_name else None, dynamo=True, verbose=False)
            assert program is not None  # what dynamo=True returns
            self._session = session(program.model_proto.SerializeToString())
        self._names = [given.name for given in self._session.get_inputs()]

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        given = kwargs if kwargs else dict(zip(self._names, tensors(args), strict=True))
        fed = {name: given[name].numpy() for name in self._names}
        return [torch.from_numpy(out) for out in self._session.run(None, fed)]


class OnnxLayer(nn.Module):
    """A layer in ONNX Runtime, whose calls are timed by its profiler; see `layer_graph`."""

    def __init__(self, layer: nn.Module, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self._calls, self._folder = 0, tempfile.TemporaryDirectory()
        self._session = session(layer_graph(layer, sizes), Path(self._folder.name) / "layer")

    def forward(self, x: Tensor) -> Tensor:
        self._calls += 1
        return torch.from_numpy(self._session.run(None, {"x": x.numpy()})[0])

    def seconds(self) -> list[float]:
        """Of each call so far, to a microsecond; after this the layer is timed no more.

        Without what converts inputs and outputs to blocks of channels and back, which a network does at its ends alone.
        """
        events = read_json(Path(self._session.end_profiling()))
        self._folder.cleanup()
        ran = [event for event in events if event["name"].endswith("_kernel_time")]
        operators = len(ran) // self._calls
        taken = [0 if event["args"]["op_name"].startswith("Reorder") else event["dur"] for event in ran]
        calls = (taken[operators * call : operators * (call + 1)] for call in range(self._calls))
        return [1e-6 * max(sum(call), 0.5) for call in calls]  # none takes no time


def layer_graph(layer: nn.Module, sizes: tuple[int, ...]) -> bytes:
    """An ONNX model of a single layer, made in a millisecond: `torch.onnx.export` takes hundreds.

    Args:
        layer: a convolution that pads with zeros, linear, GroupNorm, LayerNorm, or a norm of images in eval mode; or a
            sequence of such and ReLU. In float32.
        sizes: of its input ``x``.
    """
    onnx = importlib.import_module("onnx")
    nodes: list[Any] = []
    held: list[Any] = []
    at = "x"
    for number, part in enumerate(layer if isinstance(layer, nn.Sequential) else [layer]):
        parts = _nodes(part, len(sizes))
        for place, (kind, weights, options) in enumerate(parts):
            names = [f"w{number}.{place}.{index}" for index in range(len(weights))]
            held += [
                onnx.numpy_helper.from_array(weight.detach().contiguous().numpy(), name)
                for name, weight in zip(names, weights, strict=True)
            ]
            after = f"y{number}.{place}"
            nodes.append(onnx.helper.make_node(kind, [at, *names], [after], **options))
            at = after
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(nodes, "layer", [value("x", kind, sizes)], [value(at, kind, None)], held)
    opsets = [onnx.helper.make_opsetid("", _OPSET)]
    version: int = onnx.helper.find_min_ir_version_for(opsets)
    made: bytes = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=version).SerializeToString()
    return made


def _nodes(layer: nn.Module, dims: int) -> list[tuple[str, list[Tensor], dict[str, Any]]]:
    """Operators of a layer, one after the other, each with its weights and attributes."""
    held: Any = layer
    if isinstance(layer, nn.ReLU):
        return [("Relu", [], {})]
    bias: list[Tensor] = [] if held.bias is None else [held.bias]
    if isinstance(layer, nn.Linear):
        if dims == 2:
            return [("Gemm", [layer.weight, *bias], {"transB": 1})]
        added: list[tuple[str, list[Tensor], dict[str, Any]]] = [("Add", [each], {}) for each in bias]
        return [("MatMul", [layer.weight.T], {}), *added]
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        options: dict[str, Any] = {name: list(getattr(held, to)) for name, to in _CONVOLUTION.items()}
        if isinstance(layer.padding, str):
            options["auto_pad"] = {"same": "SAME_UPPER", "valid": "VALID"}[layer.padding]
        else:
            options["pads"] = [*layer.padding, *layer.padding]
        return [("Conv", [layer.weight, *bias], options | {"group": layer.groups})]
    if isinstance(layer, nn.LayerNorm):
        scale: Tensor = torch.ones(layer.normalized_shape) if held.weight is None else layer.weight
        return [("LayerNormalization", [scale, *bias], {"epsilon": layer.eps, "axis": -1})]
    channels = held.num_channels if isinstance(layer, nn.GroupNorm) else held.num_features
    affine = [held.weight, held.bias] if held.weight is not None else [torch.ones(channels), torch.zeros(channels)]
    if isinstance(layer, nn.GroupNorm):
        return [("GroupNormalization", affine, {"epsilon": layer.eps, "num_groups": layer.num_groups})]
    if held.running_mean is None:
        return [("InstanceNormalization", affine, {"epsilon": held.eps})]
    return [("BatchNormalization", [*affine, held.running_mean, held.running_var], {"epsilon": held.eps})]


_CONVOLUTION = {"kernel_shape": "kernel_size", "strides": "stride", "dilations": "dilation"}
