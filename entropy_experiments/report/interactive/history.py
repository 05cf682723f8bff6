"""Entropy and reward over training, and what the probe predicted and measured of every step: `history_panels` for the page."""

from __future__ import annotations

from collections.abc import Sequence

from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.report.figures.history import history_panels
from entropy_experiments.report.interactive.drawing import Plot, stacked


def training_history(history: Sequence[HistoryRow], analysed_step: float | None = None) -> Plot | None:
    """Plotly's data and layout: one panel a kind of quantity, those without numbers left out; None without any.

    analysed_step: marked by a dotted line.
    """
    return stacked(history_panels(history), None if analysed_step is None else (analysed_step, "analysed"))
