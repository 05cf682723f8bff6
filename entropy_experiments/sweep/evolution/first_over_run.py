"""Which training prompt lowered entropy most over a run: intervals of the sums of shares, and how often each is first.

    X_u = sum_k x_uk                            x_uk: accounting share of prompt u's sequences in the step after checkpoint k
    X_u(b) = X_u + sum_k sum_p (b_p - 1) (B - 1)/B (mean x_uk,-p - x_uk,-p)          b_p: how often evaluation prompt p was drawn
    first in = the fraction of bootstraps b in which u has the lowest X_u(b)

Checkpoints with the same evaluation prompts share the draw; others have draws of their own, and no interval. The bootstrap is
that of the values with each prompt left out: exact for means, first order for ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from entropy_experiments.analyses.who_was_first import bootstrap_counts
from entropy_experiments.records.leave_one_out import SHARE_OF_PROMPT, LeftOut
from entropy_experiments.statistics.jackknife_interval import jackknife_interval


@dataclass(frozen=True)
class OverRun:
    """Ends of the 95% interval of one training prompt's sum, None where not known; part of bootstraps in which it is first."""

    low: float | None
    high: float | None
    first_in: float


def first_over_run(sums: Mapping[int, float], tables: Sequence[LeftOut | None], seed: int = 0) -> dict[int, OverRun]:
    """Of all training prompts.

    Args:
        sums: training prompt -> X_u, nats per token.
        tables: leave_one_out.parquet of every checkpoint whose shares are in the sums.

    Returns:
        Nothing where a checkpoint does not know its shares with each evaluation prompt left out.
    """
    known = [
        table for table in tables if table is not None and any(k.startswith(SHARE_OF_PROMPT) for k in table.columns)
    ]
    if not known or len(known) < len(tables):
        return {}
    prompts, shared = list(sums), all(table.prompts == known[0].prompts for table in known)
    series = []
    for table in known:
        nothing = np.zeros(len(table.prompts))
        of = {k: v.numpy() for k, v in table.columns.items()}
        series.append(np.stack([of.get(f"{SHARE_OF_PROMPT}{prompt}", nothing) for prompt in prompts], 1))  # (B, U)
    values = np.array([sums[prompt] for prompt in prompts])
    moved = np.zeros((1, len(prompts)))
    for k, one in enumerate(series):
        count = len(one)
        counts = bootstrap_counts(count, seed=seed if shared else seed + k)
        moved = moved + (counts - 1) @ (one.mean(0) - one) * (count - 1) / count
    draw = values + moved
    lowest = draw.argmin(1)
    wins = np.bincount(lowest[draw[np.arange(len(draw)), lowest] < 0], minlength=len(prompts)) / len(draw)
    ends = jackknife_interval(values, np.sum(series, axis=0).T) if shared else None

    def end(which: np.ndarray | None, u: int) -> float | None:
        return None if which is None or not np.isfinite(which[u]) else float(which[u])

    low, high = (None, None) if ends is None else (ends.low, ends.high)
    return {prompt: OverRun(end(low, u), end(high, u), float(wins[u])) for u, prompt in enumerate(prompts)}
