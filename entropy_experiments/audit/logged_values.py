"""The trainer's log as an audit reads it: rows of averages over steps, and how finely each number
was written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from entropy_experiments.text.numbers import as_number

# A row of training metrics has one of these; rows of evaluation and the row at the end have none.
_MARKS = ("entropy", "reward", "completions/mean_length")
# A float32's or float64's own digits go further than this; fewer decimals in a whole column were
# rounded by somebody.
_MOST_DECIMALS_OF_A_ROUNDED_LOG = 6


@dataclass(frozen=True)
class LoggedRow:
    """One row: `values` are averages of what the steps `first` to `step` gave."""

    first: int
    step: int
    values: dict[str, float]

    @property
    def steps(self) -> range:
        return range(self.first, self.step + 1)


def logged_rows(log_history: Sequence[Mapping[str, Any]]) -> list[LoggedRow]:
    """Rows of training metrics, ascending; numbers alone."""
    rows: list[LoggedRow] = []
    before = 0
    for entry in log_history:
        step = entry.get("step")
        if not isinstance(step, int) or step <= before or not any(name in entry for name in _MARKS):
            continue
        values = {name: float(v) for name, v in entry.items() if as_number(v) is not None and math.isfinite(float(v))}
        rows.append(LoggedRow(before + 1, step, values))
        before = step
    return rows


def rounding(rows: Sequence[LoggedRow], names: Sequence[str]) -> float:
    """Half a unit of the last decimal that the columns `names` were written with; 0 where they have
    all of a float's digits.
    """
    values = [row.values[name] for row in rows for name in names if name in row.values]
    decimals = max((_decimals(value) for value in values), default=_MOST_DECIMALS_OF_A_ROUNDED_LOG + 1)
    return 0.5 * 10.0**-decimals if decimals <= _MOST_DECIMALS_OF_A_ROUNDED_LOG else 0.0


def _decimals(value: float) -> int:
    exponent = Decimal(repr(value)).as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0
