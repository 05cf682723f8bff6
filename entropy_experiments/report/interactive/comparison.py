"""Several analyses side by side: the data of plots that show the same numbers as charts/comparison.py.

Entropies in nats per token, error bars are 95% intervals. Every side keeps its colour and symbol; a click on its name in
the legend hides it everywhere in the plot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.report.figures.bars import plotly_bars, values_and_bars
from entropy_experiments.report.interactive.page import numbers, plot_text
from entropy_experiments.statistics.confidence import known, shown
from entropy_experiments.text.numbers import series

# Legible on the light and on the dark page; A is drawn in the ink of the text.
_COLOURS = ("$ink", "#D55E00", "#3A8FD0", "#2E9E5B", "#B45FA8", "#C98A00", "#56B4E9", "#B0506F")
_SYMBOLS = (
    "circle",
    "square-open",
    "triangle-up-open",
    "diamond-open",
    "triangle-down-open",
    "cross-open",
    "x-open",
    "star-open",
)
_Entries = Sequence[Mapping[str, Any] | None]


def _trace(
    x: Sequence[Any], pairs: _Entries, side: int, label: str, mode: str, legend: bool, axes: str
) -> dict[str, Any]:
    values, bars = values_and_bars(pairs)
    trace = {
        "type": "scatter",
        "mode": mode,
        "name": plot_text(label, 80),
        "legendgroup": str(side),
        "showlegend": legend,
        "x": list(x),
        "y": numbers(values),
        "line": {"color": _COLOURS[side], "width": 1.6},
        "marker": {"color": _COLOURS[side], "symbol": _SYMBOLS[side], "size": 8},
        "customdata": [shown(entry) for entry in pairs],
        "hovertemplate": f"{plot_text(label, 80)}<br>%{{x}}: %{{customdata}}<extra></extra>",
        "xaxis": f"x{axes}",
        "yaxis": f"y{axes}",
    }
    if np.isfinite(bars).any():
        trace["error_y"] = plotly_bars(bars, _COLOURS[side])
    return trace


def compared_changes(
    names: Sequence[str], values: Sequence[_Entries], differences: Sequence[_Entries], labels: Sequence[str]
) -> dict[str, Any] | None:
    """Plotly's data and layout of plots.plot_compared_changes, with its arguments; None where nothing is known."""
    if not any(known(entry) is not None for side in values for entry in side):
        return None
    data = []
    for sets, first, axes in ((values, 0, ""), (differences, 1, "2")):
        spread = np.linspace(-0.22, 0.22, len(sets)) if len(sets) > 1 else np.zeros(1)
        for k, (shift, pairs) in enumerate(zip(spread, sets, strict=True)):
            places = [place + float(shift) for place in range(len(names))]
            trace = _trace(places, pairs, k + first, labels[k + first], "markers", not first, axes)
            trace["text"] = list(names)
            trace["hovertemplate"] = (
                f"{plot_text(labels[k + first], 80)}<br>%{{text}}: %{{customdata}} nats per token<extra></extra>"
            )
            data.append(trace)
    ticks = {
        "tickvals": list(range(len(names))),
        "ticktext": [name.replace(" ", "<br>", 1) for name in names],
        "showgrid": False,
        "zeroline": False,
    }
    layout = {
        "height": 470,
        "xaxis": {"domain": [0, 0.45], **ticks},
        "yaxis": {"title": {"text": "change of entropy Δh (nats per token)"}, "zeroline": True},
        "xaxis2": {"domain": [0.56, 1], "anchor": "y2", **ticks},
        "yaxis2": {"anchor": "x2", "title": {"text": "difference from A (nats per token)"}, "zeroline": True},
    }
    narrow = {
        "height": 820,
        "xaxis": {"domain": [0, 1]},
        "yaxis": {"domain": [0.58, 1]},
        "xaxis2": {"domain": [0, 1]},
        "yaxis2": {"domain": [0, 0.42]},
    }
    return {"data": data, "layout": layout, "narrow": narrow}


def compared_histories(
    histories: Sequence[Sequence[Mapping[str, Any]]], labels: Sequence[str]
) -> dict[str, Any] | None:
    """Plotly's data and layout of plots.plot_compared_histories; None where no side has a history."""
    data = []
    for k, rows in enumerate(histories):
        rows = sorted((row for row in rows if np.isfinite(series([row], "step")).all()), key=lambda row: row["step"])
        named = False
        for key, axes in (("entropy", ""), ("reward", "2")):
            values = series(rows, key)
            if np.isfinite(values).any():
                pairs = [{"value": float(value)} if np.isfinite(value) else None for value in values]
                trace = _trace(numbers(series(rows, "step")), pairs, k, labels[k], "lines+markers", not named, axes)
                trace |= {
                    "xaxis": "x",
                    "hovertemplate": f"{plot_text(labels[k], 80)}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
                }
                data.append(trace)
                named = True
    if not data:
        return None
    layout = {
        "height": 520,
        "xaxis": {"title": {"text": "training step"}, "anchor": "y2", "zeroline": False},
        "yaxis": {"title": {"text": "entropy (nats per token)"}, "domain": [0.54, 1]},
        "yaxis2": {"title": {"text": "mean reward"}, "domain": [0, 0.46]},
    }
    return {"data": data, "layout": layout}


def compared_checkpoints(
    steps: Sequence[Sequence[float]],
    panels: Mapping[str, Sequence[_Entries]],
    differences: Mapping[str, tuple[Sequence[float], Sequence[_Entries]]],
    labels: Sequence[str],
) -> dict[str, Any] | None:
    """Plotly's data and layout of plots.plot_compared_checkpoints, with its arguments; None where nothing is known."""
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"height": 90 + 240 * len(panels)}
    gap = 0.07
    height = (1 - gap * (len(panels) - 1)) / len(panels)
    for row, (name, sides) in enumerate(panels.items()):
        top = 1 - row * (height + gap)
        shared, sets = differences.get(name, ((), ()))
        for column, (first, places, all_pairs) in enumerate(((0, steps, sides), (1, [shared] * len(sets), sets))):
            number = 2 * row + column + 1
            axes = "" if number == 1 else str(number)
            for k, (at, pairs) in enumerate(zip(places, all_pairs, strict=True)):
                legend = number == 1
                trace = _trace(list(at), pairs, k + first, labels[k + first], "lines+markers", legend, axes)
                trace["hovertemplate"] = trace["hovertemplate"].replace("%{x}", "step %{x}")
                data.append(trace)
            layout[f"yaxis{axes}"] = {
                "domain": [max(0.0, top - height), top],
                "anchor": f"x{axes}",
                "title": {"text": "minus A" if column else f"{name} (nats per token)"},
                "zeroline": bool(column) or not name.startswith("entropy"),
            }
            layout[f"xaxis{axes}"] = {
                "domain": [0.57, 1] if column else [0, 0.45],
                "anchor": f"y{axes}",
                "zeroline": False,
            } | ({"title": {"text": "training step"}} if row == len(panels) - 1 else {})
    return {"data": data, "layout": layout} if any(y is not None for trace in data for y in trace["y"]) else None
