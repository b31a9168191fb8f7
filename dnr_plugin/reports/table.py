"""One table for the terminal, Markdown and HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

_BOLD = re.compile(r"\*\*(.+?)\*\*")


@dataclass(frozen=True)
class Table:
    """A table of plain text; what is written ``**so**`` is bold.

    Attributes:
        title: above it, on a terminal.
        head: names of the columns.
        rows: of as many cells.
        words: leading columns that hold words, which stand left; numbers stand right.
        parted: rows from the top after which a line is drawn, on a terminal.
        narrow: whether names of columns may break at every dot and space.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    parted: int | None = None
    narrow: bool = False

    def markdown(self) -> list[str]:
        """Lines, without the title."""
        rule = ["---" if n < self.words else "---:" for n in range(len(self.head))]
        return [_line(self.head), f"|{'|'.join(rule)}|", *map(_line, self.rows)]

    def html(self) -> str:
        """An element, without the title."""

        def row(cells: Sequence[str], tag: str) -> str:
            shown = (_BOLD.sub(r"<b>\1</b>", html.escape(cell)) for cell in cells)
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

        return f"<table>{row(self.head, 'th')}{''.join(row(cells, 'td') for cells in self.rows)}</table>"

    def terminal(self) -> RenderableType:
        """For rich to print; nothing in it acts as markup."""
        from rich import table
        from rich.markup import escape

        shown = table.Table(title=escape(self.title), title_justify="left")
        for n, name in enumerate(self.head):
            broken = name.replace(".", ".\n").replace(" ", "\n") if self.narrow else name
            shown.add_column(escape(broken), justify="left" if n < self.words else "right")
        for n, row in enumerate(self.rows, 1):
            cells = (_BOLD.sub(r"[bold]\1[/bold]", escape(cell)) for cell in row)
            shown.add_row(*cells, end_section=n == self.parted)
        return shown


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
