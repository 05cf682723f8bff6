"""Entropy and reward over training, and what the probe predicted and measured of every step: the data of a plot.

The same numbers as charts/history.py: entropies in nats per token, error bars are 95% intervals, panels over the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.report.figures.bars import bars_of_columns, plotly_bars
from entropy_experiments.report.interactive.page import numbers
from entropy_experiments.text.numbers import as_number, series

_GAP = 0.07
# (what the vertical axis says, its traces: key, name, colour, symbol, dash, keys of standard error and degrees of freedom)
_PANELS = (
    (
        "entropy (nats per token)",
        (
            ("entropy", "entropy in training", "$entropy", "circle", "solid", None),
            (
                "probe/entropy",
                "entropy on the probe's tokens",
                "$neutral",
                "triangle-up",
                "dot",
                ("probe/entropy_se", "probe/measured_df"),
            ),
        ),
    ),
    ("mean reward", (("reward", "reward", "$reward", "circle", "solid", ("reward_se", "reward_df")),)),
    (
        "change of entropy Δh<br>(nats per token)",
        (
            (
                "probe/predicted",
                "predicted change",
                "$predicted",
                "circle",
                "solid",
                ("probe/predicted_se", "probe/predicted_df"),
            ),
            (
                "probe/measured",
                "measured change",
                "$measured",
                "square-open",
                "solid",
                ("probe/measured_se", "probe/measured_df"),
            ),
        ),
    ),
)


def training_history(history: Sequence[Mapping[str, Any]], analysed_step: float | None = None) -> dict[str, Any] | None:
    """Plotly's data and layout: one panel a kind of quantity, those without numbers left out; None without any.

    history: as in plots.plot_training_history. analysed_step: marked by a dotted line.
    """
    rows = sorted((row for row in history if as_number(row.get("step")) is not None), key=lambda row: row["step"])
    steps = series(rows, "step")
    panels = []
    for title, entries in _PANELS:
        traces = [trace for entry in entries if (trace := _trace(rows, steps, entry)) is not None]
        if traces:
            panels.append((title, traces))
    if not panels:
        return None
    height = (1 - _GAP * (len(panels) - 1)) / len(panels)
    layout: dict[str, Any] = {
        "height": 130 + 190 * len(panels),
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "training step"}, "anchor": f"y{len(panels)}" if len(panels) > 1 else "y"},
        "shapes": [],
    }
    if analysed_step is not None:
        mark = {
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": analysed_step,
            "x1": analysed_step,
            "y0": 0,
            "y1": 1,
        }
        layout["shapes"].append(mark | {"line": {"color": "$soft", "width": 1.5, "dash": "dot"}})
        name = {"text": "analysed", "xref": "x", "yref": "paper", "x": analysed_step, "y": 1, "yanchor": "bottom"}
        layout["annotations"] = [name | {"showarrow": False, "font": {"color": "$soft", "size": 11}}]
        layout["legend"] = {"y": 1.06}
    data = []
    for place, (title, traces) in enumerate(panels):
        suffix = "" if place == 0 else str(place + 1)
        top = 1 - place * (height + _GAP)
        layout[f"yaxis{suffix}"] = {"title": {"text": title}, "domain": [max(0.0, top - height), top]}
        data += [trace | {"yaxis": f"y{suffix}"} for trace in traces]
    return {"data": data, "layout": layout}


def _trace(rows: Sequence[Mapping[str, Any]], steps: np.ndarray, entry: tuple[Any, ...]) -> dict[str, Any] | None:
    key, name, colour, symbol, dash, error_keys = entry
    values = series(rows, key)
    if not np.isfinite(values).any():
        return None
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": numbers(steps),
        "y": numbers(values),
        "line": {"color": colour, "dash": dash, "width": 1.8},
        "marker": {"color": colour, "symbol": symbol, "size": 7},
        "hovertemplate": "%{y:.4g}",
    }
    if error_keys is not None:
        bars = bars_of_columns(rows, *error_keys)
        if np.isfinite(bars).any():
            trace["error_y"] = plotly_bars(bars, colour, 1, 3)
    return trace
