"""Which training sequences moved entropy? The data of a plot: their shares of dh, sorted, coloured by the advantage's sign.

The same numbers as charts/attribution.py, nats per token; the shares add up to the batch part of the predicted change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.report.figures.attribution import group_advantages
from entropy_experiments.report.interactive.page import numbers, plot_text
from entropy_experiments.text.numbers import as_number, plain, series, signed

_UNIT = 1e-3
_SIGNS = {1: ("$predicted", "advantage > 0"), -1: ("$measured", "advantage < 0"), 0: ("$neutral", "advantage 0")}
_PATTERNS = {1: "", -1: "/", 0: "."}


def sequence_shares(training: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Plotly's data and layout: one bar a training sequence, the most costing first; None where no share is known.

    training: rows with row, prompt_index, completion, delta_h (nats per token), advantage, reward. A point's customdata begins
    with the sequence's row number.
    """
    shares = series(training, "delta_h")
    advantages = series(training, "advantage")
    if not np.isfinite(advantages).any() and len(training):
        advantages = group_advantages(series(training, "reward"), [row["prompt_index"] for row in training])
    kept = np.flatnonzero(np.isfinite(shares))
    if not len(kept):
        return None
    order = kept[np.argsort(shares[kept], kind="stable")]
    signs = np.sign(np.nan_to_num(advantages)).astype(int)
    traces = []
    for sign, (colour, words) in _SIGNS.items():
        places = np.flatnonzero(signs[order] == sign)
        if not len(places):
            continue
        members = order[places]
        total = float(shares[members].sum()) / _UNIT
        traces.append(
            {
                "type": "bar",
                "name": f"{words}: {len(members)} sequences, sum {signed(total)}",
                "x": (places + 1).tolist(),
                "y": numbers(shares[members] / _UNIT),
                "marker": {"color": colour, "pattern": {"shape": _PATTERNS[sign], "solidity": 0.3}},
                "customdata": [_described(training[i]) for i in members],
                "hovertemplate": "sequence %{customdata[0]}, prompt %{customdata[1]}: %{y:+.3g} × 10⁻³ nats per token "
                "(effect of leaving out %{customdata[5]})<br>"
                "reward %{customdata[2]}, advantage %{customdata[3]}<br>%{customdata[4]}<extra></extra>",
            }
        )
    layout = {
        "height": 440,
        "bargap": 0.05 if len(order) > 120 else 0.15,
        "barmode": "overlay",
        "xaxis": {"title": {"text": f"{len(order)} training sequences, sorted"}, "showgrid": False},
        "yaxis": {"title": {"text": "accounting share of Δh (10⁻³ nats per token)"}, "zeroline": True},
    }
    return {"data": traces, "layout": layout}


def _described(row: Mapping[str, Any]) -> list[Any]:
    facts = [plain(row.get("reward")), signed(row.get("advantage"))]
    effect = as_number(row.get("effect_of_leaving_out"))
    facts.append(plot_text(row["completion"], 90))
    return [row["row"], row["prompt_index"], *facts, signed(None if effect is None else effect / _UNIT)]
