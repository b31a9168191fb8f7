r"""Two layers in a row with a ReLU between them, of which the first is fitted by what the second makes of it.

Fitted for itself, the first of two layers gives again what it gave in the dense network, as if the neurons that stayed
had to do what they did before. Here they may do something else, if that makes up for those removed: with weights and
constants :math:`w` of the first layer and :math:`f(w)` what comes out of the second,

.. math:: \arg\min_{\Delta} \; \sum_{n,p} \lVert y_{np} - f(w)_{np} - J_{np} \Delta \rVert^2

is one step of Gauss and Newton, with the Jacobian :math:`J` of the two layers alone. It is solved by conjugate
gradients, preconditioned with the covariance of the first layer's inputs and stopped early, which regularises as
damping does; other images choose how far to go.

Source: Nocedal and Wright, *Numerical Optimization*, 2nd edition 2006, sections 10.3 and 7.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp, vjp

from dnr_plugin.linalg import factor, outer_products
from dnr_plugin.repair.layer import Fit, LayerRepair
from dnr_plugin.repair.least_squares import HELD_OUT

_ITERATIONS = 4  # of conjugate gradients
_STEPS = (0.25, 0.5, 1.0)  # shares of the step that are tried
_DAMPING = 1e-2  # of the preconditioner
_AT_ONCE = 64  # images
Point = tuple[Tensor, Tensor]  # weights [out, in * taps] and constants [out] of the first layer


def fit_pair(first: Fit, second: Fit, row: LayerRepair) -> LayerRepair:
    """Fits the first of two layers, in place, by what the second makes of it, and the second once more.

    Args:
        first: not grouped; a ReLU follows, and nothing but ``second`` reads its result.
        second: fitted; its input is replaced by what then comes out of the first.
        row: what was done to the second.

    Returns:
        What was done to the second in all; ``row`` where images that took no part would not be better served by any
        change of the first, or where all images together are not, so that all stays as it is.
    """
    if row.error_after < second.same:
        return row
    layer, rows = first.layer, first.rows()
    change = _step(first, second, rows)
    if change is None:
        return row
    w, b = change
    restore, a = (layer.snapshot(), second.layer.snapshot()), second.a
    layer.assign(w.double(), b.double(), rows @ w.T + b)
    second.a = torch.cat([layer.kind.run(part, w, b).relu() for part in torch.split(first.a, _AT_ONCE)])
    again = second.solve()
    if again.error_after >= row.error_after:
        for part in restore:
            part()
        second.a = a
        return row
    damping = row.damping if again.damping is None else again.damping
    return replace(again, error_before=row.error_before, damping=damping)


def _step(first: Fit, second: Fit, rows: Tensor) -> Point | None:
    """Where the first layer should go; None where it should stay."""
    a, per_image, size = first.a, len(second.goal) // len(first.a), second.places.chunk

    def chunk(start: int) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """What comes out for some images, by the weights and constants of the first layer, and what should."""
        images, here = a[start : start + size], slice(start * per_image, (start + size) * per_image)

        def outputs(w: Tensor, b: Tensor) -> Tensor:
            layer = second.layer
            given = layer.kind.run(first.layer.kind.run(images, w, b).relu(), layer.weights, layer.constants)
            at = second.places.pick(layer.kind.by_channel(given), start).to(rows)
            at = at if second.other is None else at + second.other[here]
            return at.relu() if second.rectified else at

        return outputs, second.goal[here].relu() if second.rectified else second.goal[here]

    starts = range(0, len(a), size)
    count = max(1, round(len(starts) * (1.0 - HELD_OUT)))
    fitted, held = starts[:count], starts[count:] or starts
    now = first.layer.weights.to(rows), first.layer.constants.to(rows)

    def gradient() -> Iterator[Point]:
        for outputs, wanted in map(chunk, fitted):
            given, back = vjp(outputs, *now)  # type: ignore[misc]
            yield back(wanted - given)

    def curvature(way: Point) -> Iterator[Point]:
        for outputs, _ in map(chunk, fitted):
            _, change = jvp(outputs, now, way)  # type: ignore[misc]
            _, back = vjp(outputs, *now)  # type: ignore[misc]
            yield back(change)

    def lacking(share: float) -> float:
        there = _along(now, share, way)
        return sum(float((outputs(*there) - wanted).square().sum()) for outputs, wanted in map(chunk, held))

    solve = _preconditioner(rows, first.layer.movable)
    way = _conjugate_gradients(_total(gradient()), lambda way: _total(curvature(way)), solve)
    share = min((0.0, *_STEPS), key=lacking)
    return _along(now, share, way) if share else None


def _total(parts: Iterator[Point]) -> Point:
    weights, constants = next(parts)
    for w, b in parts:
        weights, constants = weights + w, constants + b
    return weights, constants


def _dot(a: Point, b: Point) -> float:
    return sum(float((x * y).double().sum()) for x, y in zip(a, b, strict=True))


def _along(a: Point, share: float, b: Point) -> Point:
    return a[0] + share * b[0], a[1] + share * b[1]


def _preconditioner(rows: Tensor, movable: bool) -> Callable[[Point], Point]:
    """Solves with the second moments of [x, 1], for each output alone."""
    moments = outer_products(rows, rows) / len(rows)
    mean = moments[:-1, -1]
    root = factor(moments[:-1, :-1] - torch.outer(mean, mean), _DAMPING)

    def solve(way: Point) -> Point:
        w, b = (part.double() for part in way)
        if not movable:
            return torch.cholesky_solve(w.T, root).T.to(rows), torch.zeros_like(way[1])
        w = torch.cholesky_solve((w - torch.outer(b, mean)).T, root).T
        return w.to(rows), (b - w @ mean).to(rows)

    return solve


def _conjugate_gradients(
    right: Point,
    product: Callable[[Point], Point],
    preconditioned: Callable[[Point], Point],
    iterations: int = _ITERATIONS,
) -> Point:
    """Some iterations towards the solution x of ``product(x) = right``."""
    solution = torch.zeros_like(right[0]), torch.zeros_like(right[1])
    residual, way = right, preconditioned(right)
    size = _dot(residual, way)
    for _ in range(iterations):
        if size <= 0.0:  # nothing remains, but rounding
            break
        bent = product(way)
        curved = _dot(way, bent)
        if curved <= 0.0:
            break
        solution, residual = _along(solution, size / curved, way), _along(residual, -size / curved, bent)
        next_way = preconditioned(residual)
        new = _dot(residual, next_way)
        way, size = _along(next_way, new / size, way), new
    return solution
