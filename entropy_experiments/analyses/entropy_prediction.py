"""Does the first order predict the change of entropy, and up to what size of step?

    predicted(s) = s <grad h, dtheta>            by each estimator of grad h, with its standard error
    measured(s)  = h(theta + s dtheta) - h(theta)            reweighted on the same tokens (SNIS), on fresh samples, or exact

    ratio        = measured / predicted, with its sign; a denominator whose 95% interval holds 0 is marked
    agrees       whether 0 lies in the 95% interval of predicted - measured (entropy_experiments.statistics.agreement)
    departure(s) = |measured - predicted| / max(|measured|, |predicted|)   of the split estimator against SNIS

The split estimator is the derivative of the reweighted measurement on the same tokens: their departure is made of higher orders
alone. How large these are differs from prompt to prompt, so that it has an error of its own, that of their difference.
Fixed-prefix predictions are compared with fixed-prefix measurements alone: another estimand. Units: nats per token.
Source: docs/analyses/entropy-prediction.md, docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.step_results import (
    Departure,
    EntropyPredictionResult,
    Estimator,
    FirstOrderRange,
    MeasuredAtScale,
    MeasureKind,
    PredictionComparison,
    PredictionRow,
)
from entropy_experiments.statistics.agreement import compare, estimate_of, told_from_zero, unpaired_agreement
from entropy_experiments.statistics.jackknife_interval import ends_of
from entropy_experiments.text.numbers import as_number, value_and_error
from rl_training.intervals import interval

COMPARISONS: dict[MeasureKind, tuple[Estimator, ...]] = {
    "snis": ("rao_blackwell", "split", "score_function"),
    "fresh": ("rao_blackwell", "split", "score_function"),
    "exact": ("rao_blackwell", "split", "score_function"),
    "fixed_prefix": ("fixed_prefix",),
}
"""kind of measurement -> the estimators that predict what it measures."""
TOLERANCE = 0.1


def compare_prediction(
    predicted: Mapping[str, Any], measured: Sequence[Mapping[str, Any]], resolution: float = 0.0
) -> EntropyPredictionResult:
    """First order against measurement at every scale of the step.

    Args:
        predicted: estimator -> {"value", "standard_error", "left_out"} at s = 1, or a number; nats per token.
        measured: one mapping a scale with "scale" and any of "snis", "fresh", "exact", "fixed_prefix": each {"change",
            "standard_error", "left_out", "effective_sample_size", "sequences"} (the last two for snis), a number, or None.
            left_out: (B,) with each evaluation prompt left out; without those of both sides nothing is said of their agreement,
            but against exact numbers.
        resolution: the smallest change that exceeds rounding, nats per token.

    Returns:
        The record that summary.json holds, scales ascending. trustworthy says whether the effective sample size is at least half
        of the sequences.

    Raises:
        ValueError: a scale that is not positive or is given twice.
    """
    scales = [as_number(row.get("scale")) for row in measured]
    if any(s is None or s <= 0 for s in scales) or len(set(scales)) != len(scales):
        raise ValueError(f"scales must be positive and all different, not {scales}")
    known = {name: _estimate(entry) for name, entry in predicted.items() if estimate_of(entry)[0] is not None}
    rows = [_row(row, known) for row in sorted(measured, key=lambda row: row["scale"])]
    return EntropyPredictionResult(unit="nats per token", rows=rows, first_order=_first_order(rows, resolution))


@dataclass(frozen=True)
class _Known:
    value: float
    standard_error: float | None
    left_out: np.ndarray | None

    @property
    def freedom(self) -> int | None:
        """Degrees of freedom behind the error; None where prompts were not left out."""
        return None if self.left_out is None else max(1, len(self.left_out) - 1)

    def scaled(self, s: float) -> _Known:
        error, left_out = self.standard_error, self.left_out
        return _Known(s * self.value, None if error is None else s * error, None if left_out is None else s * left_out)


def _estimate(entry: Any) -> _Known:
    value, error = estimate_of(entry)
    left_out = entry.get("left_out") if isinstance(entry, Mapping) else None
    return _Known(value or 0.0, error, None if left_out is None else np.asarray(left_out, dtype=np.float64))


def _row(given: Mapping[str, Any], estimates: Mapping[str, _Known]) -> PredictionRow:
    scale = float(given["scale"])
    at_scale = {name: entry.scaled(scale) for name, entry in estimates.items()}
    measured = {kind: _measurement(given[kind]) for kind in COMPARISONS if given.get(kind) is not None}
    return PredictionRow(
        scale=scale,
        predicted={name: _record(entry) for name, entry in at_scale.items()},
        measured=measured,
        comparisons=[
            _comparison(name, kind, at_scale[name], given[kind], found.trustworthy is not False)
            for kind, found in measured.items()
            for name in COMPARISONS[kind]
            if name in at_scale and found.value is not None
        ],
    )


def _record(entry: _Known, effective: float = 1.0) -> Estimate:
    known = {"value": entry.value, "standard_error": entry.standard_error, "degrees_of_freedom": entry.freedom}
    return Estimate(**known | _ends(entry, effective))


def _ends(entry: _Known, effective: float = 1.0) -> dict[str, float | None]:
    """Of its interval: a normal one where its values with each prompt left out are not known."""
    if entry.left_out is None and entry.standard_error is not None:
        return dict(zip(("low", "high"), interval(entry.value, entry.standard_error, math.inf), strict=True))
    return ends_of(entry.value, entry.left_out, effective)


def _measurement(entry: Any) -> MeasuredAtScale:
    if isinstance(entry, Mapping):
        value, error = estimate_of(entry)
        size, count = as_number(entry.get("effective_sample_size")), as_number(entry.get("sequences"))
    else:
        (value, error), size, count = value_and_error(entry), None, None
    trust = None if size is None or count is None else size >= count / 2
    own = _estimate(entry)
    known: dict[str, Any] = {"value": value, "standard_error": error, "degrees_of_freedom": own.freedom}
    if trust is False:  # weights that a few sequences carry have no known error
        known |= dict.fromkeys(("low", "high", "degrees_of_freedom"))
    else:
        known |= _ends(own, 1.0 if size is None or not count else size / count)
    return MeasuredAtScale(**known, effective_sample_size=size, trustworthy=trust)


def _comparison(
    name: Estimator, kind: MeasureKind, predicted: _Known, entry: Any, trusted: bool
) -> PredictionComparison:
    """trusted: nothing is said of the agreement with a measurement whose error is not known."""
    compared = None
    found, value, error = _estimate(entry), predicted.value, predicted.standard_error
    prompts = math.inf if predicted.left_out is None else len(predicted.left_out)
    if kind == "exact":
        compared = unpaired_agreement((value, error), (found.value, 0.0), (prompts, math.inf))
    elif trusted:
        compared = compare(asdict(predicted), asdict(found))
    told = told_from_zero(value, error, prompts - 1, predicted.left_out)
    numbers = dict.fromkeys(("standard_error", "degrees_of_freedom", "z", "p_value", "low", "high", "agrees"))
    if compared is not None:
        numbers |= {key: number for key, number in compared.as_dict().items() if key in numbers}
        if math.isinf(compared.degrees_of_freedom):
            numbers["degrees_of_freedom"] = None
    return PredictionComparison(
        estimator=name,
        measure=kind,
        ratio=found.value / value if value != 0 else None,
        near_zero=value == 0 or told is False,
        difference=value - found.value,
        **numbers,
        reason="the predicted change is exactly 0" if value == 0 else "",
    )


def _first_order(rows: Sequence[PredictionRow], resolution: float) -> FirstOrderRange:
    # The first has no sampling error between its sides; the others need exact numbers or a long step to say anything.
    sides: tuple[tuple[Estimator, MeasureKind], ...] = (
        ("split", "snis"),
        ("rao_blackwell", "exact"),
        ("fixed_prefix", "fixed_prefix"),
    )
    for estimator, kind in sides:
        known = [row for row in rows if estimator in row.predicted and kind in row.measured]
        pairs = [(row.scale, row.predicted[estimator].value, row.measured[kind]) for row in known]
        if any(found.value is not None for _, _, found in pairs):
            break
    else:
        reason = "no prediction and measurement of the same quantity were given"
        return FirstOrderRange(
            estimator=None, measure=None, tolerance=TOLERANCE, departures=[], holds_to=None, fails_at=None, crossing=None,
            reason=reason,
        )  # fmt: skip
    departures = []
    for scale, value, found in pairs:
        if value is not None and found.value is not None:
            gap, size = abs(found.value - value), max(abs(found.value), abs(value))
            departure = 0.0 if gap <= resolution or size == 0 else gap / size
            departures.append(Departure(scale=scale, departure=departure, trustworthy=found.trustworthy))
    usable = [d for d in departures if d.trustworthy is not False]
    failing = next((place for place, d in enumerate(usable) if d.departure > TOLERANCE), None)
    holds_to = fails_at = crossing = None
    if failing is None:
        holds_to = usable[-1].scale if usable else None
    else:
        fails_at = usable[failing].scale
        if failing:
            below, above = usable[failing - 1], usable[failing]
            logs = [math.log(max(d.departure, 1e-6)) for d in (below, above)]
            part = (math.log(TOLERANCE) - logs[0]) / (logs[1] - logs[0])
            holds_to = below.scale
            crossing = float(below.scale * (above.scale / below.scale) ** part)
    return FirstOrderRange(
        estimator=estimator,
        measure=kind,
        tolerance=TOLERANCE,
        departures=departures,
        holds_to=holds_to,
        fails_at=fails_at,
        crossing=crossing,
        reason="" if usable else "no measurement has an effective sample size of half of the sequences",
    )


def prediction_rows(measured: Sequence[Any], fresh: Mapping[float, Any] | None = None) -> list[dict[str, Any]]:
    """The `measured` of `compare_prediction` from an analysis's MeasuredScale objects; fresh: scale -> measurement, if any."""
    rows = []
    for entry in measured:
        row: dict[str, Any] = {"scale": float(entry.scale)}
        found = {"snis": entry.snis, "fixed_prefix": entry.fixed_prefix, "fresh": (fresh or {}).get(entry.scale)}
        for kind, m in found.items():
            row[kind] = None if m is None else _as_row(m)
        rows.append(row)
    return rows


def _as_row(measurement: Any) -> dict[str, Any]:
    error, left_out = float(measurement.standard_error), getattr(measurement, "left_out", None)
    return {
        "change": float(measurement.change),
        "left_out": None if left_out is None else left_out.cpu().numpy(),
        "standard_error": error if np.isfinite(error) else None,
        "effective_sample_size": float(measurement.effective_sample_size),
        "sequences": int(measurement.sequences),
    }
