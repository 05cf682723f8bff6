"""How do the sequences that the step learns from differ from those that entropy is measured on?

    A = P(x_train > x_eval) + P(x_train = x_eval)/2           over all pairs of a training and an evaluation sequence
    d = (mean_train - mean_eval) / sqrt((s_train^2 + s_eval^2)/2)

A is the Mann-Whitney statistic as a probability: 1/2 where neither buffer has the larger values, whatever their shapes. Its
error is a jackknife over prompts, its p-value that of a permutation of prompts (permuted_prompts.py).

Sources: Mann & Whitney 1947; Holm 1979 (several quantities at once); docs/analyses/buffers.md, docs/theory/double-sampling.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch

from entropy_core.uncertainty import jackknife_over_prompts
from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.analyses.permuted_prompts import superiority
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
    found = superiority(left, right, left_prompts, right_prompts)
    if found is None:
        wins = ((right[None, :] > left[:, None]) + 0.5 * (right[None, :] == left[:, None])).mean()
        out["probability_larger"] = Mean(value=float(wins), standard_error=None)
        return out | {"reason": "a single prompt has no spread over prompts"}
    out["probability_larger"] = Mean(value=found.value, standard_error=found.standard_error)
    out["p_value"] = found.p_value
    if found.p_value is None:
        out["reason"] = "all values are equal"
    elif found.standard_error == 0 and found.value != 0.5:
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
