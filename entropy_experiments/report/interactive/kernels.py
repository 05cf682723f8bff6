"""The kernels of an analysis for the page's explorer (templates/kernel.js): values, colour scales, and orders of the axes.

    K1(t, i)  "fisher"           K_H(t, i)  "entropy_fisher"            t an evaluation sequence (row), i a training one (column)

Values travel as little-endian float32 in base64, row by row, in the order of kernel.safetensors; the page reorders them.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.records.clustering_results import ClusteringResult
from entropy_experiments.report.figures.kernel import color_limit
from entropy_experiments.text.numbers import series

MOST_CELLS = 1_000_000
"""Of a kernel in the page; a larger one is a picture only (8 MB of page a kernel otherwise)."""
_KERNELS = (
    (
        "fisher",
        "Fisher kernel K₁",
        "K₁",
        "Red: making the training completion likelier makes the evaluation completion likelier too; blue: less likely.",
    ),
    (
        "entropy_fisher",
        "Entropy–Fisher kernel K_H",
        "K_H",
        "Red: making the training completion likelier raises entropy by way of the evaluation sequence; blue: lowers it.",
    ),
)


def packed(values: Any) -> str:
    """Numbers as little-endian float32 in base64; NaN stays NaN."""
    return b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def kernel_explorer(
    kernels: Mapping[str, np.ndarray],
    evaluation: Sequence[Mapping[str, Any]],
    training: Sequence[Mapping[str, Any]],
    clustering: ClusteringResult | None = None,
) -> dict[str, Any] | None:
    """What the explorer shows; None without a kernel of finite entries and at most MOST_CELLS cells.

    kernels: "fisher", "entropy_fisher" -> (n_eval, n_train). evaluation, training: the sequences on the axes, with
    prompt_index, and training with delta_h. clustering: its clusters, if there are any.

    Returns {"rows", "columns": counts, "kernels": [{"name", "title", "symbol", "meaning", "limit", "values"}],
    "row_orders", "column_orders": [{"label", "order", "groups", "noun"}]}; order: places as in kernel.safetensors, from the top
    or left; groups: what stands at each place of the order, a change of which is drawn as a line, None without groups.
    """
    matrices = []
    for name, title, symbol, meaning in _KERNELS:
        values = kernels.get(name)
        if values is None or values.size > MOST_CELLS or not np.isfinite(values).any():
            continue
        matrices.append(
            {
                "name": name,
                "title": title,
                "symbol": symbol,
                "meaning": meaning,
                "limit": color_limit(values),
                "values": packed(values),
            }
        )
    if not matrices:
        return None
    return {
        "rows": len(evaluation),
        "columns": len(training),
        "kernels": matrices,
        "row_orders": [_by_prompt(evaluation)],
        "column_orders": [_by_prompt(training), *_by_cluster(clustering), *_by_share(training)],
    }


def _by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    prompts = np.array([row["prompt_index"] for row in rows], dtype=np.int64)
    order = np.argsort(prompts, kind="stable")
    return {"label": "by prompt", "noun": "prompt", "order": order.tolist(), "groups": prompts[order].tolist()}


def _by_cluster(clustering: ClusteringResult | None) -> list[dict[str, Any]]:
    """One order where there are clusters: along the tree's leaves; sequences without a gradient come last."""
    if clustering is None or not clustering.leaf_order:
        return []
    leaves, labels = list(clustering.leaf_order), clustering.labels
    order = leaves + sorted(set(range(len(labels))) - set(leaves))
    groups = ["none" if labels[i] is None else str(labels[i]) for i in order]
    return [{"label": "by cluster", "noun": "cluster", "order": order, "groups": groups}]


def _by_share(training: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shares = series(training, "delta_h")
    if not np.isfinite(shares).any():
        return []
    order = np.argsort(shares, kind="stable")  # unknown ones last
    return [{"label": "by accounting share of Δh, lowest first", "noun": "", "order": order.tolist(), "groups": None}]
