"""Accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.data.images import ImageSource
from dnr_plugin.network.calling import kept_modes

# Wraps an iterable of a known length for display.
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: ImageSource,
    batch_size: int | None = None,
    progress: Progress | None = None,
    *,
    amp: bool = False,
) -> float:
    """Share of images classified right, in [0, 1], in eval mode; modes are restored.

    Args:
        model: on the images' device.
        images: with their labels.
        batch_size: by default 500 on a GPU, 125 on a CPU, whose caches hold no more.
        progress: wraps the batches for display.
        amp: in bfloat16, as ``train.amp`` trains.
    """
    right = torch.zeros((), dtype=torch.int64)
    size = batch_size or (500 if any(p.is_cuda for p in model.parameters()) else 125)
    batches: Iterable[tuple[Tensor, Tensor]] = images.batches(size)
    if progress is not None:
        batches = progress(batches, -(-len(images) // size))
    with kept_modes(model):
        model.eval()
        for batch, labels in batches:
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=amp):
                logits = model(batch)
            right = right.to(batch.device) + (logits.argmax(1) == labels).sum()
    return int(right) / len(images)
