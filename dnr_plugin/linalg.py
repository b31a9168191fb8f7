"""Sums of outer products that lose nothing, and Cholesky factors of what may be singular."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dnr_plugin.errors import RunError

_BLOCK = 512  # columns of outer products that are summed together


def outer_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum over rows of the outer products of [a, 1] and [b, 1]: [R, A], [R, B] -> [A + 1, B + 1], float64."""
    same = a is b
    total = a.new_zeros(a.shape[1] + 1, b.shape[1] + 1, dtype=torch.float64)
    products = total[:-1, :-1]
    # sums this short lose nothing in float32
    for left, right in zip(torch.split(a, 1024), torch.split(b, 1024), strict=True):
        total[-1, :-1] += right.sum(0)
        total[:-1, -1] += left.sum(0)
        total[-1, -1] += len(left)
        step = _BLOCK if same else max(1, a.shape[1])
        for start in range(0, left.shape[1], step):  # of symmetric ones the upper half is enough
            first = start if same else 0
            products[start : start + step, first:] += left[:, start : start + step].T @ right[:, first:]
    if same:
        for start in range(0, a.shape[1], _BLOCK):
            stop = start + _BLOCK
            products[stop:, start:stop] = products[start:stop, stop:].T
    return total


TINY = 1e-30


def damped_inverse(moments: Tensor, damping: float) -> Tensor:
    """Inverse of second moments, damped as in `factor`; see there."""
    return torch.cholesky_inverse(factor(moments, damping))


def factor(moments: Tensor, damping: float) -> Tensor:
    """Cholesky factor of second moments, damped.

    Args:
        moments: float64, shape [F, F]; positive semi-definite up to the rounding of float32 products.
        damping: share of their mean diagonal that is added to it; ten times as much, and so on, where rounding left
            more below zero.

    Raises:
        RunError: they are not finite.
    """
    size = float(moments.diagonal().abs().mean()) if len(moments) else 0.0
    lower: Tensor
    for _ in range(20 if math.isfinite(size) else 0):
        damped = moments.clone()
        damped.diagonal().add_(damping * size + TINY)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower
        damping *= 10.0
    raise RunError("second moments: expected finite ones, found others: activations are too large for float32")
