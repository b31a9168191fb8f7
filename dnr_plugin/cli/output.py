"""What the commands print, and the codes that they exit with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from dnr_plugin.reports.table import Table

DONE, FAILED, BAD_INPUT, TARGET_MISSED, TERMINATED = 0, 1, 2, 3, 143


def show(*parts: str | Table) -> None:
    """Prints text and tables; a reader of the pipe who has seen enough, such as head, is no error."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:  # rich would end the program, and with it the exit code
            raise BrokenPipeError

    try:
        # a file or pipe has no width, and the 80 columns that rich would take for it break wide tables
        console = Pipe(width=None if sys.stdout.isatty() else 250, emoji=False)
        for part in parts:
            if isinstance(part, Table):
                console.print(part.terminal())
            else:
                print(part)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def track(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    console = Console(stderr=True, emoji=False)
    return track(
        items, description=escape(what), total=total, console=console, transient=True, disable=not console.is_terminal
    )
