"""What would other weightings have cost in entropy? The data of a plot, from what analyses/weighting_schemes.py returned.

The same numbers as charts/weighting.py: the batch part of dh, nats per token, for the run's gain of reward and for a step of the
run's length; error bars are 95% intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from entropy_experiments.report.figures.bars import plotly_bars, values_and_bars
from entropy_experiments.report.interactive.page import numbers, plot_text
from entropy_experiments.statistics.confidence import shown
from entropy_experiments.text.numbers import lookup, value_and_error

_OFFSET = 0.28  # of a row: measurements stand below the predictions
_PANELS = (("equal_length", "for a step of the run's length"), ("equal_gain", "for the run's gain of reward"))
_SYMBOLS = {"run": "diamond", "scheme": "circle", "filter": "triangle-up"}


def weighting_schemes(table: Mapping[str, Any]) -> dict[str, Any] | None:
    """Plotly's data and layout: a row a weighting, a panel a normalisation that has numbers; None without any number."""
    rows = [row for row in table.get("rows", ()) if isinstance(row, Mapping) and "delta_h" in row]
    panels = [(key, words) for key, words in _PANELS if any(_value(row, "delta_h", key) is not None for row in rows)]
    rows = [row for row in rows if any(_value(row, "delta_h", key) is not None for key, _ in panels)]
    if not rows:
        return None
    traces = []
    width = 1 / len(panels)
    layout: dict[str, Any] = {
        "height": 150 + 27 * len(rows),
        "margin": {"l": 20, "r": 20, "t": 60, "b": 60},
        "yaxis": {
            "range": [len(rows) - 0.4, -0.6],
            "tickvals": list(range(len(rows))),
            "ticktext": [_label(row) for row in rows],
            "showgrid": False,
            "zeroline": False,
        },
        "shapes": [],
    }
    for place, (key, words) in enumerate(panels):
        suffix = "" if place == 0 else str(place + 1)
        for part, name, colour in (("delta_h", "predicted", "$predicted"), ("actual", "measured", "$measured")):
            trace = _trace(rows, part, key, name, colour)
            if trace is not None:
                traces.append(trace | {"xaxis": f"x{suffix}", "showlegend": place == 0})
        run = _value(rows[0], "delta_h", key) if rows[0].get("kind") == "run" else None
        if run is not None:
            mark = {"type": "line", "xref": f"x{suffix}", "yref": "paper", "x0": run, "x1": run, "y0": 0, "y1": 1}
            layout["shapes"].append(mark | {"line": {"color": "$predicted", "width": 1, "dash": "dot"}})
        layout[f"xaxis{suffix}"] = {
            "domain": [place * width + 0.03 * place, (place + 1) * width],
            "title": {"text": f"batch part of Δh (nats per token)<br>{words}"},
            "zeroline": True,
            "nticks": 6 if len(panels) == 1 else 4,
        }
    narrow: dict[str, Any] = {"yaxis": {"tickfont": {"size": 9}}, "margin": {"l": 10, "r": 10, "b": 90}}
    for place, (_, words) in enumerate(panels):
        title = f"batch part of Δh<br>(nats per token)<br>{words.replace(' of the', '<br>of the')}"
        narrow[f"xaxis{'' if place == 0 else place + 1}"] = {"title": {"text": title}, "nticks": 3}
    return {"data": traces, "layout": layout, "narrow": narrow}


def _label(row: Mapping[str, Any]) -> str:
    return plot_text(str(row.get("label", row.get("name", ""))), 60)


def _value(row: Mapping[str, Any], part: str, key: str) -> float | None:
    return value_and_error(lookup(row, part, key))[0]


def _trace(rows: list[Mapping[str, Any]], part: str, key: str, name: str, colour: str) -> dict[str, Any] | None:
    entries = [lookup(row, part, key) for row in rows]
    values, bars = values_and_bars(entries)
    if not np.isfinite(values).any():
        return None
    offset = 0.0 if part == "delta_h" else _OFFSET
    symbols = [_SYMBOLS.get(str(row.get("kind")), "circle") for row in rows]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": numbers(values),
        "y": [place + offset for place in range(len(rows))],
        "error_x": plotly_bars(bars, colour),
        "marker": {"color": colour, "size": 10, "symbol": symbols if part == "delta_h" else "square-open"},
        "customdata": [[_label(row), shown(entry)] for row, entry in zip(rows, entries, strict=True)],
        "hovertemplate": f"%{{customdata[0]}}<br>{name} %{{customdata[1]}} nats per token<extra></extra>",
    }
