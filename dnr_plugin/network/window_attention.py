"""Attention within windows of a map, with biases of scores by relative position, as in Swin (V2) and MaxViT.

Sources: Swin (arXiv 2103.14030); Swin V2 (arXiv 2111.09883), whose scores of head h are

.. math:: s_h \\cos(q_i, k_j) + B_{h, ij}, \\quad s_h = \\min(e^{\\tau_h}, 100),
    \\quad B_{h, ij} = 16 \\, \\sigma(w_h^\\top \\mathrm{ReLU}(A r_{ij} + a)),

with relative positions r, spaced by their logarithm; MaxViT (arXiv 2204.01697). All of them as torchvision has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_plugin.network.attention import AttentionCore, CosineScores, SplitAttention

_LARGEST = math.log(100.0)  # logarithm of the scale of cosine attention


class RelativeCore(AttentionCore):
    """Attention whose scores have biases by relative position: ``table`` of its heads, shape [positions, heads].

    Args:
        pairs: relative position of each pair, as a row of the table, L * L of them, int64.
    """

    def __init__(self, *args: Any, pairs: Tensor) -> None:
        super().__init__(*args)
        self.register_buffer("pairs", pairs.flatten(), persistent=False)

    def table(self) -> Tensor:
        """Biases by relative position, shape [positions, heads]."""
        return self.heads.get_parameter("table")

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, apart: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Of shapes [..., windows, L, C]; ``apart``, shape [windows, L, L], is added to the scores of each head."""
        windows = [a.flatten(0, -3) for a in (query, key, value)]
        length = query.shape[-2]
        mask = self.table()[self.get_buffer("pairs")].view(length, length, -1).permute(2, 0, 1)[None].to(query.dtype)
        if apart is not None:
            mask = (mask + apart[:, None]).repeat(len(windows[0]) // len(apart), 1, 1, 1)
        mixed, _ = super().forward(windows[0], windows[1], windows[2], mask)
        return mixed.view(*query.shape[:-1], -1), None


class WindowCore(RelativeCore):
    """Attention within windows of a map, which may be shifted, as in torchvision's first Swin transformers.

    Args:
        window, shift: sizes, in height and width.
    """

    def __init__(self, *args: Any, pairs: Tensor, window: Sequence[int], shift: Sequence[int]) -> None:
        super().__init__(*args, pairs=pairs)
        self.window, self.shift = list(window), list(shift)

    def places(self, query: Tensor, *args: Any) -> Sequence[int]:
        sizes: Sequence[int] = args[2]
        return sizes

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, wanted: Sequence[int]
    ) -> tuple[Tensor, None]:
        """Of maps [N, H, W, C] with whole windows, of which height and width ``wanted`` are wanted."""
        sizes = query.shape[1:3]
        by_side = zip(self.shift, self.window, sizes, strict=True)
        shift = [0 if window >= size else step for step, window, size in by_side]
        parts = [self._windows(a.roll((-shift[0], -shift[1]), (1, 2))) for a in (query, key, value)]
        apart = self._apart(sizes, shift, query) if any(shift) else None
        mixed, _ = super().forward(parts[0], parts[1], parts[2], apart)
        rows, columns = (size // window for size, window in zip(sizes, self.window, strict=True))
        whole = mixed.view(-1, rows, columns, *self.window, mixed.shape[2]).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return whole.roll((shift[0], shift[1]), (1, 2))[:, : wanted[0], : wanted[1]].contiguous(), None

    def _windows(self, a: Tensor) -> Tensor:
        """[N, H, W, C] -> [N * windows, L, C]."""
        rows, columns = (size // window for size, window in zip(a.shape[1:3], self.window, strict=True))
        by_row = a.reshape(len(a), rows, self.window[0], columns, self.window[1], -1)
        return by_row.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def _apart(self, sizes: Sequence[int], shift: Sequence[int], like: Tensor) -> Tensor:
        """-100 for pairs that only the shift has brought into one window, shape [windows, L, L]."""
        regions = like.new_zeros(1, *sizes, 1)
        for dim, (step, window, size) in enumerate(zip(shift, self.window, sizes, strict=True)):
            place = torch.arange(size, device=like.device)
            region = (place >= size - window).int() + (place >= size - step).int() if step else torch.zeros_like(place)
            regions += region.view(1, -1, 1, 1).to(like) * 3 if dim == 0 else region.view(1, 1, -1, 1).to(like)
        regions = self._windows(regions)[..., 0]
        return (regions[:, None] != regions[:, :, None]).to(like) * -100.0


class CosineWindowCore(WindowCore):
    """Cosine attention within windows, as in torchvision's second Swin transformers.

    Its heads have ``log_scale``, shape [heads, 1, 1], and ``positions``, shape [heads, hidden]: what each makes of the
    hidden layer of the network of positions. That layer is none of its own here: no image reaches it, so that there is
    nothing to observe.

    Args:
        hidden: the layer that reads relative positions.
        offsets: these, shape [..., 2].
    """

    scores_of = CosineScores
    whole = "the hidden layer of its network of relative positions, which no image reaches, stays whole"

    def __init__(self, *args: Any, hidden: nn.Linear, offsets: Tensor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden_weight, self.hidden_bias = hidden.weight, hidden.bias
        self.register_buffer("offsets", offsets, persistent=False)

    def table(self) -> Tensor:
        hidden = F.linear(self.get_buffer("offsets"), self.hidden_weight, self.hidden_bias).relu()
        return 16 * F.linear(hidden, self.heads.get_parameter("positions")).flatten(0, -2).sigmoid()

    def factors(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().factors(query, key, value)
        return q * self.heads.get_parameter("log_scale").clamp(max=_LARGEST).exp(), k, v


class SplitWindows(SplitAttention):
    """Called with a map [N, H, W, C], as torchvision's ``ShiftedWindowAttention`` and ``ShiftedWindowAttentionV2``."""

    core: WindowCore

    def __init__(self, *args: Any, out_dropout: float) -> None:
        super().__init__(*args)
        self.out_dropout = out_dropout

    def forward(self, x: Tensor) -> Tensor:
        (height, width), window = x.shape[1:3], self.core.window
        padded = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        mixed, _ = self.core(*self.projected(padded, padded, padded), (height, width))
        return F.dropout(self.out(mixed), self.out_dropout, self.training)


class SplitPartitions(SplitAttention):
    """Called with windows [N, windows, L, C], as torchvision's ``RelativePositionalMultiHeadAttention``."""

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.core(*self.projected(x, x, x))
        return self.out(mixed)  # type: ignore[no-any-return]
