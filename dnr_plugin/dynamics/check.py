"""What a check of the neurons found and did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerCheck:
    """What a check found in one layer and did there.

    Attributes:
        layer: root layer of the dependency group.
        neurons: before this check's removal.
        dead: of these.
        died: dead now and not at the check before.
        reactivated: dead at the check before and not now.
        candidates: neurons that wait for their removal after this check.
        nominated: became candidates at this check.
        restored: were candidates until this check and stay.
        removed: physically, at this check.
        entropy: mean over the neurons of the entropy of their activation histograms, bits.
        drift: mean over the neurons of the divergence from the check before, bits; None at the first check.
    """

    layer: str
    neurons: int
    dead: int
    died: int
    reactivated: int
    candidates: int
    nominated: int
    restored: int
    removed: int
    entropy: float
    drift: float | None


@dataclass(frozen=True)
class Check:
    """One look at all neurons.

    Attributes:
        number: from 1.
        step: training steps done.
        layers: every layer that was judged.
        removed: root layer -> neurons that were removed, by their numbers before.
        exact: how many of these were zero where they are used, as zeroed candidates or by themselves.
        max_abs_diff: largest change of the outputs for ``example_inputs``, in eval mode, by removing the exact ones; 0
            where there were none.
        seconds: that the check took.
    """

    number: int
    step: int
    layers: Sequence[LayerCheck]
    removed: Mapping[str, Sequence[int]]
    exact: int
    max_abs_diff: float
    seconds: float
