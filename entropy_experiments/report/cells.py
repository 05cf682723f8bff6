"""Cells and tables of the report as finished text, of what the records hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from entropy_experiments.records.estimates import Estimate, Mean, StudentEstimate
from entropy_experiments.records.weighting_results import MeasuredChange
from entropy_experiments.report.content import Cell, Table
from entropy_experiments.statistics.confidence import DOUBTED, DOUBTED_MEANS, measured_cell
from entropy_experiments.text.numbers import signed


def table_of(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> list[Table]:
    """One table whose first column holds words and the others numbers, or notes (`note_cell`); none without rows."""
    if not rows:
        return []
    return [
        Table(explained(caption, rows), tuple((heading, place > 0) for place, heading in enumerate(headings)), rows)
    ]


def note_cell(text: str) -> Cell:
    """Words in a column of numbers, which may take several lines."""
    return Cell(text, look="note")


def estimate_cell(estimate: Estimate | Mean | StudentEstimate | MeasuredChange | None) -> str:
    """``−0.27 ± 0.03``, a dash for none; a measurement that is not to be trusted is marked and has no error."""
    return "–" if estimate is None else measured_cell(estimate.value, estimate.standard_error, is_trusted(estimate))


def thousandths(value: float | None) -> str:
    """The number times 1,000, with its sign."""
    return signed(None if value is None else 1e3 * value)


def thousandths_with_error(estimate: Estimate | Mean | StudentEstimate | MeasuredChange | None) -> str:
    """`estimate_cell` times 1,000, without an error the number alone."""
    if estimate is None or estimate.value is None:
        return "–"
    trusted = is_trusted(estimate)
    if estimate.standard_error is None and trusted is not False:
        return thousandths(estimate.value)
    error = None if estimate.standard_error is None else 1e3 * estimate.standard_error
    return measured_cell(1e3 * estimate.value, error, trusted)


def is_trusted(estimate: object) -> bool | None:
    """Whether a measurement is to be trusted; None of what is none, or where that is not known."""
    found = getattr(estimate, "trustworthy", None)
    return found if isinstance(found, bool) else None


def explained(caption: str, rows: Iterable[Iterable[str | Cell]]) -> str:
    """The caption, which says what "untrusted" is where a cell of the rows says so."""
    texts = (cell.text if isinstance(cell, Cell) else cell for row in rows for cell in row)
    return f"{caption} {DOUBTED_MEANS}" if any(f"({DOUBTED})" in text for text in texts) else caption
