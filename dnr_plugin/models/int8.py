"""ONNX files in 8-bit integers: weights scaled per output channel, activations by what calibration images give."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from dnr_plugin.errors import InputError, RunError, first_line
from dnr_plugin.network.onnx_runtime import silent

_WEIGHTED = ("Conv", "Gemm", "MatMul")  # which hold nearly all of a network's weights and work
_STEPS = ("QuantizeLinear", "DequantizeLinear")
# which move numbers or give fixed ones, and compute nothing
_MOVES = (
    "Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze",
)  # fmt: skip


def quantise(source: Path, target: Path, batches: Iterable[Tensor]) -> dict[str, int]:
    """Writes an ONNX file anew in 8-bit integers, by ONNX Runtime's static quantisation.

    Activations are asymmetric uint8, their ranges the lowest and highest values that the images give. Weights are
    symmetric and keep 7 bits: with 8, sums of two products overflow 16 bits on x86 processors without VNNI, and the
    same file gives other scores there; 8-bit signed activations do not, but took three times as long where there is
    VNNI.

    Args:
        source: a float file that `export` wrote.
        target: to write; what is needed meanwhile lies beside it.
        batches: calibration images, float32 [N, C, H, W] each.

    Returns:
        Operators that still compute in floats: how many of each type.

    Raises:
        RunError: ONNX Runtime cannot quantise the file, or no operator with weights in it.
    """
    prepared = target.with_name(f"{target.name}.prepared")
    try:
        with silent():
            quantization = importlib.import_module("onnxruntime.quantization")
            preparing = importlib.import_module("onnxruntime.quantization.shape_inference")
            # folds each BatchNorm into its convolution, whose weights are to be scaled as they are used
            preparing.quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared, target, _Reader(batches), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                reduce_range=True, activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8, calibrate_method=quantization.CalibrationMethod.MinMax,
            )  # fmt: skip
            whole, left = _operators(target)
    except (OSError, InputError):
        raise
    except Exception as error:  # whatever it makes of the user's network
        raise RunError(f"int8: ONNX Runtime cannot quantise this model: {first_line(error)}") from error
    if not any(whole[name] for name in _WEIGHTED):
        raise RunError(
            f"int8: expected a {', '.join(_WEIGHTED[:-1])} or {_WEIGHTED[-1]} that can be quantised, found none among "
            f"{counted(left)}; nothing was written"
        )
    return dict(left)


def counted(operators: dict[str, int]) -> str:
    """Operators in words, as "2 Conv, 1 Gemm"."""
    return ", ".join(f"{number} {name}" for name, number in sorted(operators.items())) or "no operators"


class _Reader:
    """Calibration images as ONNX Runtime asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        images = next(self._batches, None)
        return None if images is None else {"images": images.numpy()}


def _operators(file: Path) -> tuple[Counter[str], Counter[str]]:
    """Types of the operators that compute in 8 bits, and of those in floats, with their numbers.

    In 8 bits is what reads dequantised values, weights included, and whose result is quantised, where ONNX Runtime has
    an integer kernel for it. Sizes, indices and what only moves values are counted nowhere.
    """
    onnx = importlib.import_module("onnx")
    kernels = importlib.import_module("onnxruntime.quantization.registry").QLinearOpsRegistry
    graph = onnx.shape_inference.infer_shapes(onnx.load(file)).graph
    floats = {
        info.name for info in (*graph.value_info, *graph.output)
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }  # fmt: skip
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    whole: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in (*_STEPS, *_MOVES) or not floats & {*node.output}:
            continue
        reads = node.input[: 2 if node.op_type in _WEIGHTED else 1]
        quantised = dequantised >= {*reads} and readers.get(node.output[0]) == {"QuantizeLinear"}
        (whole if quantised and node.op_type in kernels else left)[node.op_type] += 1
    return whole, left
