"""What would other weightings have cost in entropy? `weighting_rows` for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entropy_experiments.records.weighting_results import WeightingResult
from entropy_experiments.report.figures.bars import reaches
from entropy_experiments.report.figures.weighting import BELOW, weighting_rows
from entropy_experiments.report.interactive.drawing import Plot, error_bars, suffix, vertical_line
from entropy_experiments.report.interactive.page import numbers, plot_text
from entropy_experiments.statistics.confidence import Known, shown

_SYMBOLS = {"run": "diamond", "scheme": "circle", "filter": "triangle-up"}
_GAP = 0.03


def weighting_schemes(result: WeightingResult) -> Plot | None:
    """Plotly's data and layout: a row a weighting, a panel a normalisation that has numbers; None without any number."""
    found = weighting_rows(result)
    if not found.rows:
        return None
    labels = [plot_text(row.label, 60) for row in found.rows]
    symbols = [_SYMBOLS[row.kind] for row in found.rows]
    width = 1 / len(found.panels)
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "height": 150 + 27 * len(labels),
        "margin": {"l": 20, "r": 20, "t": 60, "b": 60},
        "yaxis": {
            "range": [len(labels) - 0.4, -0.6],
            "tickvals": list(range(len(labels))),
            "ticktext": labels,
            "showgrid": False,
            "zeroline": False,
        },
        "shapes": [],
    }
    narrow: dict[str, Any] = {"yaxis": {"tickfont": {"size": 9}}, "margin": {"l": 10, "r": 10, "b": 90}}
    for place, panel in enumerate(found.panels):
        axis = f"x{suffix(place)}"
        for name, known, symbol, below in (
            ("predicted", panel.predicted, symbols, 0.0),
            ("measured", panel.measured, "square-open", BELOW),
        ):
            if any(number is not None for number in known):
                trace = _trace(name, labels, known, below)
                trace["marker"]["symbol"] = symbol
                traces.append(trace | {"xaxis": axis, "showlegend": place == 0})
        if panel.run is not None:
            line = {"color": "$predicted", "width": 1, "dash": "dot"}
            layout["shapes"].append(vertical_line(panel.run, axis) | {"line": line})
        layout[f"xaxis{suffix(place)}"] = {
            "domain": [place * width + _GAP * place, (place + 1) * width],
            "title": {"text": f"batch part of Δh (nats per token)<br>{panel.words}"},
            "zeroline": True,
            "nticks": 6 if len(found.panels) == 1 else 4,
        }
        title = f"batch part of Δh<br>(nats per token)<br>{panel.words.replace(' of the', '<br>of the')}"
        narrow[f"xaxis{suffix(place)}"] = {"title": {"text": title}, "nticks": 3}
    return {"data": traces, "layout": layout, "narrow": narrow}


def _trace(name: str, labels: Sequence[str], known: Sequence[Known | None], below: float) -> dict[str, Any]:
    nan = (np.nan, np.nan)
    ends = [nan if number is None or number.low is None else reaches(number) for number in known]
    texts = [shown(number) for number in known]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": numbers([np.nan if number is None else number.value for number in known]),
        "y": [place + below for place in range(len(labels))],
        "error_x": error_bars(np.array(ends).T, f"${name}"),
        "marker": {"color": f"${name}", "size": 10},
        "customdata": [list(pair) for pair in zip(labels, texts, strict=True)],
        "hovertemplate": f"%{{customdata[0]}}<br>{name} %{{customdata[1]}} nats per token<extra></extra>",
    }
