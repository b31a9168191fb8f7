"""Numbers of a layer's neurons as others of them go.

A neuron has a number in the network as it is now, and one in the dense network, which never changes. Which channels of
a consumer carry it, and where it stands in a channel group, is for `dependencies.uses` and `groups.Layer` to say.
"""

from __future__ import annotations

from collections.abc import Iterable


def renumbered(neurons: Iterable[int], gone: Iterable[int]) -> list[int]:
    """Numbers that neurons have once others of their layer are gone.

    Args:
        neurons: numbers before, in any order.
        gone: numbers before of those that go.

    Returns:
        In the order of ``neurons``, without those that are gone themselves.
    """
    removed = sorted(gone)
    return [n - sum(g < n for g in removed) for n in neurons if n not in removed]


def original_numbers(neurons: Iterable[int], gone: Iterable[int]) -> list[int]:
    """Numbers that neurons had before others of their layer were gone: the reverse of `renumbered`.

    Args:
        neurons: numbers after, in any order.
        gone: numbers before of those that went.

    Returns:
        In the order of ``neurons``.
    """
    removed = sorted(gone)
    numbers = []
    for number in neurons:
        for other in removed:
            number += other <= number
        numbers.append(number)
    return numbers
