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

from entropy_experiments.statistics.agreement import compare, estimate_of, told_from_zero
from entropy_experiments.statistics.confidence import ALIKE, BRACKETS, DISAGREE, shown
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
) -> dict[str, Any]:
    """One row a predictor.

    predicted: estimator -> part ("total", "batch") -> estimate, nats per token, as in AnalysisNumbers.predicted or
    summary.json. measured: the policy's measured change, nats per token; measured_fixed_prefix: that on given tokens.
    An estimate is an object or a mapping with value (or change), standard_error and left_out ((B,) with each evaluation prompt
    left out; without it there is no z), a bare number, or None. The last three come from entropy_core.predictors.

    Keys: `rows`, a list of {name, label, predicted, standard_error, degrees_of_freedom, actual, actual_standard_error, ratio, z,
    agrees, comparable_in_scale, sign_agrees, reason}; numbers are None where they are not known or not comparable, `reason` says
    why ("" where all is there), and sign_agrees is None where the measured change cannot be told from 0 or the prediction
    is 0. `measured` {value, standard_error}, `sentence`.
    """
    by_part = {
        "without_momentum": _part(predicted, "rao_blackwell", "batch"),
        "fixed_prefix_on_given_tokens": _part(predicted, "fixed_prefix", "total"),
        "without_preconditioner": without_preconditioner,
        "covariance": covariance,
        "natural_covariance": natural_covariance,
        "steer": steer,
    }
    policy, rows = _known(measured), []
    for name in LABELS:
        given = by_part[name] if name in by_part else _part(predicted, name, "total")
        rows.append(_row(name, given, measured_fixed_prefix if name == "fixed_prefix_on_given_tokens" else measured))
    result = {"rows": rows, "measured": policy}
    return result | {"sentence": _sentence(rows, policy)}


def _part(predicted: Mapping[str, Mapping[str, Any]], estimator: str, part: str) -> Any:
    return predicted.get(estimator, {}).get(part)


def _known(entry: Any) -> dict[str, float | None]:
    """{value, standard_error, degrees_of_freedom} of whatever form of estimate, None for what is missing or not finite; with
    low and high, the ends of its interval, where its values with each prompt left out are known.
    """
    value, error = estimate_of(entry)

    def held(name: str) -> Any:
        return entry.get(name) if isinstance(entry, Mapping) else getattr(entry, name, None)

    left_out, size, count = held("left_out"), held("effective_sample_size"), held("sequences")
    found: dict[str, float | None] = {"value": value, "standard_error": error, "degrees_of_freedom": None}
    if left_out is None:
        return found
    if size is not None and count and size < count / 2:  # weights that a few sequences carry have no known error
        return found | {"low": None, "high": None}
    found["degrees_of_freedom"] = max(1, len(left_out) - 1)
    return found | ends_of(value, left_out, size / count if size is not None and count else 1.0)


def _row(name: str, given: Any, actual: Any) -> dict[str, Any]:
    (value, own_error), (truth, error) = estimate_of(given), estimate_of(actual)
    comparable = name not in ANOTHER_SCALE
    compared = compare(given, actual) if comparable else None
    known = _known(actual)
    low, high = known.get("low"), known.get("high")
    if low is None or high is None:
        freedom = math.inf if compared is None else compared.degrees_of_freedom
        told = truth is not None and told_from_zero(truth, error, freedom) is not False
    else:
        told = not low <= 0.0 <= high
    if value is None:
        reason = "not computed"
    elif truth is None:
        reason = "not measured"
    elif not comparable:
        reason = "a step of another length: only its sign is compared"
    elif value == 0:
        reason = "the predicted change is 0"
    else:
        reason = "" if compared else "not known prompt by prompt on both sides, or no difference"
    return {
        "name": name,
        "label": LABELS[name],
        "predicted": value,
        "standard_error": own_error,
        **{key: number for key, number in _known(given).items() if key in ("degrees_of_freedom", "low", "high")},
        "actual": truth,
        "actual_standard_error": error,
        **{f"actual_{end}": known[end] for end in ("low", "high") if end in known},
        "ratio": truth / value if comparable and truth is not None and value else None,
        "z": compared.z if compared else None,
        "agrees": compared.agrees if compared else None,
        "comparable_in_scale": comparable,
        "sign_agrees": value * truth > 0 if told and value and truth else None,
        "reason": reason,
    }


def _sentence(rows: list[dict[str, Any]], measured: dict[str, float | None]) -> str:
    if measured["value"] is None:
        return "No change of entropy was measured, so no predictor can be held against it."
    text = f"The measured change was {shown(measured)} nats per token ({BRACKETS})"
    judged = [row for row in rows if row["z"] is not None and row["name"] != "fixed_prefix_on_given_tokens"]
    near, far = ([row["label"] for row in judged if row["agrees"] is within] for within in (True, False))
    if judged:
        text += f"; it and the predictor {ALIKE}: {_listed(near)}; they {DISAGREE}: {_listed(far)}"
    signed = [row for row in rows if not row["comparable_in_scale"] and row["predicted"] is not None]
    right, wrong = ([row["label"] for row in signed if row["sign_agrees"] is same] for same in (True, False))
    if right or wrong:
        text += f". Of those on another scale, with its sign: {_listed(right)}; with the other: {_listed(wrong)}"
    elif signed:
        text += ", too near to 0 for its sign to be compared"
    return text + "."


def _listed(labels: list[str]) -> str:
    return ", ".join(labels) if labels else "none"
