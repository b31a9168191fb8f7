"""Attention with a layer for each of its projections, so that heads, and query and key, can be taken apart.

Torch keeps query, key and value of an attention in one matrix that is as wide as its input, whatever it computes, and
other packages put them into one linear layer. `split_attention` puts `SplitAttention` in its place: the same outputs,
from four linear layers and two modules without weights, at which neurons are counted:

- `AttentionScores` reads query and key. Channel j of a head adds :math:`q_j k_j` to its scores, so that query and key
  lose channels together, and each head loses as many;
- `AttentionHeads` hands on what the heads make, so that the value loses whole heads, and query and key theirs.

Which channels of query and key belong together is a matter of basis: scores stay as they are when queries are
multiplied with any :math:`T` and keys with :math:`T^{-\\top}`. In the basis that is chosen here, that of balanced
truncation, channels of a head add to its scores independently of each other, the most important ones first:
with :math:`G = E[q q^\\top] = L L^\\top` and :math:`C` the covariance of the keys,
:math:`L^\\top C L = U S^2 U^\\top` and :math:`T = L^{-\\top} U S^{1/2}`. Keys count without their mean, which adds
the same to all scores of a query, and softmax does not see that.

Source: Moore, *Principal component analysis in linear systems*, IEEE TAC 1981, for the basis; that scores are what
query and key have to be judged by: CORP (arXiv 2602.05243).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FLAT = 1e-6  # share of the mean variance of a head's queries and keys
_DRAWS = 4  # keys that each query is paired with


class _Headed(nn.Module):
    """A module without weights, which knows how many channels there are, in heads of equal width.

    Args:
        channels: of all heads together.
        num_heads: that they belong to.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.channels, self.num_heads = channels, num_heads

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.channels // self.num_heads

    def extra_repr(self) -> str:
        return f"channels={self.channels}, num_heads={self.num_heads}"

    def by_head(self, a: Tensor) -> Tensor:
        """[N, L, channels] -> [N, heads, L, width]."""
        return a.reshape(*a.shape[:2], self.num_heads, -1).transpose(1, 2)

    def remaining(self, gone: Sequence[int]) -> list[int]:
        """Channels of each head that stay.

        Raises:
            ValueError: heads would not be equally wide.
        """
        stays = torch.ones(self.channels, dtype=torch.bool)
        stays[list(gone)] = False
        left: list[int] = stays.view(self.num_heads, -1).sum(1).tolist()
        if len({*left} - {0}) != 1:
            raise ValueError(f"expected channels that leave all heads equally wide, found widths {left}")
        return left

    def remove(self, gone: Sequence[int]) -> None:
        """Notes that channels went; heads of which none is left go.

        Raises:
            ValueError: heads would not be equally wide.
        """
        left = self.remaining(gone)
        self.channels, self.num_heads = sum(left), sum(map(bool, left))


class AttentionScores(_Headed):
    """Hands query and key on to where scores are made of them; here observing looks on."""

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key

    def products(self, query: Tensor, key: Tensor) -> Tensor:
        """What each channel adds to the scores of some pairs of positions, in units of a score before it is scaled.

        Args:
            query: shape [N, L, channels].
            key: shape [N, S, channels].

        Returns:
            Shape [N, L * 4, channels]: each query with four keys, drawn once for all samples.
        """
        generator = torch.Generator().manual_seed(0)
        repeated = torch.arange(query.shape[1]) % key.shape[1]
        drawn = [torch.randperm(key.shape[1], generator=generator)[repeated] for _ in range(_DRAWS)]
        centered = key - key.mean(1, keepdim=True)
        return torch.cat([query * centered[:, places.to(key.device)] for places in drawn], 1)

    @staticmethod
    def stand_in(query: Tensor, key: Tensor) -> Tensor:
        """What depends on each channel of the query times the same one of the key, and has no channels itself."""
        query, key = (a.flatten(1, -2).mean(1) for a in (query, key))
        return (query * key).sum(-1, keepdim=True)


class AttentionHeads(_Headed):
    """Hands on what the heads make of the values.

    Args:
        channels, num_heads: as above.
        table: biases of scores by relative position, shape [positions, heads], or None.
    """

    def __init__(self, channels: int, num_heads: int, table: nn.Parameter | None = None) -> None:
        super().__init__(channels, num_heads)
        self.table = table

    def forward(self, mixed: Tensor) -> Tensor:
        return mixed


class AttentionCore(nn.Module):
    """Attention itself, between projections.

    Args:
        channels: of query and key, and of the value.
        num_heads: heads.
        scale: of the scores.
        dropout: of the probabilities, in train mode.
        table: see `AttentionHeads`.
    """

    def __init__(
        self, channels: int, num_heads: int, scale: float, dropout: float, table: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.scores, self.heads = AttentionScores(channels, num_heads), AttentionHeads(channels, num_heads, table)
        self.scale, self.dropout = scale, dropout

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Args:
        query: shape [N, L, C].
        key: shape [N, S, C].
        value: shape [N, S, D].
        mask: added to the scores, or true where they count; broadcasts to [N, heads, L, S].
        causal: whether a position sees no later ones.
        weights: whether the probabilities are wanted.

        Returns:
            Shape [N, L, D], and probabilities, shape [N, heads, L, S], or None.
        """
        query, key = self.scores(query, key)
        q, k, v = self.scores.by_head(query), self.scores.by_head(key), self.heads.by_head(value)
        dropout = self.dropout if self.training else 0.0
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)  # which autocast chooses
        probabilities = None
        if weights:
            logits = q @ k.transpose(2, 3) * self.scale
            if mask is not None:
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            probabilities = F.dropout(logits.softmax(-1), dropout)
            mixed = probabilities @ v
        else:
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=self.scale
            )
        return self.heads(mixed.transpose(1, 2).flatten(2)), probabilities

    def places(self, query: Tensor, *args: Any) -> Sequence[int]:
        """Sizes of the output without samples and channels, for the arguments of `forward`."""
        return query.shape[1:-1]

    def stand_in(
        self, seen: Callable[[Tensor], None], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """What has the shapes of the outputs; the value alone goes into them, query and key into what is ``seen``."""
        seen(self.scores(query, key))
        places = self.places(query, key, value, *args)
        mean = value.flatten(1, -2).mean(1).view(len(value), *[1] * len(places), -1)
        return self.heads(mean * value.new_ones(*places, 1)), None


class SplitAttention(nn.Module):
    """Attention of which query, key, value and output are linear layers; by forms, each called as what it replaces.

    Args:
        query, key, value, out: projections.
        core: what lies between them.
    """

    def __init__(self, query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear, core: AttentionCore) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out, self.core = query, key, value, out, core

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(query), self.key(key), self.value(value)

    @torch.no_grad()
    def rotate(self, queries: Tensor, keys: Tensor) -> None:
        """Puts query and key into the basis of their balanced truncation; outputs stay what they are.

        Args:
            queries: second moments of the queries of each head, float64, shape [heads, width, width].
            keys: covariance of the keys of each head, likewise.
        """
        identity = torch.eye(queries.shape[1], dtype=queries.dtype, device=queries.device)

        def damped(matrix: Tensor) -> Tensor:
            mean = matrix.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
            return matrix + _FLAT * mean[:, None, None] * identity

        lower = torch.linalg.cholesky(damped(queries))
        squares, basis = torch.linalg.eigh(lower.mT @ damped(keys) @ lower)
        squares, basis = squares.flip(1).clamp_min(1e-30), basis.flip(2)  # the most important channel first
        root = squares.pow(0.25)[:, None, :]
        forward = torch.linalg.solve_triangular(lower.mT, basis * root, upper=True)
        backward = lower @ (basis / root)
        for linear, change in ((self.query, forward), (self.key, backward)):
            heads, width, _ = change.shape
            for parameter in linear.parameters(recurse=False):
                by_head = parameter.double().view(heads, width, -1)
                parameter.copy_((change.mT.to(by_head) @ by_head).view_as(parameter))


class SplitMultihead(SplitAttention):
    """Called as ``nn.MultiheadAttention``."""

    # what nn.TransformerEncoderLayer asks, to run what it has fused or not
    _qkv_same_embed_dim, in_proj_bias, in_proj_weight = False, None, None

    def __init__(self, *args: Any, batch_first: bool) -> None:
        super().__init__(*args)
        self.batch_first = batch_first

    @property
    def num_heads(self) -> int:
        return self.core.heads.num_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        one = query.dim() == 2
        swapped = not one and not self.batch_first
        inputs = [a.unsqueeze(0) if one else a.transpose(0, 1) if swapped else a for a in (query, key, value)]
        mask = self._mask(key_padding_mask, attn_mask, inputs[0])
        mixed, weights = self.core(*self.projected(*inputs), mask, weights=need_weights)
        outputs = self.out(mixed)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        outputs = outputs[0] if one else outputs.transpose(0, 1) if swapped else outputs
        return outputs, weights[0] if one and weights is not None else weights

    def _mask(self, padding: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Both masks of torch, which are true where nothing is seen, as one that is added to the scores."""

        def added(a: Tensor) -> Tensor:
            return torch.zeros_like(a, dtype=query.dtype).masked_fill(a, -torch.inf) if a.dtype == torch.bool else a

        total = None
        if mask is not None:
            total = added(mask)
            total = total.view(len(query), -1, *total.shape[1:]) if mask.dim() == 3 else total[None, None]
        if padding is not None:
            padding = added(padding if padding.dim() == 2 else padding[None])[:, None, None]
            total = padding if total is None else total + padding
        return total


class SplitTokens(SplitAttention):
    """Called with tokens, as most vision transformers do."""

    def __init__(self, *args: Any, out_dropout: float) -> None:
        super().__init__(*args)
        self.out_dropout = out_dropout

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        mixed, _ = self.core(*self.projected(x, x, x), attn_mask, causal=is_causal)
        return F.dropout(self.out(mixed), self.out_dropout, self.training)


class WindowAttentionCore(AttentionCore):
    """Attention within windows of a map, which may be shifted, as in torchvision's first Swin transformers.

    Args:
        pairs: relative position of each pair, as a row of the table, shape [L * L], int64.
        window, shift: sizes, in height and width.
    """

    def __init__(self, *args: Any, pairs: Tensor, window: Sequence[int], shift: Sequence[int]) -> None:
        super().__init__(*args)
        self.window, self.shift = list(window), list(shift)
        self.register_buffer("pairs", pairs, persistent=False)

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
        length, table = self.window[0] * self.window[1], self.heads.table
        assert table is not None
        mask = table[self.get_buffer("pairs")].view(length, length, -1).permute(2, 0, 1)[None].to(query.dtype)
        if any(shift):
            apart = self._apart(sizes, shift, query)
            mask = (mask + apart[:, None]).repeat(len(query), 1, 1, 1)
        mixed, _ = super().forward(parts[0], parts[1], parts[2], mask)
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


class SplitWindows(SplitAttention):
    """Called with a map [N, H, W, C], as torchvision's ``ShiftedWindowAttention``."""

    core: WindowAttentionCore

    def __init__(self, *args: Any, out_dropout: float) -> None:
        super().__init__(*args)
        self.out_dropout = out_dropout

    def forward(self, x: Tensor) -> Tensor:
        (height, width), window = x.shape[1:3], self.core.window
        padded = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        mixed, _ = self.core(*self.projected(padded, padded, padded), (height, width))
        return F.dropout(self.out(mixed), self.out_dropout, self.training)


def split_modules(model: nn.Module) -> dict[str, SplitAttention]:
    """The split attention of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitAttention)}


def completed(splits: Mapping[str, SplitAttention], removals: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Removals with the query and key of each head whose values go.

    Args:
        splits: `split_modules` of the model that the removals are from.
        removals: layer -> channels of its output.
    """
    complete = {name: list(channels) for name, channels in removals.items()}
    for name, attention in splits.items():
        gone = complete.get(f"{name}.value")
        if not gone:
            continue
        scores, heads = attention.core.scores, attention.core.heads
        stays = torch.ones(heads.channels, dtype=torch.bool)
        stays[gone] = False
        emptied = ~stays.view(heads.num_heads, -1).any(1)
        channels = emptied.repeat_interleave(scores.width).nonzero().flatten().tolist()
        if channels:
            key = f"{name}.key" if f"{name}.key" in complete else f"{name}.query"
            complete[key] = sorted({*complete.get(key, ()), *channels})
    return complete


def beside(heads: str, model: nn.Module) -> dict[str, int]:
    """The query and key of the attention whose `AttentionHeads` has this name -> their channels."""
    name = heads.removesuffix(".core.heads")
    attention = model.get_submodule(name)
    assert isinstance(attention, SplitAttention)
    return {f"{name}.query": attention.query.out_features, f"{name}.key": attention.key.out_features}


def attention_stand_ins(model: nn.Module, seen: Callable[[Tensor], None]) -> dict[nn.Module, Any]:
    """Forwards by which Torch-Pruning sees what query, key and values have to do with each other, by module.

    Args:
        model: with split attention or without.
        seen: takes what query and key come to, which has to be traced beside the outputs.
    """
    forwards: dict[nn.Module, Any] = {}
    for attention in split_modules(model).values():
        core = attention.core
        forwards[core.scores] = core.scores.stand_in
        forwards[core] = partial(core.stand_in, seen)
    return forwards
