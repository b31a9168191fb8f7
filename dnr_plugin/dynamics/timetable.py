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

    def number(self, step: int) -> int:
        """The last check up to a step: 0 before the first one."""
        return step // self.check_every

    def step_of(self, number: int) -> int:
        """The step of a check."""
        return number * self.check_every

    def from_step(self, step: int) -> int:
        """The first check at a step or after it."""
        return -(-step // self.check_every)

    def watches_from(self, number: int) -> int:
        """The step before which nothing is read for a check."""
        return self.step_of(number) - (self.check_every if self.watched is None else self.watched)

    def removes(self, number: int, before: int) -> bool:
        """Whether a check removes, given the check before it."""
        return not self.remove_at or any(before < self.from_step(step) <= number for step in self.remove_at)

    @property
    def first(self) -> int:
        """The first check that chooses candidates."""
        return max(1, self.from_step(self.warmup))

    @property
    def last(self) -> int:
        """The last check that removes."""
        return self.from_step(max(self.remove_at)) if self.remove_at else self.number(self.until)

    @property
    def in_range(self) -> bool:
        """Whether there are checks, and batches that are read for them."""
        return self.check_every >= 1 and (self.watched is None or 1 <= self.watched <= self.check_every)

    @property
    def in_time(self) -> bool:
        """Whether the last check that removes comes by ``until``."""
        return self.step_of(self.last) <= self.until
