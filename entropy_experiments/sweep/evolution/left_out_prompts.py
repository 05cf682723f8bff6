"""Standard errors of anything that several checkpoints say together on the same evaluation prompts.

    T(k, q) = sum over prompts of X(k, q, p)          k: checkpoint, q: quantity of SUMS, p: prompt
    s       = f(T),      s_{-p} = f(T - X(., ., p)),      se(s) by the jackknife over prompts

A prompt left out is left out at every checkpoint, so that what its difficulty adds to all of them alike cancels in
differences. Entropy per token is T(entropy)/T(length), reward T(reward)/T(scored), the predicted change
T(lost)/T(sequences). Source: Efron & Stein 1981; docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.records.estimate_entries import interval_estimate
from entropy_experiments.records.estimates import Estimate

SUMS = ("entropy", "length", "reward", "scored", "lost", "sequences")
Statistic = Callable[[np.ndarray], float]


def common_prompts(buffers: Sequence[Sequence[Mapping[str, Any]]]) -> list[int]:
    """Prompts, by number and text, that every checkpoint's evaluation rows have; ascending."""
    sets = [{(row["prompt_index"], row["prompt"]) for row in rows} for rows in buffers]
    return sorted(number for number, _ in set.intersection(*sets)) if sets else []


def prompt_sums(buffers: Sequence[Sequence[Mapping[str, Any]]], prompts: Sequence[int]) -> np.ndarray:
    """(K, len(SUMS), B) sums X over each prompt's sequences, of K checkpoints' evaluation rows.

    "lost" is n times the row's part of the predicted change, n the buffer's size: its mean over sequences is the prediction.
    Missing rewards count in neither reward nor scored; a missing "entropy_sum" or "delta_h_lost" makes its sums NaN.
    """
    place = {prompt: at for at, prompt in enumerate(prompts)}
    out = np.zeros((len(buffers), len(SUMS), len(prompts)))
    for k, rows in enumerate(buffers):
        for row in rows:
            at = place.get(row["prompt_index"])
            if at is None:
                continue
            reward = row.get("reward")
            scored = reward is not None and math.isfinite(reward)
            entropy, lost = (math.nan if row.get(n) is None else row[n] for n in ("entropy_sum", "delta_h_lost"))
            values = (entropy, row["length"], reward if scored else 0.0, float(scored), len(rows) * lost, 1.0)
            out[k, :, at] += np.array(values, dtype=np.float64)
    return out


def jackknifed(statistic: Statistic, sums: np.ndarray) -> Estimate:
    """f on (K, len(SUMS)) totals with its 95% interval; null where it is not finite, or with a single prompt."""
    totals = sums.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(totals))
        left_out = [float(statistic(totals - sums[..., p])) for p in range(sums.shape[-1])]
    return interval_estimate(value, np.array(left_out))


def entropy_at(k: int) -> Statistic:
    """Entropy at checkpoint k, nats per token."""
    return lambda totals: totals[k, 0] / totals[k, 1]


def reward_at(k: int) -> Statistic:
    """Mean reward at checkpoint k."""
    return lambda totals: totals[k, 2] / totals[k, 3]


def predicted_at(k: int) -> Statistic:
    """Predicted change of entropy by the next step from checkpoint k, nats per token."""
    return lambda totals: totals[k, 4] / totals[k, 5]
