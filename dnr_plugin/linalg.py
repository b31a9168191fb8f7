"""Sums of outer products that lose nothing, also under autocast, and Cholesky factors of what may be singular."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dnr_plugin.errors import RunError

_BLOCK = 192  # columns of outer products that are summed together: of square blocks on the diagonal half is in vain


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Lets float32 be computed in float32, also where a caller computes under autocast."""
    available = torch.amp.is_autocast_available(device.type)
    if available and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def outer_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum over rows of the outer products of [a, 1] and [b, 1]: [R, A], [R, B] -> [A + 1, B + 1], float64."""
    total = a.new_zeros(a.shape[1] + 1, b.shape[1] + 1, dtype=torch.float64)
    if a is b:
        add_outer_products(total, a)
        mirror(total)
        return total
    with without_autocast(a.device):
        for left, right in _short(a, b):
            _add_sums(total, left, right)
            total[:-1, :-1] += left.T @ right
    return total


def add_outer_products(total: Tensor, a: Tensor) -> None:
    """Adds ``outer_products(a, a)`` to ``total``, but not below its diagonal, which `mirror` makes up for."""
    products = total[:-1, :-1]
    with without_autocast(a.device):
        for part, _ in _short(a, a):
            _add_sums(total, part, part)
            for start in range(0, a.shape[1], _BLOCK):
                products[start : start + _BLOCK, start:] += part[:, start : start + _BLOCK].T @ part[:, start:]


def mirror(total: Tensor) -> None:
    """Makes what `add_outer_products` has added up symmetric, in place."""
    products = total[:-1, :-1]
    for start in range(0, len(products), _BLOCK):
        stop = start + _BLOCK
        products[stop:, start:stop] = products[start:stop, stop:].T


def _short(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Sums over so few rows lose nothing in float32."""
    return zip(torch.split(a, 1024), torch.split(b, 1024), strict=True)


def _add_sums(total: Tensor, a: Tensor, b: Tensor) -> None:
    """What the constants appended to both give."""
    total[-1, :-1] += b.sum(0)
    total[:-1, -1] += a.sum(0)
    total[-1, -1] += len(a)


def submatrix(a: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Some rows and columns of the last two dimensions, int64; ``a[rows][:, columns]`` takes ten times as long."""
    return a.index_select(-2, rows).index_select(-1, columns)


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
