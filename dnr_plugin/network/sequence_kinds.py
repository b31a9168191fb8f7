"""Kinds of layers that read sequences: attention, whole or split, and recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.network.layer_kind import Consumer, Kind, channels_second, l2_norm, widened


class Attention(Consumer):
    """``nn.MultiheadAttention``: its query is what is read; key and value where these are as wide."""

    scaling = "square"

    @property
    def channels(self) -> tuple[int, int]:
        return int(self.module.embed_dim), int(self.module.embed_dim)

    @property
    def blocks(self) -> int:
        return int(self.module.num_heads)

    @property
    def maker(self) -> nn.Module:
        return self.module.out_proj  # type: ignore[no-any-return]

    def by_channel(self, a: Tensor) -> Tensor:
        return channels_second(a if self.module.batch_first or a.dim() != 3 else a.transpose(0, 1))

    @property
    def _query(self) -> Tensor:
        """What the query is multiplied with, shape [out, embed_dim]."""
        joint = self.module.in_proj_weight
        return torch.as_tensor(joint if joint is not None else self.module.q_proj_weight)

    def matrices(self, each: int) -> list[Tensor]:
        return [widened(self._query)]

    def assign(self, each: int, matrices: Sequence[Tensor]) -> None:
        self._query.copy_(matrices[0])

    def norms(self) -> Tensor:
        return l2_norm(self._query.detach(), 0)

    @property
    def no_constant(self) -> str | None:
        return "attention has no place for it"


class Recurrent(Consumer):
    """``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``: their first layer reads neurons; their own hidden units stay."""

    @property
    def channels(self) -> tuple[int, int]:
        width = int(getattr(self.module, "proj_size", 0) or self.module.hidden_size)
        return int(self.module.input_size), width * (2 if self.module.bidirectional else 1)

    @property
    def weights(self) -> list[Tensor]:
        """What the input is multiplied with, for each direction, shape [gates * hidden, in]."""
        names = ["weight_ih_l0", *(["weight_ih_l0_reverse"] if self.module.bidirectional else [])]
        return [getattr(self.module, name) for name in names]

    @property
    def reading(self) -> float:
        every = sum(p.numel() for p in self.module.parameters() if p.dim() > 1)
        return float(sum(weight.numel() for weight in self.weights) / every)

    def by_channel(self, a: Tensor) -> Tensor:
        return channels_second(a if self.module.batch_first or a.dim() != 3 else a.transpose(0, 1))

    def matrices(self, each: int) -> list[Tensor]:
        return [widened(torch.cat(self.weights))]

    def assign(self, each: int, matrices: Sequence[Tensor]) -> None:
        for weight, values in zip(self.weights, matrices[0].chunk(len(self.weights)), strict=True):
            weight.copy_(values)

    def norms(self) -> Tensor:
        return l2_norm(torch.cat(self.weights).detach(), 0)

    @property
    def no_constant(self) -> str | None:
        return "a recurrent layer has no place for it"

    def stand_in(self, input: Tensor, *states: object) -> tuple[Tensor, object]:
        """What has the shapes and the inputs of the layer's outputs, and no loop over time."""
        module, width = self.module, self.channels[1]
        if not isinstance(input, Tensor):
            raise TypeError("packed sequences cannot be traced")
        outputs = input.sum(-1, keepdim=True) * input.new_ones(width)
        directions = 2 if module.bidirectional else 1
        last = outputs.mean(1 if module.batch_first and input.dim() == 3 else 0)[..., : width // directions]
        state = last.expand(module.num_layers * directions, *last.shape)
        if not isinstance(module, nn.LSTM):
            return outputs, state
        cells = state.sum(-1, keepdim=True).expand(*state.shape[:-1], module.hidden_size)
        return outputs, (state, cells)


class Scores(Consumer):
    """`AttentionScores`: its inputs are what each channel of query and key adds to the scores, which sum them up."""

    @property
    def channels(self) -> tuple[int, int]:
        return int(self.module.channels), 0

    @property
    def blocks(self) -> int:
        return int(self.module.num_heads)

    def reads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        query, key = args
        return self.module.products(query, key)  # type: ignore[no-any-return]

    def by_channel(self, a: Tensor) -> Tensor:
        return channels_second(a)

    def matrices(self, each: int) -> list[Tensor]:
        return [torch.ones(1, self.module.width, dtype=torch.float64) for _ in range(self.blocks)]

    @property
    def share(self) -> float:
        return float(self.module.width)

    def norms(self) -> Tensor:
        return torch.ones(self.channels[0], dtype=torch.float64)

    @property
    def no_constant(self) -> str | None:
        return "the scores of attention have no place for it"


class Heads(Kind):
    """`AttentionHeads`: heads that can only go as a whole."""

    @property
    def channels(self) -> tuple[int, int]:
        return int(self.module.channels), int(self.module.channels)
