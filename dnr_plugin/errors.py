"""The errors that a caller is meant to tell apart; everything else is a bug or a failure of the machine."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """What the user gave is wrong: one line per problem. The command line prints them and exits with 2.

    Args:
        problems: one line each, of the form ``where: what was expected, what was found``.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class TargetError(RuntimeError):
    """A removal target turned out to be out of reach; the message names the closest value. Exit code 3.

    Args:
        message: one line.
        closest: the value of the target's own measure that can be reached.
        plan: the `plan.Plan` that reaches it.
    """

    def __init__(self, message: str, closest: float, plan: Any = None) -> None:
        self.closest, self.plan = closest, plan
        super().__init__(message)


class RunError(RuntimeError):
    """A run failed underway, for a reason that one line can say. What it had finished can be resumed. Exit code 1."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """An error with its type on one line, as much as fits there."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or an empty string where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
