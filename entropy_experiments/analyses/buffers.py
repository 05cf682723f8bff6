"""How do the sequences that the step learns from differ from those that entropy is measured on?

    A = P(x_train > x_eval) + P(x_train = x_eval)/2           over all pairs of a training and an evaluation sequence
    d = (mean_train - mean_eval) / sqrt((s_train^2 + s_eval^2)/2)

A is the Mann-Whitney statistic as a probability: 1/2 where neither buffer has the larger values, whatever their shapes. Its
standard error is a jackknife over prompts, the independent units: both sides' in quadrature, or over prompts jointly where
the buffers share some. (A - 1/2)/error is taken for a t with Welch-Satterthwaite's degrees of freedom. Where the buffers do
not overlap at all the error is 0, and p is that of this one arrangement of the prompts, 2/binomial(B, B_train).

Sources: Mann & Whitney 1947; Brunner & Munzel 2000 (unequal shapes); Holm 1979 (several quantities at once);
docs/analyses/buffers.md, docs/theory/double-sampling.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats

from entropy_core.uncertainty import jackknife_over_prompts
from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.records.estimates import Mean
from entropy_experiments.records.kernel_results import BufferComparison, BufferDescription, BuffersResult, Histogram

Quantity = Literal["length", "entropy", "reward", "truncated"]
QUANTITIES: tuple[Quantity, ...] = ("length", "entropy", "reward", "truncated")
LEVEL = 0.05
_BINS = 16


def compare_buffers(
    evaluation: SequenceLabels,
    training: SequenceLabels,
    truncated: tuple[np.ndarray, np.ndarray] | None = None,
) -> BuffersResult:
    """Length, entropy, reward and truncation of both buffers, and whether they differ beyond chance.

    Args:
        evaluation, training: labels of the sequences.
        truncated: (n_eval,) and (n_train,) bool, whether each completion was cut before an end of sequence.

    Returns:
        The record that summary.json holds: A as probability_larger, d as standardised_difference, by the names in QUANTITIES.
    """
    if truncated is None:
        truncated = (np.full(len(evaluation), np.nan), np.full(len(training), np.nan))
    sides = {}
    for name, labels, cut in (("evaluation", evaluation, truncated[0]), ("training", training, truncated[1])):
        sides[name] = {
            "length": labels.length.astype(np.float64),
            "entropy": labels.entropy_sum / labels.length,
            "reward": labels.reward.astype(np.float64),
            "truncated": np.asarray(cut, dtype=np.float64),
        }
    prompts = (evaluation.prompt_index, training.prompt_index)
    compared = {name: _compare(sides["evaluation"][name], sides["training"][name], *prompts) for name in QUANTITIES}
    differing = _differing({name: entry["p_value"] for name, entry in compared.items()})
    return BuffersResult(
        quantities={name: BufferComparison(**entry, differs=name in differing) for name, entry in compared.items()},
        shared_prompts=len(set(prompts[0].tolist()) & set(prompts[1].tolist())),
    )


def _compare(
    left: np.ndarray, right: np.ndarray, left_prompts: np.ndarray, right_prompts: np.ndarray
) -> dict[str, Any]:
    """The fields of a BufferComparison but for `differs`."""
    known = (np.isfinite(left), np.isfinite(right))
    left, right = left[known[0]], right[known[1]]
    left_prompts, right_prompts = left_prompts[known[0]], right_prompts[known[1]]
    out: dict[str, Any] = {
        "evaluation": _describe(left, left_prompts),
        "training": _describe(right, right_prompts),
        "standardised_difference": None,
        "probability_larger": Mean(value=None, standard_error=None),
        "p_value": None,
        "reason": "",
        "histogram": _histogram(left, right),
    }
    if not len(left) or not len(right):
        where = "neither buffer" if not len(left) and not len(right) else "only one buffer"
        return out | {"reason": f"{where} has this number"}
    pooled = math.sqrt((_variance(left) + _variance(right)) / 2)
    if pooled > 0:
        out["standardised_difference"] = float(right.mean() - left.mean()) / pooled
    value, error, freedom = _probability_larger(left, right, left_prompts, right_prompts)
    out["probability_larger"] = Mean(value=value, standard_error=error)
    if error is None:
        return out | {"reason": "a single prompt has no spread over prompts"}
    if error > 0:
        out["p_value"] = float(2 * stats.t.sf(abs(value - 0.5) / error, freedom))
    elif value == 0.5:
        out["reason"] = "all values are equal"
    else:
        count = len(np.unique(left_prompts)), len(np.unique(right_prompts))
        out["p_value"] = min(1.0, 2 / math.comb(sum(count), count[1]))
        out["reason"] = "the buffers do not overlap"
    return out


def _describe(values: np.ndarray, prompts: np.ndarray) -> BufferDescription:
    if not len(values):
        return BufferDescription(sequences=0, prompts=0, mean=None, standard_error=None, deviation=None)
    error = jackknife_over_prompts(torch.from_numpy(values), torch.from_numpy(np.asarray(prompts)))
    return BufferDescription(
        sequences=len(values),
        prompts=len(np.unique(prompts)),
        mean=float(values.mean()),
        standard_error=float(error) if math.isfinite(error) else None,
        deviation=math.sqrt(_variance(values)) if len(values) > 1 else None,
    )


def _variance(values: np.ndarray) -> float:
    """With Bessel's correction; exactly 0 for equal values, whose mean may be rounded, and for a single one."""
    return float(values.var(ddof=1)) if len(values) > 1 and np.ptp(values) > 0 else 0.0


def _probability_larger(
    left: np.ndarray, right: np.ndarray, left_prompts: np.ndarray, right_prompts: np.ndarray
) -> tuple[float, float | None, float]:
    """(A, its standard error or None, degrees of freedom) from sums over pairs, each prompt left out in turn."""
    wins = (right[None, :] > left[:, None]) + 0.5 * (right[None, :] == left[:, None])  # (n_left, n_right)
    value = float(wins.mean())
    members = np.union1d(left_prompts, right_prompts)
    in_left, in_right = left_prompts[None, :] == members[:, None], right_prompts[None, :] == members[:, None]
    if min(in_left.any(1).sum(), in_right.any(1).sum()) < 2:
        return value, None, 0.0
    by_left, by_right = in_left @ wins.sum(1), in_right @ wins.sum(0)
    both = ((in_left @ wins) * in_right).sum(1)
    pairs = (len(left) - in_left.sum(1)) * (len(right) - in_right.sum(1))
    left_out = (wins.sum() - by_left - by_right + both) / pairs
    shared = in_left.any(1) & in_right.any(1)
    groups = [np.ones(len(members), dtype=bool)] if shared.any() else [in_left.any(1), in_right.any(1)]
    variances, freedoms = [], []
    for group in groups:
        count, values = int(group.sum()), left_out[group]
        spread = float(np.square(values - values.mean()).sum()) if np.ptp(values) > 1e-12 else 0.0
        variances.append((count - 1) / count * spread)
        freedoms.append(count - 1)
    total = sum(variances)
    if total == 0:
        return value, 0.0, 1.0
    freedom = total**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    return value, math.sqrt(total), freedom


def _histogram(left: np.ndarray, right: np.ndarray) -> Histogram:
    values = np.concatenate([left, right])
    if not len(values):
        return Histogram(edges=[], evaluation=[], training=[])
    low, high = float(values.min()), float(values.max())
    whole = bool((values == np.round(values)).all())
    if whole and high - low < 2 * _BINS:  # one bin a number
        edges = np.arange(low - 0.5, high + 1.0)
    else:
        edges = np.linspace(low, high, _BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    evaluation, training = (np.histogram(side, edges)[0] / max(len(side), 1) for side in (left, right))
    return Histogram(edges=edges.tolist(), evaluation=evaluation.tolist(), training=training.tolist())


def _differing(p_values: dict[Quantity, float | None]) -> set[Quantity]:
    """Holm: the smallest of m p-values against LEVEL/m, the next against LEVEL/(m - 1), until one fails."""
    tested = sorted((p, name) for name, p in p_values.items() if p is not None)
    found: set[Quantity] = set()
    for place, (p, name) in enumerate(tested):
        if p > LEVEL / (len(tested) - place):
            break
        found.add(name)
    return found
