"""Was the step's change of entropy predicted, and by which part of the update? The data of two plots.

The same numbers as report/figures/step.py: predicted dh(s) = s <grad h, dtheta>, measured h(theta + s dtheta) - h(theta),
nats per token, over the step scale s; error bars and the band are 95% intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.report.figures.bars import bars_of_rows, plotly_bars, values_and_bars
from entropy_experiments.report.interactive.page import numbers
from entropy_experiments.statistics.confidence import shown
from entropy_experiments.text.numbers import lookup, series
from rl_training.intervals import t_quantile

_UNIT = "change of entropy Δh (nats per token)"
_CHANGES = (
    ("predicted", "predicted (first order)", "$predicted", "lines+markers", "circle", "solid"),
    ("actual_snis", "measured (reweighted)", "$measured", "markers", "square-open", "solid"),
    ("predicted_fixed_prefix", "predicted, given tokens only", "$fixed", "lines", "circle", "dash"),
    ("actual_fixed_prefix", "measured, given tokens only", "$fixed-measured", "markers", "x", "solid"),
)
_RATIOS = (
    ("actual_snis", "predicted", "measured / predicted", "$measured", "circle", "solid"),
    ("actual_snis", "predicted_split", "same sample on both sides", "$neutral", "triangle-up", "dash"),
    ("actual_fixed_prefix", "predicted_fixed_prefix", "ratio, given tokens only", "$fixed-measured", "x", "dot"),
)
_RATIO_RANGE = (-1.0, 3.0)
_PARTS = (
    ("batch", "this batch"),
    ("momentum", "momentum (earlier batches)"),
    ("weight_decay", "weight decay"),
    ("total", "total predicted"),
)


def predicted_vs_actual(
    rows: Sequence[Mapping[str, Any]],
    predicted_standard_error: float | None = None,
    actual_standard_error: float | None = None,
    degrees_of_freedom: float | None = None,
) -> dict[str, Any] | None:
    """Plotly's data and layout: changes over the step scale, and measured over predicted; None without a scale.

    Parameters as in plots.plot_predicted_vs_actual.
    """
    rows = sorted((row for row in rows if (series([row], "scale") > 0).all()), key=lambda row: row["scale"])
    scales = series(rows, "scale")
    known = [entry for entry in _CHANGES if np.isfinite(series(rows, entry[0])).any()]
    if not known:
        return None
    errors = {
        "predicted": scales * (np.nan if predicted_standard_error is None else predicted_standard_error),
        "actual_snis": series(rows, "actual_snis_standard_error"),
    }
    if actual_standard_error is not None:
        own = errors["actual_snis"]
        errors["actual_snis"] = np.where((scales == 1) & np.isnan(own), actual_standard_error, own)
    freedom = math.inf if degrees_of_freedom is None else degrees_of_freedom
    bars = {key: bars_of_rows(rows, key, t_quantile(freedom) * error) for key, error in errors.items()}
    traces = [_band(scales, series(rows, "predicted"), bars["predicted"])]
    traces = [trace for trace in traces if trace is not None]
    traces += [_change(rows, scales, entry, bars.get(entry[0])) for entry in known]
    traces += [trace for entry in _RATIOS if (trace := _ratio(rows, scales, entry)) is not None]
    ticks = {"tickvals": numbers(scales), "ticktext": [f"1/{1 / s:g}" if s < 1 else f"{s:g}" for s in scales]}
    layout = {
        "height": 470,
        "xaxis": {"domain": [0, 0.53], "title": {"text": "step scale s (1: the step as it was taken)"}},
        "yaxis": {"title": {"text": _UNIT}, "zeroline": True},
        "xaxis2": {"domain": [0.64, 1], "anchor": "y2", "type": "log", "title": {"text": "step scale s"}, **ticks},
        "yaxis2": {
            "anchor": "x2",
            "title": {"text": "measured / predicted (1: as predicted)"},
            "range": _range(traces),
        },
        "shapes": [
            {
                "type": "line",
                "xref": "x2 domain",
                "yref": "y2",
                "x0": 0,
                "x1": 1,
                "y0": 1,
                "y1": 1,
                "line": {"color": "$soft", "width": 1},
            }
        ],
    }
    narrow = {
        "height": 860,
        "xaxis": {"domain": [0, 1]},
        "yaxis": {"domain": [0.56, 1]},
        "xaxis2": {"domain": [0, 1]},
        "yaxis2": {"domain": [0, 0.42]},
    }
    return {"data": traces, "layout": layout, "narrow": narrow}


def _change(
    rows: Sequence[Mapping[str, Any]],
    scales: np.ndarray,
    entry: tuple[str, ...],
    bars: np.ndarray | None,
) -> dict[str, Any]:
    """One line or set of markers. bars: (2, S) lengths below and above, or None."""
    key, name, colour, mode, symbol, dash = entry
    values = series(rows, key)
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": name,
        "mode": mode,
        "x": numbers(scales),
        "y": numbers(values),
        "line": {"color": colour, "dash": dash},
        "marker": {"color": colour, "symbol": symbol, "size": 9},
        "customdata": _texts(values, bars),
        "hovertemplate": f"{name}<br>s = %{{x}}: %{{customdata}} nats per token<extra></extra>",
    }
    if key == "actual_snis" and bars is not None and np.isfinite(bars).any():
        trace["error_y"] = plotly_bars(bars, colour)
    return trace


def _band(scales: np.ndarray, values: np.ndarray, bars: np.ndarray) -> dict[str, Any] | None:
    """The interval around the prediction, as a closed line: there and back. bars: (2, S) lengths below and above."""
    known = np.isfinite(values) & np.isfinite(bars).all(0)
    if not known.any():
        return None
    x, low, high = scales[known], (values - bars[0])[known], (values + bars[1])[known]
    return {
        "type": "scatter",
        "mode": "lines",
        "fill": "toself",
        "opacity": 0.35,
        "line": {"width": 0, "color": "$predicted"},
        "x": numbers(np.concatenate([x, x[::-1]])),
        "y": numbers(np.concatenate([low, high[::-1]])),
        "name": "95% interval of the prediction",
        "hoverinfo": "skip",
    }


def _texts(values: np.ndarray, bars: np.ndarray | None) -> list[str]:
    """What a pointer is told of each value: the number with its interval, where it has one."""
    if bars is None:
        return [shown({"value": value}) for value in values.tolist()]
    low, high = values - bars[0], values + bars[1]
    ends = [[None if np.isnan(end) else end for end in pair] for pair in zip(low.tolist(), high.tolist(), strict=True)]
    return [
        shown({"value": value, "low": below, "high": above})
        for value, (below, above) in zip(values.tolist(), ends, strict=True)
    ]


def _ratio(rows: Sequence[Mapping[str, Any]], scales: np.ndarray, entry: tuple[str, ...]) -> dict[str, Any] | None:
    above, below, name, colour, symbol, dash = entry
    numerator, denominator = series(rows, above), series(rows, below)
    ratio = np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)
    if not np.isfinite(ratio).any():
        return None
    return {
        "type": "scatter",
        "name": name,
        "mode": "lines+markers",
        "xaxis": "x2",
        "yaxis": "y2",
        "x": numbers(scales),
        "y": numbers(ratio),
        "line": {"color": colour, "dash": dash},
        "marker": {"color": colour, "symbol": symbol, "size": 8},
        "hovertemplate": f"{name}<br>s = %{{x}}: %{{y:.3f}}<extra></extra>",
    }


def _range(traces: Sequence[Mapping[str, Any]]) -> list[float]:
    """All ratios, but no further than a prediction that is wrong many times over."""
    ratios = [y for trace in traces if trace.get("yaxis") == "y2" for y in trace["y"] if y is not None] + [1.0]
    low, high = max(min(ratios), _RATIO_RANGE[0]), min(max(ratios), _RATIO_RANGE[1])
    margin = max(0.1, 0.12 * (high - low))
    return [min(low, 1.0) - margin, max(high, 1.0) + margin]


def entropy_split(
    predicted: Mapping[str, Any] | None, actual: Mapping[str, Any] | None, degrees_of_freedom: float | None = None
) -> dict[str, Any] | None:
    """Plotly's data and layout: bars of the parts of the predicted change, their total and the measured one; None without any.

    Parameters as in plots.plot_entropy_split.
    """
    entries = [(label, lookup(predicted, key), "$predicted") for key, label in _PARTS]
    entries.append(("measured", actual, "$measured"))
    values, bars = values_and_bars([entry for _, entry, _ in entries], degrees_of_freedom)
    if not np.isfinite(values).any():
        return None
    trace = {
        "type": "bar",
        "x": [label for label, *_ in entries],
        "y": numbers(values),
        "error_y": plotly_bars(bars, "$ink", width=5),
        "marker": {
            "color": [colour for *_, colour in entries],
            "opacity": [1.0 if label.startswith(("total", "measured")) else 0.55 for label, *_ in entries],
            "pattern": {"shape": ["/" if label == "measured" else "" for label, *_ in entries]},
        },
        "customdata": [shown(entry, degrees_of_freedom=degrees_of_freedom) for _, entry, _ in entries],
        "hovertemplate": "%{x}<br>%{customdata} nats per token<extra></extra>",
    }
    layout = {"height": 400, "yaxis": {"title": {"text": _UNIT}, "zeroline": True}, "xaxis": {"showgrid": False}}
    return {"data": [trace], "layout": layout}
