"""Activations and their statistics, as several tests make them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dnr_plugin.observation.activity import Activity
from dnr_plugin.observation.moments import Moments
from helpers.networks import images


def data(n: int = 24, c: int = 5, p: int = 7, seed: int = 0) -> Tensor:
    """Signed activations over many octaves, with exact zeros, one channel all zero and one never above zero."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, c, p, generator=generator) * 2.0 ** torch.randint(-14, 8, (n, c, p), generator=generator)
    a[torch.rand(n, c, p, generator=generator) < 0.3] = 0.0
    a[:, 1] = 0.0
    a[:, 2] = -a[:, 2].abs()
    return a


def observed(*batches: Tensor, share: float = 1.0, threshold: float = 0.0, bins: int = 16) -> Activity:
    activity = Activity(batches[0].shape[1], share=share, threshold=threshold, bins=bins)
    for batch in batches:
        activity.update(batch)
    return activity


def numpy_octave(value: float, threshold: float, bins: int) -> int:
    """The bin by a search of edges: 2**(5 - (bins - 3)) ... 2**5 separate bins 1 .. bins - 1."""
    if value <= threshold:
        return 0
    edges = [2.0**k for k in range(5 - (bins - 3), 6)]
    return 1 + int(np.searchsorted(edges, value, side="right"))


def read(*seeds: int) -> Moments:
    """Of one batch for each seed."""
    moments = Moments(3, 9)
    for seed in seeds:
        moments.update(nn.Conv2d(3, 4, 3), images(4, seed=seed))
    return moments
