"""What would other weightings of the same sequences have cost in entropy? At equal gain of reward, and at equal length.

Rows are weighting schemes and filters of the run's own weights. See docs/analyses/weighting-schemes.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from entropy_experiments.report.figures.bars import BARS, reaches
from entropy_experiments.report.figures.style import (
    MEASURED,
    NEUTRAL,
    PREDICTED,
    finish,
    in_house_style,
    new_figure,
    no_data_figure,
)
from entropy_experiments.statistics.confidence import NOT_FROM_ZERO, known
from entropy_experiments.text.numbers import counted, lookup, signed, value_and_error

_TITLE = "What other weightings of the same sequences would have cost in entropy"
_PANELS = (("equal_gain", "for the run's gain of reward"), ("equal_length", "for a step of the run's length"))
_KINDS = {"run": (PREDICTED, "D"), "scheme": (PREDICTED, "o"), "filter": ("#56B4E9", "^")}


@in_house_style
def plot_weighting_schemes(table: Mapping[str, Any]) -> Figure:
    """Predicted (and, where there is one, measured) batch part of Δh of every scheme, under two normalisations.

    Parameters
    ----------
    table: what `entropy_experiments.analyses.weighting_schemes` returns, with or without measurements.
    """
    rows = [row for row in table.get("rows", ()) if "delta_h" in row]
    shown = [row for row in rows if any(_value(row, key) is not None for key, _ in _PANELS)]
    if not shown:
        return no_data_figure(_TITLE, "none of the weightings makes a step that can be compared with the run's own.")
    drawn = [(key, words) for key, words in _PANELS if any(_value(row, key) is not None for row in shown)]
    figure = new_figure(9.2, 0.85 + 0.32 * len(shown))
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, (key, words) in zip(panels, drawn, strict=True):
        _panel(axes, shown, key)
        axes.set_title(words)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(shown)), [row["label"] for row in shown])
    panels[0].set_ylim(len(shown) - 0.5, -0.5)
    if any("actual" in row for row in shown):
        predicted = Line2D([], [], color=PREDICTED, marker="o", linestyle="", label="predicted")
        measured = Line2D([], [], color=MEASURED, marker="s", markerfacecolor="white", linestyle="", label="measured")
        panels[-1].legend(handles=[predicted, measured], loc="best")
    return finish(figure, _TITLE, _caption(table, shown, [key for key, _ in drawn]))


def _value(row: Mapping[str, Any], key: str) -> float | None:
    return value_and_error(lookup(row, "delta_h", key))[0]


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    axes.axvline(0.0, color="#444444", linewidth=0.9, zorder=1.5)
    axes.grid(False, axis="y")
    run = _value(rows[0], key) if rows[0]["kind"] == "run" else None
    if run is not None:
        axes.axvline(run, color=PREDICTED, linewidth=0.9, linestyle=":")
    for place, row in enumerate(rows):
        found, actual = known(row["delta_h"][key]), known(lookup(row, "actual", key))
        colour, marker = _KINDS[row["kind"]]
        if found is None:
            words = "no length" if key == "equal_length" else f"its gain {NOT_FROM_ZERO}, or is below it"
            axes.annotate(
                words,
                (0.98, place),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                color=NEUTRAL,
                fontsize=8,
            )
        else:
            below, above = reaches(found)
            axes.errorbar(found.value, place, xerr=[[below], [above]], fmt=marker, color=colour, capsize=3)
        if actual is not None:
            below, above = reaches(actual)
            axes.errorbar(
                actual.value,
                place + 0.24,
                xerr=[[below], [above]],
                fmt="s",
                color=MEASURED,
                markerfacecolor="white",
                capsize=3,
            )
    axes.margins(x=0.08)
    axes.set_xlabel("batch part of Δh (nats per token)")
    axes.locator_params(axis="x", nbins=5)


def _caption(table: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], drawn: Sequence[str]) -> str:
    parts = ["Left of zero: entropy falls. Dotted: the step as trained. Triangles: filters of the run's own weights."]
    priced = sorted((value, row["label"]) for row in rows if (value := _value(row, "equal_gain")) is not None)
    if len(priced) > 1:
        (low, lowest), (high, highest) = priced[0], priced[-1]
        parts.append(
            f"For the same predicted gain of reward entropy changes by {signed(low)} ({lowest}) to {signed(high)} ({highest})."
        )
    if any(row["delta_h"][key]["standard_error"] is not None for row in rows for key in drawn):
        parts.append(
            f"Bars: {BARS} over evaluation prompts; rows share them, so that differences "
            "between rows are surer than the bars suggest."
        )
    parts.append(f"Reward: {table['gain_note']}.")
    reason = lookup(rows[0], "delta_h", "equal_gain", "reason")
    if "equal_gain" not in drawn and reason:
        parts.append(f"No panel at equal gain: as trained, {reason.removeprefix('as trained: ')}.")
    left_out = len(table["rows"]) - len(rows)
    if left_out:
        parts.append(f"{counted(left_out, 'row')} without a step left out.")
    return " ".join(parts)
