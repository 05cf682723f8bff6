"""A run over its checkpoints: the panels of report/figures/evolution.py and entropy_law.py for the page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from entropy_experiments.records.evolution import Evolution
from entropy_experiments.records.law_results import LawResult
from entropy_experiments.report.figures.entropy_law import H_LABEL, R_LABEL, Curve, law_points
from entropy_experiments.report.figures.evolution import change_panels, course_panels, kernel_panels
from entropy_experiments.report.interactive.drawing import Plot, colour_of, stacked
from entropy_experiments.report.interactive.page import numbers


def evolution_plot(evolution: Evolution) -> Plot | None:
    """Entropy, reward, the next step's change, and what adds up since the first checkpoint; None without numbers."""
    step, path = change_panels(evolution)
    unit = "Δh\n(nats per token)"
    named = [replace(step, label=f"next step's\n{unit}"), replace(path, label=f"{path.heading}:\n{unit}")]
    return stacked([*course_panels(evolution), *named])


def kernel_plot(evolution: Evolution) -> Plot | None:
    """Norm, ranks, share within prompts, and alignment with the checkpoint before; None without any."""
    return stacked(kernel_panels(evolution))


def law_plot(law: LawResult) -> Plot | None:
    """Reward over entropy: all steps with the fitted curve, the first third's curve and band; None without a fit."""
    points = law_points(law)
    if points is None or points.fit is None:
        return None
    data = _curve(points.fit, "solid")
    if points.forecast is not None:
        data += _curve(points.forecast, "dash")
    first = points.first
    groups = (("steps" if first == len(points.step) else f"first {first} steps", slice(0, first), "square"),
              ("steps after them", slice(first, None), "circle"))  # fmt: skip
    for name, members, symbol in groups:
        if points.step[members]:
            trace: dict[str, Any] = {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": numbers(points.entropy[members]),
                "y": numbers(points.reward[members]),
                "marker": {"color": "$reward", "symbol": symbol, "size": 9},
                "customdata": points.step[members],
                "hovertemplate": "step %{customdata}<br>H = %{x:.3g} nats per token<br>R = %{y:.3g}<extra></extra>",
            }
            data.append(trace)
    layout = {
        "height": 460,
        "xaxis": {"title": {"text": H_LABEL}},
        "yaxis": {"title": {"text": R_LABEL}, "range": list(points.reward_range)},
    }
    return {"data": data, "layout": layout}


def _curve(curve: Curve, dash: str) -> list[dict[str, Any]]:
    """The band's ends as thin dotted lines, and the curve."""
    colour = colour_of(curve.colour)
    common = {"type": "scatter", "mode": "lines", "x": numbers(curve.entropy), "legendgroup": curve.name}
    edge = {"line": {"color": colour, "width": 0.7, "dash": "dot"}, "showlegend": False, "hoverinfo": "skip"}
    return [
        *(common | edge | {"y": numbers(end)} for end in (curve.low, curve.high)),
        common
        | {"y": numbers(curve.reward), "name": curve.name, "line": {"color": colour, "dash": dash, "width": 2}}
        | {"hovertemplate": f"{curve.name}: R = %{{y:.3g}}<extra></extra>"},
    ]
