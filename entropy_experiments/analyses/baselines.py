"""How near does each predictor of this step's entropy change come to the measured one?

    rao_blackwell, split, score_function    <grad h, dtheta> with the step that AdamW takes, by three estimators of grad h
    fixed_prefix                            the same with the change on given tokens in place of grad h
    without_momentum                        <grad h, dtheta_batch>: this batch alone, by Rao-Blackwell
    without_preconditioner                  <grad h, -lr g>: no P, no momentum, by Rao-Blackwell
    covariance, natural_covariance, steer   from log-probabilities, entropies and advantages alone

    ratio = measured / predicted            z = |predicted - measured| / (standard error of that difference)

The last four are steps of another length (in logits, or without the optimizer's scale): of them only the sign is held
against the measurement here, and their correlation over many steps elsewhere. fixed_prefix has another estimand; it is
compared with the policy's change, which it is often taken for, and in a row of its own with the change on given tokens.
Predictions and measurement share evaluation sequences; the error of their difference leaves prompts out of both at once
(entropy_experiments.statistics.agreement), and a predictor is as good as the measurement where 0 lies in the 95% interval.
Source: entropy_core/entropy.py, entropy_core/predictors.py; docs/analyses/baselines.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.step_results import BaselineRow, BaselinesResult
from entropy_experiments.statistics.agreement import compare, estimate_of, told_from_zero
from entropy_experiments.statistics.confidence import UNTRUSTED
from entropy_experiments.statistics.jackknife_interval import ends_of

LABELS = {
    "rao_blackwell": "Rao–Blackwell",
    "split": "split",
    "score_function": "score function",
    "fixed_prefix": "fixed prefix",
    "fixed_prefix_on_given_tokens": "fixed prefix, on given tokens",
    "without_momentum": "without momentum",
    "without_preconditioner": "without P (plain gradient)",
    "covariance": "covariance (Cui et al.)",
    "natural_covariance": "covariance, natural gradient",
    "steer": "STEER",
}
ANOTHER_SCALE = ("without_preconditioner", "covariance", "natural_covariance", "steer")


def baseline_table(
    predicted: Mapping[str, Mapping[str, Any]],
    measured: Any,
    *,
    measured_fixed_prefix: Any = None,
    without_preconditioner: Any = None,
    covariance: float | None = None,
    natural_covariance: float | None = None,
    steer: float | None = None,
) -> BaselinesResult:
    """One row a predictor.

    Args:
        predicted: estimator -> part ("total", "batch") -> estimate, nats per token.
        measured: the policy's measured change, nats per token.
        measured_fixed_prefix: that on given tokens.
        without_preconditioner: an estimate.
        covariance, natural_covariance, steer: from entropy_core.predictors.

    An estimate is an object or a mapping with value (or change), standard_error and left_out ((B,) with each evaluation prompt
    left out; without it there is no z), a bare number, or None.

    Returns:
        The record that summary.json holds. Numbers are None where they are not known or not comparable, and `reason` says why;
        sign_agrees is None where the measured change is not significantly different from 0 or the prediction is 0.
    """
    by_part = {
        "without_momentum": _part(predicted, "rao_blackwell", "batch"),
        "fixed_prefix_on_given_tokens": _part(predicted, "fixed_prefix", "total"),
        "without_preconditioner": without_preconditioner,
        "covariance": covariance,
        "natural_covariance": natural_covariance,
        "steer": steer,
    }
    rows = []
    for name in LABELS:
        given = by_part[name] if name in by_part else _part(predicted, name, "total")
        rows.append(_row(name, given, measured_fixed_prefix if name == "fixed_prefix_on_given_tokens" else measured))
    return BaselinesResult(rows=rows, measured=_known(measured))


def _part(predicted: Mapping[str, Mapping[str, Any]], estimator: str, part: str) -> Any:
    return predicted.get(estimator, {}).get(part)


def _known(entry: Any) -> Estimate:
    """Of whatever form of estimate, None for what is missing or not finite; its interval has ends where its values with each
    prompt left out are known.
    """
    value, error = estimate_of(entry)

    def held(name: str) -> Any:
        return entry.get(name) if isinstance(entry, Mapping) else getattr(entry, name, None)

    left_out, size, count = held("left_out"), held("effective_sample_size"), held("sequences")
    if left_out is None or _untrusted(entry):  # weights that a few sequences carry have no known error
        return Estimate(value=value, standard_error=error, low=None, high=None, degrees_of_freedom=None)
    ends = ends_of(value, left_out, size / count if size is not None and count else 1.0)
    return Estimate(
        **{"value": value, "standard_error": error, "degrees_of_freedom": max(1, len(left_out) - 1), **ends}
    )


def _untrusted(entry: Any) -> bool:
    """Whether an estimate is of reweighted sequences of which fewer than half count."""
    names = ("effective_sample_size", "sequences")
    size, count = (entry.get(n) if isinstance(entry, Mapping) else getattr(entry, n, None) for n in names)
    return size is not None and bool(count) and size < count / 2


def _row(name: str, given: Any, actual: Any) -> BaselineRow:
    (value, own_error), (truth, error) = estimate_of(given), estimate_of(actual)
    comparable, doubtful = name not in ANOTHER_SCALE, _untrusted(actual)
    compared = compare(given, actual) if comparable and not doubtful else None
    own, found = _known(given), _known(actual)
    low, high = found.low, found.high
    if doubtful:
        told = False
    elif low is None or high is None:
        freedom = math.inf if compared is None else compared.degrees_of_freedom
        told = truth is not None and told_from_zero(truth, error, freedom) is not False
    else:
        told = not low <= 0.0 <= high
    if value is None:
        reason = "not computed"
    elif truth is None:
        reason = "not measured"
    elif doubtful:
        reason = UNTRUSTED
    elif not comparable:
        reason = "a step of another length: only its sign is compared"
    elif value == 0:
        reason = "the predicted change is 0"
    else:
        reason = "" if compared else "not known prompt by prompt on both sides, or no difference"
    return BaselineRow(
        name=name,
        label=LABELS[name],
        predicted=value,
        standard_error=own_error,
        degrees_of_freedom=own.degrees_of_freedom,
        low=own.low,
        high=own.high,
        actual=truth,
        actual_standard_error=error,
        actual_low=found.low,
        actual_high=found.high,
        ratio=truth / value if comparable and truth is not None and value else None,
        z=compared.z if compared else None,
        agrees=compared.agrees if compared else None,
        comparable_in_scale=comparable,
        sign_agrees=value * truth > 0 if told and value and truth else None,
        reason=reason,
    )
