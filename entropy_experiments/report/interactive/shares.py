"""Which training sequences moved entropy? `rank_shares` for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entropy_experiments.report.figures.attribution import MANY, SIDES, UNIT, UNIT_LABEL, rank_shares
from entropy_experiments.report.interactive.drawing import Plot, colour_of
from entropy_experiments.report.interactive.page import numbers, plot_text
from entropy_experiments.text.numbers import as_number, counted, plain, series, signed


def sequence_shares(training: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Plotly's data and layout: one bar a training sequence, the lowest share first; None where no share is known.

    Args:
        training: rows with row, prompt_index, completion, delta_h (nats per token), advantage, reward. A point's customdata
            begins with the sequence's row number.
    """
    columns = [series(training, key) for key in ("delta_h", "reward", "advantage")]
    ranked = rank_shares(columns[0], columns[1], [row["prompt_index"] for row in training], columns[2])
    if not len(ranked.order):
        return None
    traces = []
    for side in SIDES:
        places = ranked.members(side)
        if not len(places):
            continue
        members = ranked.order[places]
        traces.append(
            {
                "type": "bar",
                "name": f"{side.words}:<br>{counted(len(members), 'sequence')}, sum {signed(ranked.total(side))} × 10⁻³",
                "x": (places + 1).tolist(),
                "y": numbers(ranked.shares[members]),
                "marker": {"color": colour_of(side.colour), "pattern": {"shape": side.hatch, "solidity": 0.3}},
                "customdata": [_described(training[i]) for i in members],
                "hovertemplate": "sequence %{customdata[0]}, prompt %{customdata[1]}: %{customdata[6]} × 10⁻³ nats per token "
                "(effect of leaving out %{customdata[5]} × 10⁻³)<br>"
                "reward %{customdata[2]}, advantage %{customdata[3]}<br>%{customdata[4]}<extra></extra>",
            }
        )
    layout = {
        "height": 440,
        "bargap": 0.05 if len(ranked.order) > MANY else 0.15,
        "barmode": "overlay",
        "xaxis": {"title": {"text": f"{len(ranked.order)} training sequences, sorted"}, "showgrid": False},
        "yaxis": {"title": {"text": UNIT_LABEL}, "zeroline": True},
    }
    return {"data": traces, "layout": layout}


def _described(row: Mapping[str, Any]) -> list[Any]:
    facts = [plain(row.get("reward")), signed(row.get("advantage"))]
    effect, share = (as_number(row.get(key)) for key in ("effect_of_leaving_out", "delta_h"))
    facts.append(plot_text(row["completion"], 90))
    return [
        row["row"],
        row["prompt_index"],
        *facts,
        *(signed(None if x is None else x / UNIT) for x in (effect, share)),
    ]
