"""The grid of a benchmark of criteria: seeds, criteria, scopes and levels, and how they are read from text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

from dnr_plugin.benchmarks.criteria.contenders import CRITERIA
from dnr_plugin.benchmarks.options import share
from dnr_plugin.errors import InputError, did_you_mean
from dnr_plugin.pruning.order import COUNTED_SCOPES

SEEDS, LEVELS = "0,1,2", "0.75,0.5,0.35,0.25,0.15"
DEFAULT_SCOPES = ("local", "global", "isomorphic")
_T = TypeVar("_T", int, float, str)


class Key(NamedTuple):
    """What tells a cell from the others; ``level`` is the share of FLOPs kept, in (0, 1)."""

    seed: int
    criterion: str
    scope: str
    level: float


@dataclass(frozen=True)
class Grid:
    """The cells of a benchmark: every combination, seeds outermost."""

    seeds: Sequence[int]
    criteria: Sequence[str]
    scopes: Sequence[str]
    levels: Sequence[float]

    @property
    def cells(self) -> list[Key]:
        return [Key(*key) for key in itertools.product(self.seeds, self.criteria, self.scopes, self.levels)]


def grid_of(
    seeds: str | None = None, levels: str | None = None, scopes: str | None = None, criteria: str | None = None
) -> Grid:
    """Reads lists with commas between their items; by default `SEEDS`, `LEVELS`, `DEFAULT_SCOPES`, every criterion.

    Raises:
        InputError: all items that are unknown, out of range or given twice.
    """
    problems: list[str] = []

    def listed(flag: str, text: str, read: Callable[[str], _T]) -> list[_T]:
        values: list[_T] = []
        for item in (part.strip() for part in text.split(",")):
            try:
                value = read(item)
            except ValueError as error:
                problems.append(f"{flag}: expected {error}, found {item!r}{_near(str(error), item)}")
                continue
            if value in values:
                problems.append(f"{flag}: expected each once, found {item} again")
            values.append(value)
        return values

    def seed(item: str) -> int:
        if not item.isdecimal() or int(item) >= 2**32:
            raise ValueError("whole numbers of at least 0")
        return int(item)

    def one_of(known: Iterable[str]) -> Callable[[str], str]:
        def read(item: str) -> str:
            if item not in known:
                raise ValueError(f"any of {', '.join(known)}")
            return item

        return read

    grid = Grid(
        listed("--seeds", SEEDS if seeds is None else seeds, seed),
        listed("--criteria", ",".join(CRITERIA) if criteria is None else criteria, one_of(CRITERIA)),
        listed("--scopes", ",".join(DEFAULT_SCOPES) if scopes is None else scopes, one_of(COUNTED_SCOPES)),
        listed("--levels", LEVELS if levels is None else levels, partial(share, whole="the FLOPs")),
    )
    if problems:
        raise InputError(*problems)
    return grid


def _near(expected: str, item: str) -> str:
    names = expected.removeprefix("any of ")
    return did_you_mean(item, names.split(", ")) if names != expected else ""
