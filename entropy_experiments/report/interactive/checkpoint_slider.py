"""One picture a checkpoint under one slider: its Fisher kernel K1, and below every column that sequence's share of Δh.

Rows are evaluation sequences in the order of their prompts, the same prompts at every checkpoint; columns are training
sequences in the order of theirs, drawn anew at each. Colours end at each checkpoint's own 99th percentile of |K1|: between
checkpoints compare patterns; sizes are in the figure of the kernel over the run.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.records.evolution import CheckpointRow
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.report.figures.kernel import color_limit
from entropy_experiments.report.interactive.page import numbers, plot_text
from entropy_experiments.statistics.confidence import DOUBTED, shown
from entropy_experiments.text.display import prompt_frame
from entropy_experiments.text.numbers import plain, series

MOST_CELLS = 1_200_000
"""Of all kernels of one slider together, some 6 MB of page; with more, evenly chosen checkpoints are shown."""
_TEXT = 60


def checkpoint_slider(folders: Sequence[ResultsFolder], rows: Sequence[CheckpointRow]) -> dict[str, Any] | None:
    """Plotly's data and layout of every step, as interactive/page.py wants them; None where no checkpoint has a kernel.

    folders, rows: finished analyses by step, and each one's row of evolution.json.
    """
    with_kernel = [(f, row) for f, row in zip(folders, rows, strict=True) if "fisher" in f.kernels]
    if not with_kernel:
        return None
    steps = [_step(*pair) for pair in _few_enough(with_kernel)]
    layout = {
        "height": 640,
        "hovermode": "closest",
        "showlegend": False,
        "margin": {"l": 80, "t": 64},
        "xaxis": {
            "type": "category",
            "showticklabels": False,
            "ticks": "",
            "anchor": "y2",
            "title": {"text": "training sequences, by prompt"},
        },
        "yaxis": {
            "type": "category",
            "domain": [0.36, 1],
            "autorange": "reversed",
            "showticklabels": False,
            "title": {"text": "evaluation sequences"},
        },
        "yaxis2": {"domain": [0, 0.3], "title": {"text": "share of Δh<br>(10⁻³ nats per token)", "font": {"size": 11}}},
    }
    return {"slider": {"label": "Checkpoint", "start": len(steps) - 1}, "steps": steps, "layout": layout}


def _few_enough(pairs: list[Any]) -> list[Any]:
    cells = max(results.kernels["fisher"].size for results, _ in pairs)
    most = max(2, MOST_CELLS // max(cells, 1))
    if len(pairs) <= most:
        return pairs
    return [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, most).round().astype(int))]


def _step(results: ResultsFolder, row: CheckpointRow) -> dict[str, Any]:
    kernel = results.kernels["fisher"]
    down, across = (_order(side) for side in (results.evaluation, results.training))
    limit = color_limit(kernel)
    frame = prompt_frame([r["prompt"] for r in results.evaluation + results.training])
    labels = [
        [
            plot_text(f"{r['row']}: {frame.own_part(r['prompt'])} → {r['completion']}", _TEXT)
            for r in (side[i] for i in order)
        ]
        for side, order in ((results.evaluation, down), (results.training, across))
    ]
    shares = 1e3 * series([results.training[i] for i in across], "delta_h")
    heat = {
        "type": "heatmap",
        "z": _packed(kernel[np.ix_(down, across)]),
        "x": labels[1],
        "y": labels[0],
        "zmin": -limit,
        "zmax": limit,
        "colorscale": "$diverging",
        "colorbar": {"title": {"text": "K₁"}, "len": 0.64, "y": 0.68, "thickness": 12},
        "hovertemplate": "K₁ = %{z:.3g}<br>evaluation %{y}<br>training %{x}<extra></extra>",
    }
    bars = {
        "type": "bar",
        "x": labels[1],
        "y": numbers(shares),
        "yaxis": "y2",
        "marker": {"color": ["$measured" if share < 0 else "$predicted" for share in shares.tolist()]},
        "hovertemplate": "%{x}<br>share %{y:.3g} ×10⁻³ nats per token<extra></extra>",
    }
    doubt = f" ({DOUBTED})" if row.trustworthy is False else ""
    facts = (
        f"entropy {row.entropy.shown(plus=False)}, predicted Δh {shown(row.change)}, "
        f"measured {shown(row.measured)} nats per token{doubt}"
    )
    title = {"text": f"Step {row.step}: {facts}<br>colours end at ±{plain(limit)}", "font": {"size": 13}, "x": 0}
    return {"label": f"step {row.step}", "data": [heat, bars], "layout": {"title": title}}


def _order(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.argsort([row["prompt_index"] for row in rows], kind="stable")


def _packed(values: np.ndarray) -> dict[str, Any]:
    """A (rows, columns) array as plotly reads it: float32, base64."""
    content = np.ascontiguousarray(values, dtype="<f4")
    shape = f"{content.shape[0]}, {content.shape[1]}"
    return {"dtype": "f4", "bdata": b64encode(content.tobytes()).decode("ascii"), "shape": shape}
