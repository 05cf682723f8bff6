"""A run over its checkpoints: the data of three plots. The same numbers as charts/evolution.py and charts/entropy_law.py:
nats per token, error bars are 95% intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.report.figures.bars import plotly_bars, values_and_bars
from entropy_experiments.report.interactive.page import numbers
from entropy_experiments.statistics.confidence import shown
from entropy_experiments.text.numbers import lookup

_DELTA_H = "Δh<br>(nats per token)"
# path in a row, name, colour, symbol, dash ("none": no line)
_ENTROPY = ((("entropy",), "entropy", "$entropy", "circle", "solid"),)
_REWARD = ((("reward",), "mean reward", "$reward", "diamond", "solid"),)
_STEP = (
    (("predicted", "total"), "predicted", "$predicted", "circle", "solid"),
    (("predicted", "batch"), "predicted: this batch", "$fixed-measured", "square", "dash"),
    (("predicted", "momentum"), "predicted: momentum", "$fixed", "triangle-up", "dashdot"),
    (("predicted", "weight_decay"), "predicted: weight decay", "$neutral", "triangle-down", "dot"),
    (("actual",), "measured", "$measured", "square-open", "none"),
)
_PATH = (("expected", "predicted steps added up", "$predicted", "circle", "dash"),
         ("observed", "what entropy did", "$measured", "square-open", "solid"))  # fmt: skip
_SIZES = ((("kernel_norm",), "size of an entry of K₁", "$ink", "circle", "solid"),)
_RANKS = (
    (("effective_rank",), "rank of evaluation rows", "$predicted", "circle", "solid"),
    (("training_rank",), "rank of training gradients", "$measured", "square", "dash"),
)
_SHARES = (
    (("same_prompt_share",), "share within prompts", "$predicted", "diamond", "solid"),
    (("same_prompt_pairs",), "such pairs", "$neutral", "circle", "dot"),
)
_ALIGNED = (
    (("alignment",), "alignment (debiased CKA)", "$predicted", "triangle-up", "solid"),
    (("cosine",), "cosine, shared training prompts", "$measured", "square", "dash"),
)


def evolution_plot(evolution: Mapping[str, Any]) -> dict[str, Any] | None:
    """Entropy, reward, the next step's change, and what adds up since the first checkpoint; None without checkpoints."""
    rows = evolution["checkpoints"]
    if not rows:
        return None
    steps = [row["step"] for row in rows]
    panels = [
        ("entropy<br>(nats per token)", _traces(rows, steps, _ENTROPY)),
        ("mean reward", _traces(rows, steps, _REWARD)),
        (f"next step's<br>{_DELTA_H}", _traces(rows, steps, _STEP)),
    ]
    if len(rows) > 1:
        path = [
            _trace(evolution["path"][key], (), steps, name, colour, symbol, dash)
            for key, name, colour, symbol, dash in _PATH
        ]
        panels.append((f"since step {steps[0]}:<br>{_DELTA_H}", path))
    return _stacked(panels)


def kernel_plot(evolution: Mapping[str, Any]) -> dict[str, Any] | None:
    """Norm, ranks, share within prompts, and alignment with the checkpoint before; None without any."""
    rows, changes = evolution["checkpoints"], evolution["changes"]
    steps, at = [row["step"] for row in rows], [change["to"] for change in changes]
    return _stacked(
        [
            ("entry of K₁<br>(nats² × P)", _traces(rows, steps, _SIZES)),
            ("effective rank<br>(directions)", _traces(rows, steps, _RANKS)),
            ("share within<br>prompts", _traces(rows, steps, _SHARES)),
            ("alignment with<br>checkpoint before", _traces(changes, at, _ALIGNED)),
        ]
    )


def _traces(
    rows: Sequence[Mapping[str, Any]], steps: Sequence[int], entries: Sequence[Any]
) -> list[dict[str, Any] | None]:
    return [_trace(rows, path, steps, *style) for path, *style in entries]


def _trace(
    rows: Sequence[Mapping[str, Any]],
    path: tuple[str, ...],
    steps: Sequence[int],
    name: str,
    colour: str,
    symbol: str,
    dash: str,
) -> dict[str, Any] | None:
    entries = [lookup(row, *path) for row in rows]
    values, bars = values_and_bars(entries)
    if not np.isfinite(values).any():
        return None
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers" if dash == "none" else "lines+markers",
        "name": name,
        "x": list(steps),
        "y": numbers(values),
        "line": {"color": colour, "dash": "solid" if dash == "none" else dash, "width": 1.8},
        "marker": {"color": colour, "symbol": symbol, "size": 8},
        "customdata": [shown(entry, plus=False) for entry in entries],
        "hovertemplate": "%{customdata}",
    }
    if np.isfinite(bars).any():
        trace["error_y"] = plotly_bars(bars, colour, width=3)
    return trace


def _stacked(panels: Sequence[tuple[str, list[dict[str, Any] | None]]]) -> dict[str, Any] | None:
    """Panels over one axis of training steps, those without a trace left out."""
    known = [(title, [t for t in traces if t is not None]) for title, traces in panels]
    known = [(title, traces) for title, traces in known if traces]
    if not known:
        return None
    gap = 0.06
    height = (1 - gap * (len(known) - 1)) / len(known)
    layout: dict[str, Any] = {
        "height": 120 + 170 * len(known),
        "hovermode": "x unified",
        "hoversubplots": "axis",
        "margin": {"l": 90},
        "xaxis": {
            "title": {"text": "training step"},
            "zeroline": False,
            "anchor": f"y{len(known)}" if len(known) > 1 else "y",
        },
    }
    data = []
    for place, (title, traces) in enumerate(known):
        suffix = "" if place == 0 else str(place + 1)
        top = 1 - place * (height + gap)
        layout[f"yaxis{suffix}"] = {
            "title": {"text": title, "font": {"size": 11}},
            "domain": [max(0.0, top - height), top],
        }
        data += [trace | {"yaxis": f"y{suffix}"} for trace in traces]
    return {"data": data, "layout": layout}


def law_plot(law: Mapping[str, Any]) -> dict[str, Any] | None:
    """Reward over entropy: all steps with the fitted curve, the first third's curve and band; None without a fit."""
    points, fit = law["points"], law["fit"]
    if fit["reason"] is not None:
        return None
    data = _curve(fit, "fit to all steps", "$predicted", "solid")
    held = lookup(law, "forecast", "held_out")
    first = len(points["step"])
    if held:
        first = law["forecast"]["n"]
        data += _curve(law["forecast"], "forecast of the first third", "$measured", "dash")
    groups = (("steps" if first == len(points["step"]) else f"first {first} steps", slice(0, first), "square"),
              ("steps after them", slice(first, None), "circle"))  # fmt: skip
    for name, members, symbol in groups:
        if not points["step"][members]:
            continue
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": numbers(points["entropy"][members]),
            "y": numbers(points["reward"][members]),
            "marker": {"color": "$reward", "symbol": symbol, "size": 9},
            "customdata": points["step"][members],
            "hovertemplate": "step %{customdata}<br>H = %{x:.3g} nats per token<br>R = %{y:.3g}<extra></extra>",
        }
        data.append(trace)
    rewards = np.asarray(points["reward"])
    span = float(np.ptp(rewards)) or 1.0
    layout = {
        "height": 460,
        "xaxis": {"title": {"text": "entropy H (nats per token)"}},
        "yaxis": {
            "title": {"text": "mean reward R"},
            "range": [float(rewards.min() - 0.6 * span), float(rewards.max() + 0.6 * span)],
        },
    }
    return {"data": data, "layout": layout}


def _curve(fit: Mapping[str, Any], name: str, colour: str, dash: str) -> list[dict[str, Any]]:
    curve = fit["curve"]
    common = {"type": "scatter", "mode": "lines", "x": numbers(curve["entropy"]), "legendgroup": name}
    edge = {"line": {"color": colour, "width": 0.7, "dash": "dot"}, "showlegend": False, "hoverinfo": "skip"}
    return [
        common | edge | {"y": numbers(curve["low"])},
        common | edge | {"y": numbers(curve["high"])},
        common
        | {"y": numbers(curve["reward"]), "name": name, "line": {"color": colour, "dash": dash, "width": 2}}
        | {"hovertemplate": f"{name}: R = %{{y:.3g}}<extra></extra>"},
    ]
