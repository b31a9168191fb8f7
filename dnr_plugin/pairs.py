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

import torch
from torch import Tensor
from torch.func import jvp, vjp

from .affine import Affine
from .least_squares import HELD_OUT
from .moments import outer_products
from .patches import channels_second
from .places import CHUNK, Places
from .redundancy import factor

_ITERATIONS = 4  # of conjugate gradients
_STEPS = (0.25, 0.5, 1.0)  # shares of the step that are tried
_DAMPING = 1e-2  # of the preconditioner

Point = tuple[Tensor, Tensor]  # weights [out, in * taps] and constants [out] of the first layer


def fit_through(
    first: Affine,
    second: Affine,
    a: Tensor,
    rows: Tensor,
    goal: Tensor,
    other: Tensor | None,
    rectified: bool,
    places: Places,
) -> bool:
    """Fits the first of two layers in place.

    Args:
        first: not grouped; a ReLU follows, and nothing but ``second`` reads its result.
        second: stays as it is.
        a: the first layer's input, shape [N, ...].
        rows: what its weights are multiplied with at some places, shape [R, in * taps].
        goal: what should come out behind ``second``, with ``other`` added, at its places, shape [S, out].
        other: what is added, shape [S, out], or None.
        rectified: whether a ReLU follows there as well.
        places: of ``second``.

    Returns:
        Whether images that took no part are served better; if not, nothing has changed.
    """
    each = len(goal) // len(a)
    weights, constants = second.weights.to(rows), second.constants.to(rows)

    def chunk(start: int) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """What comes out for some images, by the weights and constants of the first layer, and what should."""
        images, here = a[start : start + CHUNK], slice(start * each, (start + CHUNK) * each)

        def outputs(w: Tensor, b: Tensor) -> Tensor:
            found = second.run(first.run(images, w, b).relu(), weights, constants)
            at = places.pick(channels_second(second.module, found), start).to(rows)
            at = at if other is None else at + other[here]
            return at.relu() if rectified else at

        return outputs, goal[here].relu() if rectified else goal[here]

    starts = range(0, len(a), CHUNK)
    count = max(1, round(len(starts) * (1.0 - HELD_OUT)))
    fitted, held = starts[:count], starts[count:] or starts
    now = first.weights.to(rows), first.constants.to(rows)

    def gradient() -> Iterator[Point]:
        for outputs, wanted in map(chunk, fitted):
            found, back = vjp(outputs, *now)  # type: ignore[misc]
            yield back(wanted - found)

    def curvature(way: Point) -> Iterator[Point]:
        for outputs, _ in map(chunk, fitted):
            _, change = jvp(outputs, now, way)  # type: ignore[misc]
            _, back = vjp(outputs, *now)  # type: ignore[misc]
            yield back(change)

    def lacking(step: Point, share: float) -> float:
        squares = 0.0
        for outputs, wanted in map(chunk, held):
            squares += float((outputs(*_along(now, share, step)) - wanted).square().sum())
        return squares

    step = _conjugate_gradients(_total(gradient()), lambda way: _total(curvature(way)), _preconditioner(rows, first))
    share = min((0.0, *_STEPS), key=lambda share: lacking(step, share))
    if share == 0.0:
        return False
    w, b = _along(now, share, step)
    first.assign(w.double(), b.double(), rows @ w.T + b)
    return True


def _total(parts: Iterator[Point]) -> Point:
    weights, constants = next(parts)
    for w, b in parts:
        weights, constants = weights + w, constants + b
    return weights, constants


def _dot(a: Point, b: Point) -> float:
    return sum(float((x * y).double().sum()) for x, y in zip(a, b, strict=True))


def _along(a: Point, share: float, b: Point) -> Point:
    return a[0] + share * b[0], a[1] + share * b[1]


def _preconditioner(rows: Tensor, first: Affine) -> Callable[[Point], Point]:
    """Solves with the second moments of [x, 1], for each output alone."""
    moments = outer_products(rows, rows) / len(rows)
    mean = moments[:-1, -1]
    root = factor(moments[:-1, :-1] - torch.outer(mean, mean), _DAMPING)

    def solve(way: Point) -> Point:
        w, b = (part.double() for part in way)
        if not first.movable:
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
    found = torch.zeros_like(right[0]), torch.zeros_like(right[1])
    left, way = right, preconditioned(right)
    size = _dot(left, way)
    for _ in range(iterations):
        if size <= 0.0:  # nothing is left, but rounding
            break
        bent = product(way)
        curved = _dot(way, bent)
        if curved <= 0.0:
            break
        found, left = _along(found, size / curved, way), _along(left, -size / curved, bent)
        next_way = preconditioned(left)
        new = _dot(left, next_way)
        way, size = _along(next_way, new / size, way), new
    return found
