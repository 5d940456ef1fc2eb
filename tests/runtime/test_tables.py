"""Columns stand under each other, whatever their cells hold."""

from __future__ import annotations

from vbp.runtime.tables import format_seconds, is_number, markdown_table, text_table

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


def test_times_are_read_as_people_read_them() -> None:
    assert [format_seconds(value) for value in (0.254, 7.54, 59.9, 192, 5040)] == [
        "0.25 s", "7.5 s", "59.9 s", "3.2 min", "1.4 h",
    ]  # fmt: skip


def test_a_number_is_told_from_a_text_that_begins_with_digits() -> None:
    numbers = (
        "0",
        "-13.95",
        "+0.00",
        "1,000",
        "97.77 ± 0.49",
        "3.74 M",
        "80.5%",
        "29.8 %",
        "1.26x (1.25 to 1.27)",
        "nan",
    )
    assert all(map(is_number, numbers))
    assert not any(map(is_number, ("", "-", "2.14.1", "0.5 0.5 0.5", "12 of 40", "blocks.0", "4 ms a batch")))
