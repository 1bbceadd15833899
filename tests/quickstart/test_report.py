"""The quickstart's result table."""

from __future__ import annotations

from megavlm.quickstart.report import format_table

RESULT = {
    "loss_first": 6.23456,
    "loss_last": 0.1234,
    "heldout_accuracy": 0.875,
    "chance_accuracy": 0.25,
    "box_iou50": None,
    "useful_tokens_per_second": 12345.6,
    "padding_fraction": 0.0213,
    "seconds_total": 133.4,
    "seconds_training": 48.26,
    "layout": {"dp": 2, "tp": 1},
    "accuracy": {"colour": 1.0, "read": 0.5, "text": None},
    "counts": {"colour": 40, "read": 12},
}


def cells(table: str, start: str) -> str:
    """The value in the row whose name starts so."""
    (row,) = [line for line in table.splitlines() if line.strip().startswith(start)]
    return row.split("  ")[-1].strip()


def test_every_figure_has_a_row() -> None:
    table = format_table(RESULT)
    assert cells(table, "loss at the start") == "6.235"
    assert cells(table, "loss at the end") == "0.123"
    assert cells(table, "held-out accuracy") == "87.5 %"
    assert cells(table, "by chance") == "25.0 %"
    assert cells(table, "boxes") == "-"
    assert cells(table, "useful tokens") == "12,346"
    assert cells(table, "padding") == "2.1 %"
    assert cells(table, "time in all") == "2 min 13 s"
    assert cells(table, "time in training") == "48.3 s"
    assert cells(table, "layout") == "dp 2, tp 1"
    assert cells(table, "colour (40)") == "100.0 %"
    assert cells(table, "read (12)") == "50.0 %"
    assert cells(table, "text") == "-"


def test_rows_are_aligned() -> None:
    lines = [line for line in format_table(RESULT).splitlines() if not line.startswith("exact")]
    assert len({len(line) for line in lines}) == 1


def test_missing_figures_are_left_out() -> None:
    table = format_table({"loss_last": 1.0, "unknown": 3})
    assert "1.000" in table and "held-out" not in table and "unknown" not in table
    assert "exact match" not in table
    assert format_table({}) == ""


def test_seconds_do_not_show_sixty() -> None:
    assert cells(format_table({"seconds_total": 119.7}), "time in all") == "2 min 00 s"
    assert cells(format_table({"seconds_total": 59.97}), "time in all") == "1 min 00 s"
