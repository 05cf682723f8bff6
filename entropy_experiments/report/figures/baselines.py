"""How near does each predictor of this step's entropy change come to the measured one?

Rows are predictors; the band is the measured change. See docs/analyses/baselines.md.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from entropy_experiments.records.step_results import BaselineRow, BaselinesResult
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.bars import BARS, reaches
from entropy_experiments.report.figures.lines import DELTA_H_LABEL
from entropy_experiments.statistics.confidence import Known
from entropy_experiments.text.numbers import signed

_TITLE = "How near each predictor comes to the measured change of entropy"
_ON_GIVEN = "fixed_prefix_on_given_tokens"
_SIGN_WORDS = {True: "same sign as measured", False: "other sign than measured"}


@style.in_house_style
def plot_baselines(result: BaselinesResult) -> Figure:
    """Predicted Δh of every predictor beside the measured one."""
    rows = [row for row in result.rows if row.predicted is not None]
    if not rows:
        return style.no_data_figure(_TITLE, "no predictor of the change of entropy was computed for this step.")
    truth = result.measured.known()
    figure = style.new_figure(8.6, 0.9 + 0.34 * len(rows))
    axes = figure.add_subplot()
    axes.axvline(0.0, color="#444444", linewidth=0.9, zorder=1.5)
    axes.grid(False, axis="y")
    comparable = any(row.comparable_in_scale for row in rows)
    handles: list[Any] = [Line2D([], [], color=style.PREDICTED, marker="o", label="predicted")] if comparable else []
    if truth is not None:
        below, above = reaches(truth)
        axes.axvspan(truth.value - below, truth.value + above, color=style.MEASURED, alpha=0.16, linewidth=0)
        axes.axvline(truth.value, color=style.MEASURED, linestyle="--", linewidth=1.4)
        handles.append(Patch(color=style.MEASURED, alpha=0.4, label="measured (reweighted)"))
    for place, row in enumerate(rows):
        if row.comparable_in_scale:
            _estimate(axes, place, row)
    if any(row.name == _ON_GIVEN and row.actual is not None for row in rows):
        handles.append(
            Line2D(
                [],
                [],
                color=style.FIXED_PREFIX_MEASURED,
                marker="s",
                markerfacecolor="white",
                label="measured, given tokens",
            )
        )
    if not comparable and truth is None:
        axes.set_xticks([])
    _words(axes, rows)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.06)
    axes.set_xlabel(DELTA_H_LABEL.replace("\n", " "))
    if handles:
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles), frameon=False)
    return style.finish(figure, _TITLE, _caption(rows, truth))


def _estimate(axes: Axes, place: int, row: BaselineRow) -> None:
    given = row.name.startswith("fixed_prefix")
    predicted = None if row.predicted is None else Known(row.predicted, row.low, row.high)
    actual = None if row.actual is None else Known(row.actual, row.actual_low, row.actual_high)
    if predicted is not None:
        colour, marker = (style.FIXED_PREFIX, "D") if given else (style.PREDICTED, "o")
        style.row_bar(axes, predicted.value, place, reaches(predicted), color=colour, marker=marker)
    if row.name == _ON_GIVEN and actual is not None:
        colour = style.FIXED_PREFIX_MEASURED
        style.row_bar(axes, actual.value, place + 0.26, reaches(actual), color=colour, marker="s", hollow=True)


def _words(axes: Axes, rows: Sequence[BaselineRow]) -> None:
    """At the right of each row how far off it is; for another scale, in the row, its sign."""
    for place, row in enumerate(rows):
        if row.comparable_in_scale:
            words = "" if row.z is None else f"z = {row.z:.1f}"
            axes.annotate(words, (1.01, place), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
            continue
        words = f"{signed(row.predicted)} on another scale"
        if row.sign_agrees is not None:
            words += f": {_SIGN_WORDS[row.sign_agrees]}"
        style.row_note(axes, words, place)


def _caption(rows: Sequence[BaselineRow], truth: Known | None) -> str:
    parts = []
    if truth is None:
        parts.append("No change was measured for this step.")
    else:
        parts.append(f"Dashed line and band: the measured change, {truth.text()} nats per token.")
    if any(end is not None for end in (truth and truth.low, *(row.low for row in rows))):
        parts.append(f"Band and bars: {BARS}.")
    if any(row.z is not None for row in rows):
        parts.append("z: difference from the measured change, in standard errors of that difference.")
    if any(row.name.startswith("fixed_prefix") for row in rows):
        parts.append("Diamonds: the change on given tokens, which is not the change of the policy's entropy.")
    if any(not row.comparable_in_scale for row in rows):
        parts.append("Predictors on another scale are steps of another length: only their signs can be compared here.")
    return " ".join(parts)
