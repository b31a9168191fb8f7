"""FLOPs of what multiplies matrices, against sums by hand and against PyTorch's own counter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from dnr_plugin.network import cost
from dnr_plugin.network.cost import flop_report
from dnr_plugin.network.flop_handles import FLOP_HANDLES, multiplies_matrices

warnings.filterwarnings("ignore", category=FutureWarning)


class Function(nn.Module):
    """A function of tensors."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleDict(modules)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **self.parts)


def _packed(x: Tensor, rnn: nn.Module) -> Tensor:
    packed, _ = rnn(pack_padded_sequence(x, torch.tensor([x.shape[1]]), batch_first=True))
    return packed.data  # type: ignore[no-any-return]


def _deformed(x: Tensor, offset: nn.Module, conv: nn.Module) -> Tensor:
    return conv(x, offset(x))  # type: ignore[no-any-return]


T, C, H, P = 7, 4, 5, 3  # steps, inputs, hidden units, projected ones
LSTM = T * 4 * H * (C + H)
LSTM_2_BIDIRECTIONAL = T * 2 * ((4 * H * C + 4 * H * H) + (4 * H * 2 * H + 4 * H * H))
LSTM_PROJECTED = T * (4 * H * C + 4 * H * P + P * H)
SEQUENCE = (1, T, C)


def product(function: Callable[..., Any]) -> Function:
    return Function(function)


BY_HAND: dict[str, tuple[nn.Module, list[tuple[int, ...]], int]] = {
    "lstm": (nn.LSTM(C, H, batch_first=True), [SEQUENCE], LSTM),
    "lstm without biases": (nn.LSTM(C, H, bias=False, batch_first=True), [SEQUENCE], LSTM),
    "lstm of two layers, both directions": (
        nn.LSTM(C, H, 2, bidirectional=True, batch_first=True), [SEQUENCE], LSTM_2_BIDIRECTIONAL,
    ),
    "lstm, projected": (nn.LSTM(C, H, proj_size=P, batch_first=True), [SEQUENCE], LSTM_PROJECTED),
    "lstm, steps first": (Function(lambda x, rnn: rnn(x.movedim(0, 1)), rnn=nn.LSTM(C, H)), [SEQUENCE], LSTM),
    "lstm, packed": (Function(_packed, rnn=nn.LSTM(C, H, batch_first=True)), [SEQUENCE], LSTM),
    "lstm, unbatched": (Function(lambda x, rnn: rnn(x[0]), rnn=nn.LSTM(C, H)), [SEQUENCE], LSTM),
    "gru": (nn.GRU(C, H, batch_first=True), [SEQUENCE], T * 3 * H * (C + H)),
    "gru, packed": (Function(_packed, rnn=nn.GRU(C, H, batch_first=True)), [SEQUENCE], T * 3 * H * (C + H)),
    "rnn, tanh": (nn.RNN(C, H, batch_first=True), [SEQUENCE], T * H * (C + H)),
    "rnn, relu": (nn.RNN(C, H, nonlinearity="relu", batch_first=True), [SEQUENCE], T * H * (C + H)),
    "rnn, packed": (Function(_packed, rnn=nn.RNN(C, H, batch_first=True)), [SEQUENCE], T * H * (C + H)),
    "lstm cell": (Function(lambda x, cell: cell(x)[0], cell=nn.LSTMCell(C, H)), [(1, C)], 4 * H * (C + H)),
    "gru cell": (nn.GRUCell(C, H), [(1, C)], 3 * H * (C + H)),
    "rnn cell": (nn.RNNCell(C, H), [(1, C)], H * (C + H)),
    "bilinear": (nn.Bilinear(3, 4, 5), [(1, 3), (1, 4)], 5 * (3 * 4 + 4)),
    "bilinear at places": (nn.Bilinear(3, 4, 5), [(1, 6, 3), (1, 6, 4)], 6 * 5 * (3 * 4 + 4)),
    "deformable convolution, two groups": (
        Function(
            _deformed, offset=nn.Conv2d(4, 18, 3, padding=1),
            conv=torchvision.ops.DeformConv2d(4, 6, 3, padding=1, groups=2),
        ),
        [(1, 4, 8, 7)], 8 * 7 * 9 * (18 * 4 + 6 * 2),
    ),
    "deformable convolution, stride 2": (
        Function(_deformed, offset=nn.Conv2d(4, 18, 3, 2), conv=torchvision.ops.DeformConv2d(4, 6, 3, 2)),
        [(1, 4, 9, 9)], 4 * 4 * 9 * (18 * 4 + 6 * 4),
    ),
    "convolution, padding by name": (nn.Conv2d(4, 6, 3, padding="same", groups=2), [(1, 4, 8, 7)], 8 * 7 * 9 * 6 * 2),
    "convolution, even kernel": (nn.Conv1d(4, 6, 4, padding="same"), [(1, 4, 8)], 8 * 4 * 6 * 4),
    "convolution, valid": (nn.Conv1d(4, 6, 3, padding="valid"), [(1, 4, 8)], 6 * 3 * 6 * 4),
    "transposed convolution": (
        nn.ConvTranspose2d(4, 6, 3, 2, groups=2, output_padding=1), [(1, 4, 5, 5)], 5 * 5 * 9 * 4 * 3,
    ),
    "convolution over time": (
        product(lambda x: torch.conv_tbc(x.movedim(0, 1), torch.ones(3, C, 6), torch.ones(6))),
        [SEQUENCE], 5 * 3 * C * 6,
    ),
    "attention": (
        product(F.scaled_dot_product_attention), [(1, 2, 6, 8), (1, 2, 9, 8), (1, 2, 9, 3)], 2 * 6 * 9 * (8 + 3),
    ),
    "attention, shared keys": (
        product(lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)),
        [(1, 4, 6, 8), (1, 2, 6, 8)], 4 * 6 * 6 * 16,
    ),
    "attention, one head for all": (
        product(lambda q, k: F.scaled_dot_product_attention(q[0], k, k)), [(1, 6, 8), (1, 5, 6, 8)], 5 * 6 * 6 * 16,
    ),
    "matrix and vector": (product(lambda x: x @ x[0, 0]), [(1, 3, 4)], 3 * 4),
    "vector and matrices": (product(lambda x, y: x[0] @ y), [(1, 3), (1, 5, 3, 4)], 5 * 3 * 4),
    "vectors": (product(lambda x: torch.dot(x[0], x[0]) + x[0] @ x[0] + torch.vdot(x[0], x[0])), [(1, 4)], 3 * 4),
    "broadcast matrices": (product(lambda x, y: x[0] @ y), [(1, 2, 3), (1, 5, 3, 4)], 5 * 2 * 3 * 4),
    "mv and addmv": (product(lambda x: torch.addmv(x[0, 0], x[0], torch.mv(x[0], x[0, 0]))), [(1, 4, 4)], 2 * 16),
    "baddbmm": (product(lambda x, y: torch.baddbmm(x.new_ones(1), x, y)), [(1, 2, 3), (1, 3, 4)], 2 * 3 * 4),
    "addbmm": (
        product(lambda x, y: torch.addbmm(x.new_ones(1), x[0], y[0])), [(1, 5, 2, 3), (1, 5, 3, 4)], 5 * 2 * 3 * 4,
    ),
    "addmm": (product(lambda x, y: torch.addmm(x.new_ones(1), x[0], y[0])), [(1, 2, 3), (1, 3, 4)], 2 * 3 * 4),
    "inner": (product(lambda x, y: torch.inner(x, y)), [(1, 2, 3), (1, 4, 3)], 2 * 4 * 3),
    "outer": (product(lambda x, y: torch.outer(x[0], y[0])), [(1, 2), (1, 3)], 2 * 3),
    "tensordot": (
        product(lambda x, y: torch.tensordot(x[0], y[0], dims=2)), [(1, 2, 3, 4), (1, 3, 4, 5)], 2 * 3 * 4 * 5,
    ),
    "cdist": (product(lambda x, y: torch.cdist(x, y)), [(1, 2, 3), (1, 4, 3)], 2 * 4 * 3),
    "linear, one output by a vector": (product(lambda x: F.linear(x, torch.ones(4))), [(1, 3, 4)], 3 * 4),
    "einsum of matrices": (product(lambda x, y: torch.einsum("bij,bjk->bik", x, y)), [(1, 2, 3), (1, 3, 4)], 2 * 3 * 4),
    "einsum, implicit": (product(lambda x, y: torch.einsum("ij , jk", x[0], y[0])), [(1, 2, 3), (1, 3, 4)], 2 * 3 * 4),
    "einsum, ellipsis": (
        product(lambda x, y: torch.einsum("...ij,...jk->...ik", x, y)), [(1, 5, 2, 3), (1, 1, 3, 4)], 5 * 2 * 3 * 4,
    ),
    "einsum, outer": (product(lambda x, y: torch.einsum("bi,bj->bij", x, y)), [(1, 2), (1, 3)], 2 * 3),
    "einsum, a sum": (product(lambda x: torch.einsum("bij->bj", x)), [(1, 2, 3)], 0),
    "einsum, a label summed before": (product(lambda x, y: torch.einsum("bij,bk->bk", x, y)), [(1, 2, 3), (1, 4)], 4),
    "affine grid": (product(lambda x: F.affine_grid(x, [1, 1, 4, 5])), [(1, 2, 3)], 4 * 5 * 2 * 3),
    "norm of six dimensions": (nn.LayerNorm(8), [(1, 2, 2, 2, 2, 8)], 5 * 128),
    "norm of six dimensions, no weights": (nn.LayerNorm(8, elementwise_affine=False), [(1, 2, 2, 2, 2, 8)], 4 * 128),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    model, shapes, expected = BY_HAND[name]
    report = flop_report(model, [torch.rand(shape) for shape in shapes])
    assert report.flops == expected
    assert report.uncounted_products == {}


def test_a_path_of_einsum_is_followed() -> None:
    """opt_einsum's, where it is there; from left to right by default."""
    shapes = [(1, 8, 2), (1, 2, 8), (1, 8, 3)]
    x, y, z = (torch.rand(shape) for shape in shapes)
    trilinear = "bij,bjk,bkl->bil"
    by_default = flop_report(product(lambda *a: torch._C._VariableFunctions.einsum(trilinear, a)), [x, y, z])
    assert by_default.flops == 8 * 2 * 8 + 8 * 8 * 3
    path = [1, 2, 0, 1]
    by_path = flop_report(product(lambda *a: torch._C._VariableFunctions.einsum(trilinear, a, path=path)), [x, y, z])
    assert by_path.flops == 2 * 8 * 3 + 8 * 2 * 3


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_keeps_off_its_fast_path(frozen: bool) -> None:
    """Without gradients, of frozen weights as well, `nn.MultiheadAttention` is one operator that nobody counts."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(not frozen)
    with torch.no_grad():
        report = flop_report(nn.TransformerEncoder(layer, 2), torch.rand(1, 7, 8))
    each = 7 * 8 * 3 * 8 + 2 * 7 * 7 * 8 + 7 * 8 * 8 + 2 * 7 * 8 * 16 + 2 * 5 * 7 * 8  # the last: norms
    assert report.flops == 2 * each
    assert torch.backends.mha.get_fastpath_enabled()


# ---------------------------------------------------------------- PyTorch's own counter


class CRNN(nn.Module):
    """Reads a line of text: convolutions, then a recurrent layer over the columns."""

    def __init__(self, rnn: type[nn.RNNBase] = nn.LSTM, **kwargs: Any) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 16)),
        )  # fmt: skip
        self.rnn = rnn(12, 10, batch_first=True, bidirectional=True, **kwargs)
        self.out = nn.Linear(2 * int(kwargs.get("proj_size", 0) or 10), 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.features(x).squeeze(2).transpose(1, 2))[0])  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 4, 2, 1, groups=2), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x).relu()
        return self.out(torch.cat([x, self.up(self.deep(x).relu())], 1))  # type: ignore[no-any-return]


class LinearAttention(nn.Module):
    """Attention by einsum, its products in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).unbind(2)
        context = torch.einsum("bnhd,bnhe->bhde", k.softmax(1), v)
        return self.out(torch.einsum("bnhd,bhde->bnhe", q.softmax(-1), context).flatten(2))  # type: ignore[no-any-return]


class Seq2Seq(nn.Module):
    """nn.Transformer, with a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(16, 4, 2, 2, 32, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.net(source, target)  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """Multiplies across places by one matrix that is broadcast, and by baddbmm."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.channels = nn.Parameter(torch.randn(9, 9)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.places @ self.channels(x)
        return torch.baddbmm(x.new_ones(9, 9), x, x.transpose(1, 2))


class Recurrent(nn.Module):
    """Cells, one step after the other, on what a recurrent layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.cell = nn.RNN(6, 8, 2, nonlinearity="relu", batch_first=True), nn.GRUCell(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 5)
        for step in self.rnn(x)[0].unbind(1):
            state = self.cell(step, state)
        return state


def _zoo(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **kwargs)  # type: ignore[no-any-return]


def _audio() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 8, 5, padding="same"), nn.ReLU(), nn.Conv1d(8, 8, 4, padding="same", groups=4), nn.ReLU(),
        nn.Conv1d(8, 6, 3, stride=2), nn.Flatten(), nn.Linear(90, 3),
    )  # fmt: skip


def _video() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.ConvTranspose3d(6, 4, 2, 2), nn.Conv3d(4, 2, 1)
    )


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)


def _swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5)


def _segmentation() -> nn.Module:
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    return nn.Sequential(model, Function(lambda out: out["out"]))


SQUARE = [(1, 3, 32, 32)]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "resnet18": (_zoo("resnet18"), SQUARE),
    "mobilenet_v2": (_zoo("mobilenet_v2"), SQUARE),
    "efficientnet_b0": (_zoo("efficientnet_b0"), SQUARE),
    "densenet121": (_zoo("densenet121"), SQUARE),
    "shufflenet_v2_x0_5": (_zoo("shufflenet_v2_x0_5"), SQUARE),
    "squeezenet1_1": (_zoo("squeezenet1_1"), SQUARE),
    "mnasnet0_5": (_zoo("mnasnet0_5"), SQUARE),
    "regnet_y_400mf": (_zoo("regnet_y_400mf"), SQUARE),
    "convnext_tiny": (_zoo("convnext_tiny"), SQUARE),
    "vision transformer": (_vit, SQUARE),
    "swin transformer": (_swin, SQUARE),
    "lraspp, segmentation": (_segmentation, SQUARE),
    "u-net": (UNet, [(1, 3, 16, 16)]),
    "video, 3d": (_video, [(1, 2, 4, 6, 6)]),
    "audio, padding by name": (_audio, [(1, 2, 32)]),
    "crnn, lstm": (lambda: CRNN(num_layers=2), [(1, 1, 16, 64)]),
    "crnn, projected lstm": (lambda: CRNN(proj_size=4), [(1, 1, 16, 64)]),
    "crnn, gru": (lambda: CRNN(nn.GRU), [(1, 1, 16, 64)]),
    "rnn and cells": (Recurrent, [(1, 9, 6)]),
    "transformer with decoder": (Seq2Seq, [(1, 9, 16), (1, 5, 16)]),
    "linear attention": (LinearAttention, [(1, 9, 16)]),
    "mixer": (Mixer, [(1, 9, 6)]),
}

# fvcore's estimates for what works element by element, which PyTorch's counter leaves out
ELEMENTWISE = (
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "upsample_nearest2d", "upsample_bilinear2d",
    "adaptive_avg_pool2d", "grid_sampler",
)  # fmt: skip


def both_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """Products of matrices, as counted here, and half of what PyTorch's counter says."""
    make, shapes = NETWORKS[name]
    torch.manual_seed(0)
    model, inputs = make().eval(), [torch.rand(shape) for shape in shapes]
    none = {f"aten::{operator}": lambda inputs, outputs: 0 for operator in ELEMENTWISE}
    monkeypatch.setattr(cost, "FLOP_HANDLES", {**FLOP_HANDLES, **none})
    report = flop_report(model, inputs)
    assert report.uncounted_products == {}
    # kernels of which PyTorch's counter knows nothing are kept out
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):  # fmt: skip
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return report.flops, counter.get_total_flops() / 2


@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_the_counter_of_pytorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = both_counts(name, monkeypatch)
    assert ours == theirs > 0


# ---------------------------------------------------------------- what is not counted


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: torch.linalg.inv(x), "aten::linalg_inv"),
        (lambda x: torch.linalg.svd(x)[1], "aten::linalg_svd"),
        (lambda x: torch.linalg.solve(x, x), "aten::linalg_solve"),
        (lambda x: torch.linalg.multi_dot([x[0], x[0], x[0]]), "aten::linalg_multi_dot"),
        (lambda x: torch.matrix_power(x, 3), "aten::linalg_matrix_power"),
        (lambda x: torch.fft.rfft2(x).abs(), "aten::fft_rfft2"),
        (lambda x: torch.sparse.mm(x[0].to_sparse(), x[0]), "aten::_sparse_mm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_products_that_are_not_counted_are_told_from_the_rest(function: Callable[..., Any], operator: str) -> None:
    report = flop_report(product(lambda x: function(x).cos()), torch.rand(1, 4, 4) + torch.eye(4))
    assert report.uncounted_products == {operator: 1}
    assert report.unsupported_ops["aten::cos"] == 1


def _squared(x: Tensor) -> Tensor:
    return x @ x


def _sometimes(x: Tensor) -> Tensor:
    if bool(x.sum() > 0):
        x = _squared(x)
    return x


def _swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x


def test_an_autograd_function_may_multiply_matrices() -> None:
    """Nobody can look into it."""
    report = flop_report(product(Squared.apply), torch.rand(1, 4, 4))
    assert report.uncounted_products == {"prim::PythonOp.Squared": 1}


def test_a_scripted_function_is_looked_into() -> None:
    """Under its conditions too, and into what it calls."""
    report = flop_report(product(torch.jit.script(_sometimes)), torch.rand(1, 4, 4))
    assert report.flops == 0
    assert report.uncounted_products == {"aten::matmul": 1}
    assert report.unsupported_ops["aten::sum"] == 1
    report = flop_report(product(torch.jit.script(_swish)), torch.rand(1, 4, 4))
    assert report.unsupported_ops == {"aten::mul": 1, "aten::sigmoid": 1}
    assert report.uncounted_products == {}


def test_detectors_of_torchvision_lack_no_product() -> None:
    """A scripted function sorts out their boxes."""
    model = product(lambda x: torchvision.ops.batched_nms(x[0], x[0, :, 0], x[0, :, 0].long(), 0.5))
    report = flop_report(model, torch.rand(1, 5, 4))
    assert report.unsupported_ops
    assert report.uncounted_products == {}


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        *[(f"aten::{name}", False) for name in (
            "add", "mul_", "gelu", "softmax", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
            "lgamma", "linalg_norm", "linalg_vector_norm", "linalg_cross", "fft_fftshift", "fft_rfftfreq",
            "resolve_conj", "max_pool2d", "im2col", "embedding_bag", "sum", "cosine_similarity", "rms_norm",
            "mvlgamma", "rsqrt",
        )],
        *[(f"aten::{name}", True) for name in (
            "_scaled_mm", "_grouped_mm", "_weight_int4pack_mm_for_cpu", "mkldnn_linear", "slow_conv_dilated2d",
            "cudnn_convolution", "_thnn_fused_lstm_cell", "_cudnn_rnn", "_scaled_dot_product_flash_attention_for_cpu",
            "_transformer_encoder_layer_fwd", "linalg_eigh", "det", "inverse", "stft", "fft_fft", "addmm_",
        )],
        ("torchvision::nms", False), ("torchvision::roi_align", False),
        ("mine::fused_block", True), ("prim::PythonOp.Swish", True),
    ],
)  # fmt: skip
def test_operators_are_told_by_name(operator: str, expected: bool) -> None:
    assert multiplies_matrices(operator) == expected


# ---------------------------------------------------------------- compiled and frozen parts


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_part_is_counted_as_it_was_written(in_place: bool) -> None:
    part: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    if in_place:
        part.compile(backend="eager")
    else:
        part = torch.compile(part, backend="eager")
    model = nn.Sequential(part, nn.Conv2d(4, 5, 1))
    forward = vars(part).get("forward")
    report = flop_report(model, torch.rand(1, 3, 8, 8))
    assert report.flops == 36 * (4 * 27 + 5 * 4)
    assert sum(layer.flops for layer in report.layers) == report.flops
    assert vars(part).get("forward") is forward
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 5, 6, 6)
