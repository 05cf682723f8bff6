"""What would other weightings of the same sequences have cost in entropy? At equal gain of reward, and at equal length.

Rows are weighting schemes and filters of the run's own weights. See docs/analyses/weighting-schemes.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from entropy_experiments.records.weighting_results import WeightingResult, WeightingRow
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.bars import BARS, reaches
from entropy_experiments.statistics.confidence import NOT_FROM_ZERO, UNTRUSTED, Known
from entropy_experiments.text.numbers import counted, signed

_TITLE = "What other weightings of the same sequences would have cost in entropy"
_Key = Literal["equal_length", "equal_gain"]
_PANELS: tuple[tuple[_Key, str], ...] = (
    ("equal_length", "for a step of the run's length"),
    ("equal_gain", "for the run's gain of reward"),
)
_MARKERS = {"run": "D", "scheme": "o", "filter": "^"}
BELOW = 0.26
"""Part of a row by which measurements stand below the predictions."""


@dataclass(frozen=True)
class WeightingPanel:
    """One normalisation. predicted, measured: batch part of Δh of each row, nats per token; run: that of the run's weights."""

    key: _Key
    words: str
    predicted: list[Known | None]
    measured: list[Known | None]
    run: float | None


@dataclass(frozen=True)
class Weightings:
    """Rows that can be compared with the run's own, and the panels that hold a number."""

    rows: list[WeightingRow]
    panels: list[WeightingPanel]


def weighting_rows(result: WeightingResult) -> Weightings:
    """The weightings that make a step, with or without measurements, as both drawings show them."""

    def predicted(row: WeightingRow, key: _Key) -> Known | None:
        return None if row.delta_h is None else getattr(row.delta_h, key).known()

    def measured(row: WeightingRow, key: _Key) -> Known | None:
        found = (row.actual or {}).get(key)
        return None if found is None else found.known()

    rows = [row for row in result.rows if any(predicted(row, key) is not None for key, _ in _PANELS)]
    panels = []
    for key, words in _PANELS:
        numbers = [predicted(row, key) for row in rows]
        if any(number is not None for number in numbers):
            own = numbers[0] if rows[0].kind == "run" else None
            run = None if own is None else own.value
            panels.append(WeightingPanel(key, words, numbers, [measured(row, key) for row in rows], run))
    return Weightings(rows, panels)


@style.in_house_style
def plot_weighting_schemes(result: WeightingResult) -> Figure:
    """`weighting_rows` as a picture: predicted and, where there is one, measured batch part of Δh."""
    found = weighting_rows(result)
    if not found.rows:
        reason = "none of the weightings makes a step that can be compared with the run's own."
        return style.no_data_figure(_TITLE, reason)
    figure = style.new_figure(9.2, 0.85 + 0.32 * len(found.rows))
    grid = figure.subplots(1, len(found.panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(grid, found.panels, strict=True):
        _draw(axes, found.rows, panel)
    grid[0].set_yticks(range(len(found.rows)), [row.label for row in found.rows])
    grid[0].set_ylim(len(found.rows) - 0.5, -0.5)
    if any(number is not None for panel in found.panels for number in panel.measured):
        predicted = Line2D([], [], color=style.PREDICTED, marker="o", linestyle="", label="predicted")
        measured = Line2D(
            [], [], color=style.MEASURED, marker="s", markerfacecolor="white", linestyle="", label="measured"
        )
        grid[-1].legend(handles=[predicted, measured], loc="best")
    return style.finish(figure, _TITLE, _caption(result, found))


def _draw(axes: Axes, rows: Sequence[WeightingRow], panel: WeightingPanel) -> None:
    axes.axvline(0.0, color="#444444", linewidth=0.9, zorder=1.5)
    axes.grid(False, axis="y")
    if panel.run is not None:
        axes.axvline(panel.run, color=style.PREDICTED, linewidth=0.9, linestyle=":")
    for place, (row, own, actual) in enumerate(zip(rows, panel.predicted, panel.measured, strict=True)):
        if own is None:
            words = "no length" if panel.key == "equal_length" else f"its gain {NOT_FROM_ZERO}, or is negative"
            style.row_note(axes, words, place, fontsize=8)
        else:
            style.row_bar(
                axes, own.value, place, reaches(own), color=style.FIXED_PREFIX if row.kind == "filter" else style.PREDICTED,
                marker=_MARKERS[row.kind],
            )  # fmt: skip
        if actual is not None:
            style.row_bar(
                axes, actual.value, place + BELOW, reaches(actual), color=style.MEASURED, marker="s", hollow=True
            )
    axes.set_title(panel.words)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    axes.set_xlabel("batch part of Δh (nats per token)")
    axes.locator_params(axis="x", nbins=5)


def _caption(result: WeightingResult, found: Weightings) -> str:
    parts = ["Left of zero: entropy falls. Dotted: the step as trained. Triangles: filters of the run's own weights."]
    panels = {panel.key: panel for panel in found.panels}
    if "equal_gain" in panels:
        named = zip(panels["equal_gain"].predicted, found.rows, strict=True)
        priced = sorted((own.value, row.label) for own, row in named if own is not None)
        if len(priced) > 1:
            (low, lowest), (high, highest) = priced[0], priced[-1]
            parts.append(
                f"For the same predicted gain of reward entropy changes by {signed(low)} ({lowest}) to {signed(high)} "
                f"({highest})."
            )
    if any(own is not None and own.low is not None for panel in found.panels for own in panel.predicted):
        parts.append(
            f"Bars: {BARS} over evaluation prompts; rows share them, so that differences "
            "between rows are surer than the bars suggest."
        )
    measured = [one for row in found.rows for one in (row.actual or {}).values()]
    if any(one.trustworthy is False for one in measured):
        parts.append(f"Measured without a bar: {UNTRUSTED}.")
    parts.append(f"Reward: {result.gain_note}.")
    run = found.rows[0].delta_h
    reason = None if run is None else run.equal_gain.reason
    if "equal_gain" not in panels and reason:
        parts.append(f"No panel at equal gain: as trained, {reason.removeprefix('as trained: ')}.")
    left_out = len(result.rows) - len(found.rows)
    if left_out:
        parts.append(f"{counted(left_out, 'row')} without a step left out.")
    return " ".join(parts)
