"""A table says the same on a terminal, in Markdown and in HTML, and nothing in it acts as markup."""

from __future__ import annotations

import io

from rich.console import Console

from dnr_plugin.reports.table import Table, bold, plain_markdown

TABLE = Table("runs [/a] :boom:", ["run", "a.b"], [["x|y [red]", bold("1")], ["<i>", "**2**"]], parted=1)


def test_markdown() -> None:
    assert TABLE.markdown() == ["| run | a.b |", "|---|---:|", r"| x\|y \[red\] | **1** |", r"| \<i\> | \*\*2\*\* |"]


def test_html() -> None:
    rows = "<tr><td>x|y [red]</td><td><b>1</b></td></tr><tr><td>&lt;i&gt;</td><td>**2**</td></tr>"
    assert TABLE.html() == f"<table><tr><th>run</th><th>a.b</th></tr>{rows}</table>"


def test_terminal() -> None:
    file = io.StringIO()
    Console(file=file, width=60, emoji=False).print(TABLE.terminal())
    text = file.getvalue()
    assert all(part in text for part in ("runs [/a] :boom:", "x|y [red]", "<i>", " 1 ", "**2**"))
    assert not {"\x02", "\x03", "\x1b"} & set(text)
    assert "a.\nb" not in text


def test_what_users_name_is_no_markdown() -> None:
    assert plain_markdown("run[a](b) `c` *d* _e_ f_g <h>\n# i | j") == (
        r"run\[a\](b) \`c\` \*d\* \_e\_ f_g \<h\> # i \| j"
    )


def test_control_characters_do_not_reach_the_terminal() -> None:
    file = io.StringIO()
    Console(file=file, width=60, emoji=False).print(Table("t", ["a"], [["x\x1b[31my\x07"]]).terminal())
    assert "x[31my" in file.getvalue()
