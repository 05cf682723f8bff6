"""Panels of lines (`report.figures.lines`) as plotly's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entropy_experiments.report.figures.lines import Line, Panel
from entropy_experiments.report.figures.style import COLOURS
from entropy_experiments.report.interactive.page import numbers, plot_text
from entropy_experiments.text.numbers import plain

Plot = dict[str, Any]
"""{"data", "layout"} and perhaps "narrow", what changes on a narrow window."""
_GAP = 0.07
_MOST_CHARACTERS = 80
_POINTED_AT = {"spikecolor": "$soft", "spikedash": "dot", "spikethickness": -2}
"""The line at the step that is pointed at; plotly draws one of this thickness as a hairline without a border."""
_EVERY_STEP = 8
"""Training steps from the first to the last up to which each has a tick: steps are whole numbers."""


def colour_of(name: str) -> str:
    """A name in `Look` as the page knows it: "$name" takes the colour of the page's theme."""
    return f"${name}" if name in COLOURS else name


def suffix(place: int) -> str:
    """What plotly puts behind "x" and "y" for the axes number `place`, from 0."""
    return "" if place == 0 else str(place + 1)


def error_bars(bars: np.ndarray, colour: str, thickness: float = 1.2, width: float = 4) -> dict[str, Any]:
    """(2, n) lengths below and above as plotly has error bars; null where there is none."""
    below, above = ([None if np.isnan(x) else float(x) for x in side] for side in bars)
    style = {"color": colour, "thickness": thickness, "width": width}
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below} | style


def traces_of(line: Line, axes: str = "", *, where: str = "%{x}", unit: str = "") -> list[dict[str, Any]]:
    """The traces of one line: its band, where it has one, and the line.

    Args:
        axes: the suffix of its axes.
        where: how a pointer's text names the place; "" where the page names it once for all lines.
        unit: what the text ends with.
    """
    name, colour, dash = plot_text(line.name, _MOST_CHARACTERS), colour_of(line.look.colour), line.look.dash
    texts = line.texts if line.texts is not None else [plain(value) for value in line.y.tolist()]
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers" if dash == "none" else "lines" if line.look.marker == "none" else "lines+markers",
        "name": name,
        "x": numbers(line.x),
        "y": numbers(line.y),
        "line": {"color": colour, "dash": "solid" if dash == "none" else dash, "width": 1.8},
        "marker": {"color": colour, "symbol": "circle" if line.look.marker == "none" else line.look.marker, "size": 8},
        "hovertemplate": f"{name}<br>{where}: %{{customdata}}{unit}<extra></extra>" if where else "%{customdata}",
        "customdata": list(texts),
        "xaxis": f"x{axes}",
        "yaxis": f"y{axes}",
    }
    if line.band and line.bars is not None:
        return [_band(line, colour) | {"xaxis": f"x{axes}", "yaxis": f"y{axes}"}, trace]
    if line.bars is not None:
        trace["error_y"] = error_bars(line.bars, colour, width=3)
    return [trace]


def _band(line: Line, colour: str) -> dict[str, Any]:
    """The intervals as a closed line: there along their lower ends and back along their upper ones."""
    assert line.bars is not None
    known = np.isfinite(line.y) & np.isfinite(line.bars).all(0)
    x, low, high = line.x[known], (line.y - line.bars[0])[known], (line.y + line.bars[1])[known]
    return {
        "type": "scatter",
        "mode": "lines",
        "fill": "toself",
        "opacity": 0.35,
        "line": {"width": 0, "color": colour},
        "x": numbers(np.concatenate([x, x[::-1]])),
        "y": numbers(np.concatenate([low, high[::-1]])),
        "name": "95% interval of the prediction" if line.name.startswith("predicted") else "95% interval",
        "hoverinfo": "skip",
    }


def stacked(panels: Sequence[Panel], mark: tuple[float, str] | None = None) -> Plot | None:
    """Panels over one axis of training steps, those without a known number left out; None without any.

    mark: a step, marked by a dotted line, and what the line is called.
    """
    panels = [panel for panel in panels if panel.shown]
    if not panels:
        return None
    height = (1 - _GAP * (len(panels) - 1)) / len(panels)
    layout: dict[str, Any] = {
        "height": 130 + 180 * len(panels),
        "hovermode": "x unified",
        "hoversubplots": "axis",
        "margin": {"l": 90},
        "xaxis": {
            "title": {"text": "training step"},
            "zeroline": False,
            "anchor": f"y{suffix(len(panels) - 1)}",
            "unifiedhovertitle": {"text": "step %{x}"},
        }
        | _POINTED_AT,
        "shapes": [],
    }
    data = []
    steps = np.concatenate([line.x for panel in panels for line in panel.shown])
    if np.ptp(steps) <= _EVERY_STEP:
        layout["xaxis"]["dtick"] = 1
    for place, panel in enumerate(panels):
        top = 1 - place * (height + _GAP)
        layout[f"yaxis{suffix(place)}"] = {
            "title": {"text": breaks(panel.label), "font": {"size": 11}},
            "domain": [max(0.0, top - height), top],
        }
        for line in panel.shown:
            data += [t | {"xaxis": "x", "yaxis": f"y{suffix(place)}"} for t in traces_of(line, where="")]
    if mark is not None:
        step, word = mark
        layout["shapes"].append(vertical_line(step, "x") | {"line": {"color": "$soft", "width": 1.5, "dash": "dot"}})
        name = {"text": word, "xref": "x", "yref": "paper", "x": step, "y": 1, "yanchor": "bottom"}
        layout["annotations"] = [name | {"showarrow": False, "font": {"color": "$soft", "size": 11}}]
        layout["legend"] = {"y": 1.06}
    return {"data": data, "layout": layout}


def vertical_line(at: float, axis: str) -> dict[str, Any]:
    """A line over the whole height at `at` of a horizontal axis."""
    return {"type": "line", "xref": axis, "yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1}


def breaks(text: str) -> str:
    """Line breaks as plotly reads them."""
    return text.replace("\n", "<br>")
