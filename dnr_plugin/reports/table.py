"""One table for the terminal, Markdown and HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

_BOLD = re.compile("\x02(.+?)\x03")
_CONTROL = re.compile("[\x00\x01\x04-\x08\x0b-\x1f\x7f]")  # would move the cursor, or colour what follows
_MARKDOWN = re.compile(r"[\\`*~\[\]<>|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def bold(text: str) -> str:
    """Text that a `Table` shows bold; nothing that a user can name does so by itself."""
    return f"\x02{text}\x03"


def plain_markdown(text: str) -> str:
    """Text that reads in Markdown as it is, on one line, whatever a user called a run, a folder or a layer."""
    return " ".join(_MARKDOWN.sub(r"\\\g<0>", text).split())


def markdown_items(texts: Iterable[str]) -> list[str]:
    """A list of sentences, as lines."""
    return [f"- {plain_markdown(text)}" for text in texts]


@dataclass(frozen=True)
class Table:
    """A table of plain text; what is `bold` is shown so.

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
            cells = (_BOLD.sub(r"[bold]\1[/bold]", escape(_CONTROL.sub("", cell))) for cell in row)
            shown.add_row(*cells, end_section=n == self.parted)
        return shown


def _line(cells: Sequence[str]) -> str:
    shown = (_BOLD.sub(r"**\1**", plain_markdown(cell)) for cell in cells)
    return f"| {' | '.join(shown)} |"
