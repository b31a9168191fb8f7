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

In cosine attention scores are products of :math:`\\hat q = q / |q|` and :math:`\\hat k = k / |k|`, of each head. Only
what turns query and key alike leaves these as they are: there the basis is that of the eigenvectors of
:math:`E[\\hat q \\hat q^\\top] + E[\\hat k \\hat k^\\top]`, the largest first. Keys count with their mean, which is
part of their lengths.

Source: Moore, *Principal component analysis in linear systems*, IEEE TAC 1981, for the basis; that scores are what
query and key have to be judged by: CORP (arXiv 2602.05243); cosine attention: Swin V2 (arXiv 2111.09883).
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
    """Hands query and key on to where scores are made of them; here observing looks on.

    Attributes:
        centered: whether the basis leaves out the mean of the keys.
    """

    centered: bool = True

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What scores are the products of, in the shapes of query and key."""
        return query, key

    def basis(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The basis of balanced truncation.

        Args:
            queries: second moments of what each head's scores have of the query, float64, shape [heads, width, width].
            keys: of what they have of the key, likewise.

        Returns:
            What queries and keys of each head are to be multiplied with from the right, in the shapes of the arguments.
        """
        identity = torch.eye(queries.shape[1], dtype=queries.dtype, device=queries.device)

        def damped(matrix: Tensor) -> Tensor:
            mean = matrix.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
            return matrix + _FLAT * mean[:, None, None] * identity

        lower = torch.linalg.cholesky(damped(queries))
        squares, basis = torch.linalg.eigh(lower.mT @ damped(keys) @ lower)
        squares, basis = squares.flip(1).clamp_min(1e-30), basis.flip(2)  # the most important channel first
        root = squares.pow(0.25)[:, None, :]
        return torch.linalg.solve_triangular(lower.mT, basis * root, upper=True), lower @ (basis / root)

    def products(self, query: Tensor, key: Tensor) -> Tensor:
        """What each channel adds to the scores of some pairs of positions, in units of a score before it is scaled.

        Args:
            query: shape [N, L, channels].
            key: shape [N, S, channels].

        Returns:
            Shape [N, L * 4, channels]: each query with four keys, drawn once for all samples.
        """
        query, key = self.forward(query, key)  # unseen by hooks
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


class CosineScores(AttentionScores):
    """Of cosine attention: hands on query and key of each head at length 1."""

    centered = False

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        by_head = (a.reshape(*a.shape[:-1], self.num_heads, -1) for a in (query, key))
        query, key = (F.normalize(a, dim=-1).flatten(-2) for a in by_head)
        return query, key

    def basis(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """An orthogonal one, the same for both, which keeps lengths."""
        shared = torch.linalg.eigh(queries + keys)[1].flip(2)
        return shared, shared


class AttentionHeads(_Headed):
    """Hands on what the heads make of the values, and holds what scores have for each head.

    Args:
        channels, num_heads: as above.
        held: names of parameters that go with their heads -> the parameter, and its dimension that numbers heads.
    """

    def __init__(self, channels: int, num_heads: int, held: Mapping[str, tuple[nn.Parameter, int]]) -> None:
        super().__init__(channels, num_heads)
        self.held_dims = {name: dim for name, (_, dim) in held.items()}
        for name, (parameter, _) in held.items():
            self.register_parameter(name, parameter)

    def forward(self, mixed: Tensor) -> Tensor:
        return mixed


class AttentionCore(nn.Module):
    """Attention itself, between projections.

    Args:
        channels: of query and key, and of the value.
        num_heads: heads.
        scale: of the scores.
        dropout: of the probabilities, in train mode.
        held: see `AttentionHeads`.

    Attributes:
        whole: what of it has neurons that stay, in words, or None.
    """

    scores_of: type[AttentionScores] = AttentionScores
    whole: str | None = None

    def __init__(
        self, channels: int, num_heads: int, scale: float, dropout: float,
        held: Mapping[str, tuple[nn.Parameter, int]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scores = self.scores_of(channels, num_heads)
        self.heads = AttentionHeads(channels, num_heads, held or {})
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
        q, k, v = self.factors(query, key, value)
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

    def factors(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What goes into the products of each head, shape [N, heads, L or S, width]."""
        query, key = self.scores(query, key)
        return self.scores.by_head(query), self.scores.by_head(key), self.heads.by_head(value)

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
        """Puts query and key into the basis in which channels go; outputs stay what they are.

        Args:
            queries, keys: see `AttentionScores.basis`.
        """
        changes = self.core.scores.basis(queries, keys)
        for linear, change in zip((self.query, self.key), changes, strict=True):
            heads, width, _ = change.shape
            for parameter in linear.parameters(recurse=False):
                by_head = parameter.double().view(heads, width, -1)
                parameter.copy_((change.mT.to(by_head) @ by_head).view_as(parameter))
        torch.clear_autocast_cache()


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
