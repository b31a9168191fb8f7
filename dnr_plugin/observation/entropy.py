"""Entropy, drift and bins of activation histograms, as functions of counts."""

from __future__ import annotations

import torch
from torch import Tensor

# An octave of the histogram is one factor of two. The topmost bin starts at 2**TOP_OCTAVE; fixed edges are what lets
# histograms of different batches, ranks and epochs be added and compared.
TOP_OCTAVE = 5


def entropy_bits(histogram: Tensor) -> Tensor:
    """Shannon entropy of each row of a histogram, ``H = -sum_b p_b log2 p_b`` with ``p`` normalised to sum 1.

    Args:
        histogram: counts, shape [..., B], B bins.

    Returns:
        Bits, shape [...], in [0, log2 B]; 0 for an empty histogram. Source: Shannon 1948; equals
        ``scipy.stats.entropy(histogram, base=2, axis=-1)``.
    """
    counts = histogram.double()
    p = counts / counts.sum(-1, keepdim=True).clamp_min(1.0)
    return -torch.xlogy(p, p).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def drift_bits(now: Tensor, before: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence between the histograms of consecutive checks, ``sum_b p_b log2(p_b / q_b)``.

    Half a count is added to every bin (Jeffreys' prior), so that a bin that was empty before does not make the
    divergence infinite. Equals ``scipy.stats.entropy(now + 0.5, before + 0.5, base=2, axis=-1)``.

    Args:
        now: counts that give ``p``, shape [..., B], B bins.
        before: counts that give ``q``, same shape.

    Returns:
        Bits, shape [...], >= 0.
    """
    p, q = now.double() + 0.5, before.double() + 0.5
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return (p * (p / q).log2()).sum(-1).clamp_min(0.0)


def on_off_entropy_bits(rate: Tensor) -> Tensor:
    """Entropy of "fires or not", ``H(r) = -r log2 r - (1-r) log2(1-r)``, in [0, 1] bit.

    Args:
        rate: firing rates in [0, 1], any shape.
    """
    rate = rate.double()
    return entropy_bits(torch.stack([rate, 1.0 - rate], dim=-1))


def octaves(a: Tensor, threshold: float, bins: int) -> Tensor:
    """Histogram bin of each activation: 0 where it does not fire, then one bin per factor of two.

    Bins 1 .. ``bins - 1`` are bounded by ``2**k`` for ``k = TOP_OCTAVE - (bins - 3) .. TOP_OCTAVE``; the first and the
    last are open. With 2 bins this is "fires or not".

    Args:
        a: activations, any floating type and shape.
        threshold: theta.
        bins: B >= 2.

    Returns:
        Integers in [0, bins), int32, of the shape of ``a``.
    """
    # the exponent bits of a float32: 2**e <= |a| < 2**(e+1). Exact, and ten times cheaper than a search of edges
    a = a.float().contiguous()
    index = (a.view(torch.int32) >> 23).sub_(127 + TOP_OCTAVE + 1 - bins).clamp_(1, bins - 1)
    return index.mul_(a > threshold)  # a product, since masking by an unpredictable mask costs five times as much
