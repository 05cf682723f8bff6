"""Bars of figures are 95% intervals, those of the sentences (`statistics.confidence.Known`), upwards and downwards apart.

Where few prompts are skewed an interval is not symmetric about its value; of a number without an error there is no bar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entropy_experiments.statistics.confidence import Known
from entropy_experiments.text.numbers import series

BARS = "95% intervals"


def values_and_bars(numbers: Sequence[Known | None]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) values and (2, n) lengths of their bars, below and above; NaN for what is not known."""
    values, bars = np.full(len(numbers), np.nan), np.full((2, len(numbers)), np.nan)
    for k, number in enumerate(numbers):
        if number is not None:
            values[k] = number.value
            if number.low is not None:
                bars[:, k] = reaches(number)
    return values, bars


def reaches(found: Known) -> tuple[float, float]:
    """Lengths of one bar, below and above; 0 where there is no interval."""
    if found.low is None or found.high is None:
        return 0.0, 0.0
    return max(found.value - found.low, 0.0), max(found.high - found.value, 0.0)


def bars_of_rows(rows: Sequence[Any], key: str, reach: np.ndarray) -> np.ndarray:
    """(2, n) lengths of the bars of (n,) rows' numbers under `key`: to the ends that a row holds under `key`_low and _high.

    reach: (n,) half a width for rows that hold no such keys. A row whose ends are null has no interval.
    """
    bars = np.stack([reach, reach]).astype(float)
    for side, end in enumerate(("low", "high")):
        stored = np.array([f"{key}_{end}" in row for row in rows], dtype=bool)
        lengths = np.abs(series(rows, f"{key}_{end}") - series(rows, key))
        bars[side] = np.where(stored, lengths, bars[side])
    return bars
