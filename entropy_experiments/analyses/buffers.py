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
from typing import Any

import numpy as np
import torch
from scipy import stats

from entropy_core.uncertainty import jackknife_over_prompts
from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.statistics.confidence import UNTOLD
from entropy_experiments.text.numbers import counted, plain

QUANTITIES = {
    "length": ("completion length", "tokens", "longer", "shorter"),
    "entropy": ("token entropy", "nats per token", "more undecided", "more decided"),
    "reward": ("reward", "", "rewarded higher", "rewarded lower"),
    "truncated": ("cuts at the maximum length", "", "cut more often", "cut less often"),
}
"""name -> label, unit, and what a training buffer with larger, or with smaller, values is."""
LEVEL = 0.05
_BINS = 16


def compare_buffers(
    evaluation: SequenceLabels,
    training: SequenceLabels,
    truncated: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Length, entropy, reward and truncation of both buffers, and whether they differ beyond chance.

    truncated: (n_eval,) and (n_train,) bool, whether each completion was cut before an end of sequence.

    Returns "quantities", a dict by the names in QUANTITIES of
        evaluation, training      each {"sequences", "prompts", "mean", "standard_error", "deviation"}, scored ones only
        standardised_difference   d
        probability_larger        {"value": A, "standard_error"}
        p_value, differs          of A = 1/2; whether that is beyond chance at 5% after Holm's correction
        reason                    why a number is None, or ""
        histogram                 {"edges", "evaluation", "training"}: share of each buffer's sequences in each bin
    and "shared_prompts", "sentence". standard_error: of the mean, jackknife over prompts. Nothing is NaN.
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
    quantities = {name: _compare(sides["evaluation"][name], sides["training"][name], *prompts) for name in QUANTITIES}
    _mark_differences(quantities)
    result = {"quantities": quantities, "shared_prompts": len(set(prompts[0].tolist()) & set(prompts[1].tolist()))}
    return result | {"sentence": _sentence(quantities)}


def _compare(
    left: np.ndarray, right: np.ndarray, left_prompts: np.ndarray, right_prompts: np.ndarray
) -> dict[str, Any]:
    known = (np.isfinite(left), np.isfinite(right))
    left, right = left[known[0]], right[known[1]]
    left_prompts, right_prompts = left_prompts[known[0]], right_prompts[known[1]]
    out: dict[str, Any] = {
        "evaluation": _describe(left, left_prompts),
        "training": _describe(right, right_prompts),
        "standardised_difference": None,
        "probability_larger": {"value": None, "standard_error": None},
        "p_value": None,
        "differs": False,
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
    out["probability_larger"] = {"value": value, "standard_error": error}
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


def _describe(values: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {"sequences": 0, "prompts": 0, "mean": None, "standard_error": None, "deviation": None}
    error = jackknife_over_prompts(torch.from_numpy(values), torch.from_numpy(np.asarray(prompts)))
    return {
        "sequences": len(values),
        "prompts": len(np.unique(prompts)),
        "mean": float(values.mean()),
        "standard_error": _finite(error),
        "deviation": math.sqrt(_variance(values)) if len(values) > 1 else None,
    }


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


def _histogram(left: np.ndarray, right: np.ndarray) -> dict[str, list[float]]:
    values = np.concatenate([left, right])
    if not len(values):
        return {"edges": [], "evaluation": [], "training": []}
    low, high = float(values.min()), float(values.max())
    whole = bool((values == np.round(values)).all())
    if whole and high - low < 2 * _BINS:  # one bin a number
        edges = np.arange(low - 0.5, high + 1.0)
    else:
        edges = np.linspace(low, high, _BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    counts = (np.histogram(side, edges)[0] / max(len(side), 1) for side in (left, right))
    return dict(zip(("edges", "evaluation", "training"), (edges.tolist(), *(c.tolist() for c in counts)), strict=True))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mark_differences(quantities: dict[str, dict[str, Any]]) -> None:
    """Holm: the smallest of m p-values against LEVEL/m, the next against LEVEL/(m - 1), until one fails."""
    tested = sorted((q for q in quantities.values() if q["p_value"] is not None), key=lambda q: q["p_value"])
    for place, quantity in enumerate(tested):
        if quantity["p_value"] > LEVEL / (len(tested) - place):
            break
        quantity["differs"] = True


def _sentence(quantities: dict[str, dict[str, Any]]) -> str:
    n_eval, n_train = (quantities["length"][side]["sequences"] for side in ("evaluation", "training"))
    lead = f"Beside {counted(n_eval, 'evaluation sequence')}, {counted(n_train, 'training sequence')}"
    found = []
    for name, (_, unit, larger, smaller) in QUANTITIES.items():
        q = quantities[name]
        if q["differs"]:
            word = larger if q["probability_larger"]["value"] > 0.5 else smaller
            means = f"{plain(q['training']['mean'])} against {plain(q['evaluation']['mean'])} {unit}".rstrip()
            found.append(f"{word} ({means} on average, p = {plain(q['p_value'], 2)})")
    if found:
        listed = found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"
        return f"{lead} are {listed}."
    tested = [QUANTITIES[name][0] for name, q in quantities.items() if q["p_value"] is not None]
    if not tested:
        return f"Whether {lead[0].lower()}{lead[1:]} differ {UNTOLD}: {quantities['length']['reason']}."
    return f"{lead} differ beyond chance in none of {', '.join(tested)}."
