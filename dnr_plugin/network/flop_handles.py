"""Which operators multiply matrices, and what those cost that fvcore leaves at zero, miscounts or fails at.

A handle takes an operator's inputs and outputs as the JIT traced them and gives its FLOPs, in fvcore's convention: one
multiply-add is one FLOP, biases cost none. A product costs the elements of its result times the length of the sum
behind each of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

Handle = Callable[[Sequence[Any], Sequence[Any]], int]


def _shape(value: Any) -> list[int]:
    """Shape of a tensor in a trace."""
    assert value.isCompleteTensor(), f"expected a tensor of known shape, found {value.type()}"
    sizes: list[int] = value.type().sizes()
    return sizes


def _elements(value: Any) -> int:
    return math.prod(_shape(value))


def _listed(value: Any) -> list[Any]:
    """The members of a list in a trace."""
    return list(value.node().inputs())


def _summed_last(position: int) -> Handle:
    """Products that sum over the last dimension of one of their inputs: [..., N, K] x [..., K, M] costs ...·N·M·K."""

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return _elements(outputs[0]) * (_shape(inputs[position]) or [1])[-1]

    return handle


def _outer(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """[N] x [M]: N·M, as the product of [N, 1] and [1, M]."""
    return _elements(outputs[0])


def _addbmm(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """[B, N, K] x [B, K, M], summed over B: B·N·K·M."""
    return _elements(inputs[1]) * _shape(inputs[2])[-1]


def _tensordot(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """[N..., K...] x [K..., M...] costs N·M·K, where N·K · K·M are the elements of the inputs and N·M of the output."""
    return math.isqrt(_elements(inputs[0]) * _elements(inputs[1]) * _elements(outputs[0]))


def _convolved(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Convolutions, deformable ones as well: each output costs C/groups·K, by a weight [O, C/groups, K...].

    The interpolation by which a deformable one reads its inputs is no product and costs none.
    """
    return _elements(outputs[0]) * math.prod(_shape(inputs[1])[1:])


def _conv_tbc(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """As `_convolved`, by a weight [K, C, O]."""
    return _elements(outputs[0]) * math.prod(_shape(inputs[1])[:2])


def _recurrent(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """RNN, GRU and LSTM: each step of each sequence passes every matrix of every layer and direction once.

    Inputs are the sequences, [T, B, C] or [B, T, C], or packed: [steps of all sequences, C]. The last list among the
    inputs holds the weights: [gates·H, C] and [gates·H, H] of each layer and direction, [P, H] where it projects, and
    biases.
    """
    lists = [value for value in inputs if value.node().kind() == "prim::ListConstruct"]
    weights = [_shape(value) for value in _listed(lists[-1])]
    steps = math.prod(_shape(inputs[0])[:-1])
    return steps * sum(math.prod(shape) for shape in weights if len(shape) > 1)


def _bilinear(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """[..., I] x [O, I, J] x [..., J]: for each output I·J for the first product and J for the second."""
    _, rows, columns = _shape(inputs[2])
    return _elements(outputs[0]) * (rows + 1) * columns


def _attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Scores and what they weigh: [..., L, E] x [..., E, S] and [..., L, S] x [..., S, V] cost ...·L·S·(E + V)."""
    query, key, value = (_shape(values) for values in inputs[:3])
    return math.prod(_shape(outputs[0])[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """The product of each pair of operands, in the order in which torch takes them.

    A pair costs the product of the sizes of its labels, but for those of one operand alone that nothing behind asks
    for: these are summed before.
    """
    terms, arrow, result = inputs[0].toIValue().replace(" ", "").partition("->")
    sizes: dict[str | int, int] = {}
    operands: list[set[str | int]] = []
    for term, value in zip(terms.split(","), _listed(inputs[1]), strict=True):
        before, dots, after = term.partition("...")
        shape = _shape(value)
        spared = len(shape) - len(before) - len(after) if dots else 0
        labels = [*before, *range(-spared, 0), *after]  # dimensions of an ellipsis are numbered from the right
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
        operands.append(set(labels))
    if not arrow:  # then the labels that come once are those of the result
        result = "".join(label for label in terms if terms.count(label) == 1)
    wanted = {label for label in sizes if isinstance(label, int) or label in result}
    # positions of pairs, whose products go to the end of the list; by default from left to right
    listed = len(inputs) > 2 and inputs[2].node().kind() == "prim::ListConstruct"
    path = [int(value.toIValue()) for value in _listed(inputs[2])] if listed else []
    flops = 0
    while len(operands) > 1:
        left, right = (path.pop(0), path.pop(0)) if listed else (0, 1)
        a, b = operands[left], operands[right]
        rest = [labels for n, labels in enumerate(operands) if n not in (left, right)]
        product = (a | b) & wanted.union(*rest)
        flops += math.prod(sizes[label] for label in product | (a & b))
        operands = [*rest, product] if listed else [product, *rest]
    return flops


def _layer_norm(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """fvcore's five FLOPs an element, four without weights, for any number of dimensions."""
    return _elements(inputs[0]) * (5 if inputs[2].isCompleteTensor() else 4)


# Operators that have no handle in fvcore, or one that fails (products with vectors, norms of six dimensions) or
# miscounts (operands that are broadcast, linear layers with one output, einsum without a sum).
FLOP_HANDLES: dict[str, Handle] = {
    **dict.fromkeys(
        ("matmul", "linalg_matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "linear", "cdist"), _summed_last(0)
    ),
    **dict.fromkeys(
        ("addmm", "addmm_", "addmv", "addmv_", "baddbmm", "baddbmm_", "_addmm_activation"), _summed_last(1)
    ),
    "affine_grid_generator": _summed_last(0),
    **dict.fromkeys(("outer", "ger", "addr", "addr_", "kron"), _outer),
    **dict.fromkeys(("addbmm", "addbmm_"), _addbmm),
    "tensordot": _tensordot,
    "einsum": _einsum,
    "bilinear": _bilinear,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "scaled_dot_product_attention": _attention,
    "_convolution_mode": _convolved,  # padding="same"
    "conv_tbc": _conv_tbc,
    "layer_norm": _layer_norm,
}
FLOP_HANDLES = {f"aten::{name}": handle for name, handle in FLOP_HANDLES.items()}
FLOP_HANDLES["torchvision::deform_conv2d"] = _convolved


def noting_scripted(noted: Counter[str]) -> Handle:
    """A handle for calls of scripted functions, whose shapes are not known: counts nothing, notes the operators inside.

    Args:
        noted: takes each operator as often as it is written there; the call itself where the function is not found.
    """

    def walk(nodes: Iterable[Any]) -> None:
        for node in nodes:
            if not node.kind().startswith("prim::"):
                noted[node.kind()] += 1
            for block in node.blocks():
                walk(block.nodes())

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        name = inputs[0].type().annotation_str
        function: Any
        try:
            function = torch.jit._state._python_cu.find_function(name)  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):
            function = None
        if function is None:
            noted["prim::CallFunction"] += 1
        else:
            walk(function.inlined_graph.nodes())
        return 0

    return handle


# PyTorch's operators that multiply matrices or cost as much, by their names: products, convolutions, recurrent layers,
# attention, decompositions, Fourier transforms. What of these has no handle here or in fvcore is not counted.
_PRODUCTS = re.compile(
    "|".join(
        (
            r"mm(_|$)", "matmul", r"dot$", r"(^|_)(add)?mv_?$", "einsum", "^(bi|_tri)linear$", r"(^|_)linear(_|$)",
            r"matrix_(power|exp)", "linear_combination", "(c|p|euclidean_)dist", "^cov$", "corrcoef",
            r"conv(\d|_|olution)",
            r"lstm|gru|(^|_)rnn",
            "attention|transformer_encoder",
            r"linalg_(?!norm|vector_norm|cross|diagonal|_powsum)", "^(log|slog)?det$", "^p?inverse$", "cholesky",
            r"^(qr|svd|geqrf|orgqr|ormqr)$", "(?<!re)solve(_|$)", "^_?lu_",
            r"fft_(?!.*(shift|freq))", "stft",
        )
    )
)  # fmt: skip
# Of other packages, what is known to multiply none.
_NO_PRODUCTS = frozenset(
    f"torchvision::{name}"
    for name in ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "box_iou_rotated")
)


def multiplies_matrices(operator: str) -> bool:
    """Whether an operator that was not counted multiplies matrices, so that counts without it are too small.

    PyTorch's own are told by their names, and work element by element where these do not say otherwise. Others, as
    custom operators and autograd functions, may multiply matrices, as nobody knows.

    Args:
        operator: with its namespace, as "aten::linalg_inv".
    """
    namespace, _, name = operator.partition("::")
    if namespace == "aten":
        return _PRODUCTS.search(name) is not None
    return operator not in _NO_PRODUCTS
