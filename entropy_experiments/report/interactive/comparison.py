"""Several analyses side by side: the panels of report/figures/comparison.py for the page.

Every side keeps its colour and symbol; a click on its name in the legend hides it everywhere in the plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.report.figures.comparison import ComparedChanges, ComparedCheckpoints, course_panels
from entropy_experiments.report.interactive.drawing import Plot, breaks, stacked, suffix, traces_of

_GAP = 0.07


def compared_changes(compared: ComparedChanges) -> Plot | None:
    """Plotly's data and layout of its panels; None where nothing is known."""
    names, panels = compared.names, compared.panels()
    if not panels[0].shown:
        return None
    data = [
        trace | {"text": list(names)}
        for column, panel in enumerate(panels)
        for line in panel.shown
        for trace in traces_of(line, suffix(column), where="%{text}", unit=" nats per token")
    ]
    ticks = {
        "tickvals": list(range(len(names))),
        "ticktext": [name.replace(" ", "<br>", 1) for name in names],
        "showgrid": False,
        "zeroline": False,
    }
    layout = {
        "height": 470,
        "xaxis": {"domain": [0, 0.45], **ticks},
        "yaxis": {"title": {"text": breaks(panels[0].label)}, "zeroline": True},
        "xaxis2": {"domain": [0.56, 1], "anchor": "y2", **ticks},
        "yaxis2": {"anchor": "x2", "title": {"text": breaks(panels[1].label)}, "zeroline": True},
    }
    narrow = {
        "height": 820,
        "xaxis": {"domain": [0, 1]},
        "yaxis": {"domain": [0.58, 1]},
        "xaxis2": {"domain": [0, 1]},
        "yaxis2": {"domain": [0, 0.42]},
    }
    return {"data": _grouped(data), "layout": layout, "narrow": narrow}


def compared_histories(histories: Sequence[Sequence[HistoryRow]], labels: Sequence[str]) -> Plot | None:
    """Plotly's data and layout of `course_panels`, with its arguments; None where no side has a history."""
    plot = stacked(course_panels(histories, labels))
    return None if plot is None else plot | {"data": _grouped(plot["data"])}


def compared_checkpoints(compared: ComparedCheckpoints) -> Plot | None:
    """Plotly's data and layout of its panels; None where nothing is known."""
    rows = compared.panels()
    if not any(each.shown for each, _ in rows):
        return None
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"height": 90 + 240 * len(rows)}
    height = (1 - _GAP * (len(rows) - 1)) / len(rows)
    for row, pair in enumerate(rows):
        top = 1 - row * (height + _GAP)
        for column, panel in enumerate(pair):
            place = 2 * row + column
            for line in panel.shown:
                data += traces_of(line, suffix(place), where="step %{x}")
            layout[f"yaxis{suffix(place)}"] = {
                "domain": [max(0.0, top - height), top],
                "anchor": f"x{suffix(place)}",
                "title": {"text": breaks(panel.label)},
                "zeroline": panel.zero,
            }
            layout[f"xaxis{suffix(place)}"] = {
                "domain": [0.57, 1] if column else [0, 0.45],
                "anchor": f"y{suffix(place)}",
                "zeroline": False,
            } | ({"title": {"text": "training step"}} if row == len(rows) - 1 else {})
    return {"data": _grouped(data), "layout": layout}


def _grouped(traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Traces of one name, which is a side's label, as one group of the legend, in which the first stands for all."""
    named: set[str] = set()
    for trace in traces:
        trace |= {"legendgroup": trace["name"], "showlegend": trace["name"] not in named}
        named.add(trace["name"])
    return traces
