"""Columns stand under each other, whatever their cells hold."""

from __future__ import annotations

from vbp.runtime.tables import markdown_table, text_table

ROWS = [("", "a", "note"), ("long name", "1.5", ""), ("x", "10.25", "y")]


def test_columns_are_aligned_and_no_line_ends_in_spaces() -> None:
    assert text_table(ROWS, "lrl").splitlines() == [
        "               a  note",
        "long name    1.5",
        "x          10.25  y",
    ]
    assert text_table(ROWS).splitlines()[0] == "               a  note"
    assert text_table(ROWS[2:], "r", (3, 1)) == "  x  10.25  y"


def test_a_markdown_cell_is_one_cell_on_one_line() -> None:
    table = markdown_table(["a|b", ""], [["x\ny", "<b>"], ["\\|", "z"]])
    assert table == "| a\\|b |  |\n| --- | --- |\n| x y | &lt;b> |\n| \\\\\\| | z |\n"
