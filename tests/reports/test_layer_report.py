"""What a report says of operators that are not in its FLOPs."""

from __future__ import annotations

from helpers.made_up import report_of

from dnr_plugin.reports.layer_report import count_footnotes, count_warnings
from dnr_plugin.reports.run_report import facts, markdown

OPERATORS = {"aten::add": 2, "aten::linalg_inv": 1, "mine::block": 3}


def test_products_are_a_warning_and_the_rest_a_footnote() -> None:
    (warning,) = count_warnings(OPERATORS)
    assert warning.startswith("Warning: the FLOPs are too low: they lack aten::linalg_inv (1x), mine::block (3x), ")
    assert count_footnotes(OPERATORS) == ["Not in the FLOPs, as they work element by element: aten::add (2x)."]


def test_nothing_is_said_where_all_is_counted() -> None:
    assert count_warnings({}) == count_footnotes({}) == count_warnings({"aten::add": 1}) == []
    assert count_footnotes({"mine::block": 1}) == []


def test_a_run_says_so_as_well() -> None:
    report = report_of({"name": "run"}, []) | {"unsupported_ops": OPERATORS}
    (warning,), (footnote,) = count_warnings(OPERATORS), count_footnotes(OPERATORS)
    lines = facts(report)
    assert lines.index(warning) < lines.index(footnote)
    assert "- Warning: the FLOPs are too low" in markdown(report)
    assert not [line for line in facts(report_of({"name": "run"}, [])) if "Warning" in line]
