"""Small networks with attention within windows, weights with which attention matters, and what zeroing parts gives."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2


def windowed(kind: str, depths: Sequence[int] = (1, 1), heads: Sequence[int] = (2, 2), width: int = 16) -> nn.Module:
    """A network of torchvision's: "swin", "swin_v2", or "maxvit", which has one size."""
    if kind == "maxvit":
        partitioned: nn.Module = MaxVit(
            input_size=(32, 32), stem_channels=8, partition_size=4, block_channels=[12], block_layers=[1],
            head_dim=6, stochastic_depth_prob=0.0, num_classes=5,
        )  # fmt: skip
        return partitioned
    second: dict[str, Any] = {}
    if kind == "swin_v2":
        second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    shifted: nn.Module = SwinTransformer(
        patch_size=[4, 4], embed_dim=width, depths=[*depths], num_heads=[*heads], window_size=[4, 4], num_classes=5,
        stochastic_depth_prob=0.0, **second,
    )  # fmt: skip
    return shifted


def spread(model: nn.Module) -> nn.Module:
    """Weights with which scores differ, and biases that matter; scales of cosine attention, one beyond the largest."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "logit_scale" in name:
            parameter.data.copy_(torch.linspace(1.0, 5.0, parameter.numel()).view_as(parameter))
        elif parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        elif "bias" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def zeroed(model: nn.Module, removals: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy with the outputs of layers at zero; of query in the key as well."""
    copied = copy.deepcopy(model)
    for name, channels in removals.items():
        for own in (name, name.replace(".query", ".key")):
            with torch.no_grad():
                for parameter in copied.get_submodule(own).parameters():
                    parameter[[*channels]] = 0.0
    return copied
