"""What a figure shows, once for both of its drawings: numbers over an axis with their 95% intervals, in panels.

`report.figures.drawing` makes a matplotlib picture of panels, `report.interactive.drawing` plotly's JSON, so that the two
cannot show different numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_experiments.records.history_rows import HistoryRow, values_of
from entropy_experiments.report.figures.bars import BARS, values_and_bars
from entropy_experiments.statistics.confidence import Known, shown
from entropy_experiments.text.numbers import with_interval
from rl_training.intervals import t_quantile

DELTA_H_LABEL = "change of entropy Δh\n(nats per token)"


@dataclass(frozen=True)
class Look:
    """How a line looks: what it shows is said by colour and again by marker or dash.

    colour: a name in `style.COLOURS`, or a hexadecimal colour. marker: plotly's name of a symbol, with "-open" for a hollow one,
    or "none". dash: "solid", "dash", "dashdot", "dot", or "none" for markers alone.
    """

    colour: str
    marker: str = "circle"
    dash: str = "solid"


@dataclass(frozen=True)
class Line:
    """(n,) numbers over (n,) places, NaN where unknown.

    bars: (2, n) lengths of the halves of 95% intervals, NaN where there is none; None for a line without intervals.
    texts: each number in words, with its interval. band: whether intervals are drawn as a band in place of bars.
    """

    name: str
    look: Look
    x: np.ndarray
    y: np.ndarray
    bars: np.ndarray | None = None
    texts: Sequence[str] | None = None
    band: bool = False

    @property
    def known(self) -> bool:
        """Whether any number is known."""
        return bool(np.isfinite(self.y).any())


@dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes. label: of the vertical axis, \\n for a line break. zero: whether 0 is marked. empty: what the
    picture says where no number is known.
    """

    label: str
    lines: Sequence[Line]
    heading: str = ""
    zero: bool = False
    empty: str = "no data"

    @property
    def shown(self) -> list[Line]:
        """The lines with a known number."""
        return [line for line in self.lines if line.known]


def line_of(name: str, look: Look, x: Any, numbers: Sequence[Known | None], *, plus: bool = True) -> Line:
    """A line of (n,) numbers over (n,) places x; plus: whether positive numbers carry a sign in words."""
    values, bars = values_and_bars(numbers)
    texts = [shown(number, plus) for number in numbers]
    return Line(name, look, np.asarray(x, dtype=float), values, _finite(bars), texts)


def history_line(
    name: str,
    look: Look,
    rows: Sequence[HistoryRow],
    field: str,
    errors: tuple[str, str] | None = None,
    *,
    plus: bool = True,
) -> Line:
    """A line of one field of the log over training steps.

    Args:
        name: Of the line.
        look: Of the line.
        rows: The log.
        field: What is drawn.
        errors: Fields of its standard error and of the degrees of freedom behind it; None for a line without intervals.
        plus: Whether positive numbers carry a sign in words.
    """
    steps, values = (values_of(rows, one) for one in ("step", field))
    if errors is None:
        return Line(name, look, steps, values)
    reach = np.array(
        [
            t_quantile(freedom) * error if error >= 0 and np.isfinite(freedom) else np.nan
            for error, freedom in zip(*(values_of(rows, one) for one in errors), strict=True)
        ]
    )
    bars = _finite(np.stack([reach, reach]))
    return Line(name, look, steps, values, bars, None if bars is None else in_words(values, bars, plus))


def in_words(values: np.ndarray, bars: np.ndarray | None, plus: bool = True) -> list[str]:
    """(n,) numbers as text, with the interval that (2, n) `bars` reach to where it is known."""
    ends = np.full((len(values), 2), np.nan) if bars is None else np.stack([values - bars[0], values + bars[1]], axis=1)
    return [
        with_interval(value, low, high, plus) for value, (low, high) in zip(values.tolist(), ends.tolist(), strict=True)
    ]


def bars_described(panels: Sequence[Panel]) -> str:
    """What the bars of these panels are, for a caption."""
    known = any(line.bars is not None for panel in panels for line in panel.shown)
    return f"Bars or bands: {BARS}." if known else "No intervals were stored."


def _finite(bars: np.ndarray) -> np.ndarray | None:
    return bars if np.isfinite(bars).any() else None
