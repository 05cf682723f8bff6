"""Was the step's change of entropy predicted, and by which part of the update? `step_scaling` and `split_bars` for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.summary import StepParts
from entropy_experiments.report.figures.bars import reaches
from entropy_experiments.report.figures.lines import DELTA_H_LABEL, Panel
from entropy_experiments.report.figures.step import RATIO_RANGE, scale_names, split_bars, step_scaling
from entropy_experiments.report.interactive.drawing import Plot, colour_of, error_bars, traces_of
from entropy_experiments.report.interactive.page import numbers
from entropy_experiments.statistics.confidence import shown

_UNIT = DELTA_H_LABEL.replace("\n", " ")


def predicted_vs_actual(rows: Sequence[Mapping[str, Any]], **errors: float | None) -> Plot | None:
    """Plotly's data and layout: changes over the step scale, and measured over predicted; None without a number.

    Args:
        rows, errors: as `step_scaling` takes them.
    """
    scaling = step_scaling(rows, **errors)
    if scaling is None:
        return None
    changes = [t for line in scaling.changes.shown for t in traces_of(line, where="s = %{x}", unit=" nats per token")]
    ratios = [t for line in scaling.ratios.shown for t in traces_of(line, "2", where="s = %{x}")]
    ticks = {"tickvals": numbers(scaling.scales), "ticktext": scale_names(scaling.scales)}
    one = {"type": "line", "xref": "x2 domain", "yref": "y2", "x0": 0, "x1": 1, "y0": 1, "y1": 1}
    layout = {
        "height": 470,
        "xaxis": {"domain": [0, 0.53], "title": {"text": "step scale s (1: the step as it was taken)"}},
        "yaxis": {"title": {"text": _UNIT}, "zeroline": True},
        "xaxis2": {"domain": [0.64, 1], "anchor": "y2", "type": "log", "title": {"text": "step scale s"}, **ticks},
        "yaxis2": {
            "anchor": "x2",
            "title": {"text": "measured / predicted (1: as predicted)"},
            "range": _range(scaling.ratios),
        },
        "shapes": [one | {"line": {"color": "$soft", "width": 1}}],
    }
    narrow = {
        "height": 860,
        "xaxis": {"domain": [0, 1]},
        "yaxis": {"domain": [0.56, 1]},
        "xaxis2": {"domain": [0, 1]},
        "yaxis2": {"domain": [0, 0.42]},
    }
    return {"data": [*changes, *ratios], "layout": layout, "narrow": narrow}


def _range(panel: Panel) -> list[float]:
    """All ratios and 1, but no further than RATIO_RANGE."""
    values = np.concatenate([[1.0], *(line.y[np.isfinite(line.y)] for line in panel.lines)])
    low, high = max(values.min(), RATIO_RANGE[0]), min(values.max(), RATIO_RANGE[1])
    margin = max(0.1, 0.12 * (high - low))
    return [float(min(low, 1.0) - margin), float(max(high, 1.0) + margin)]


def entropy_split(predicted: StepParts | None, actual: Estimate | None) -> Plot | None:
    """Plotly's data and layout: bars of the parts of the predicted change, their total and the measured one; None without any.

    Args:
        predicted, actual: as `split_bars` takes them.
    """
    bars = split_bars(predicted, actual)
    if all(bar.number is None for bar in bars):
        return None
    nan = (np.nan, np.nan)
    ends = [nan if bar.number is None or bar.number.low is None else reaches(bar.number) for bar in bars]
    trace = {
        "type": "bar",
        "x": [bar.label for bar in bars],
        "y": numbers([np.nan if bar.number is None else bar.number.value for bar in bars]),
        "error_y": error_bars(np.array(ends).T, "$ink", width=5),
        "marker": {
            "color": [colour_of(bar.colour) for bar in bars],
            "opacity": [bar.opacity for bar in bars],
            "pattern": {"shape": ["/" if bar.hatched else "" for bar in bars]},
        },
        "customdata": [shown(bar.number) for bar in bars],
        "hovertemplate": "%{x}<br>%{customdata} nats per token<extra></extra>",
    }
    layout = {"height": 400, "yaxis": {"title": {"text": _UNIT}, "zeroline": True}, "xaxis": {"showgrid": False}}
    return {"data": [trace], "layout": layout}
