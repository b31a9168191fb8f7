"""When neurons are looked at while a network trains, and when they may be removed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timetable:
    """When neurons are looked at and removed, in training steps.

    Attributes:
        check_every: steps from one check to the next, >= 1.
        until: step at which removal ends: with the last check up to there, or the next one where that was put off.
        watched: steps read before each check, in [1, check_every]; None for all.
        warmup: step before which no neuron becomes a candidate.
        remove_at: steps from which the first check removes; by default every check does.
    """

    check_every: int
    until: int = 0
    watched: int | None = None
    warmup: int = 0
    remove_at: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """The first check that chooses candidates."""
        return max(1, -(-self.warmup // self.check_every))

    @property
    def last(self) -> int:
        """The last check that removes."""
        return -(-max(self.remove_at) // self.check_every) if self.remove_at else self.until // self.check_every
