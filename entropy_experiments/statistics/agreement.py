"""Do a prediction and a measurement agree? One rule for every command.

    shared tokens       d = predicted - measured,    d_{-p} the same with evaluation prompt p left out of both,
                        se^2 = (B - 1)/B  sum_p (d_{-p} - mean d_{-p})^2,      t = |d| / se      on B - 1 degrees of freedom,
                        below 30 prompts on fewer where some weigh more than others (.jackknife_interval)
    no shared tokens    se^2 = se_predicted^2 + se_measured^2,                 t = |d| / se      on Welch's

They agree where t is at most the 97.5% quantile of Student's t, that is, where 0 lies in the 95% interval of d. A prediction and
a measurement on the same tokens err together (correlation 0.95): in quadrature their difference would never count. Their skewness
is shared too: what is left in d is nearly symmetric, so that its interval needs no correction for skew, as theirs do.

"Agree" is absence of evidence: the interval says how large a gap the data leave possible.
Source: Efron & Stein 1981; Welch 1947; docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr

from entropy_experiments.statistics.jackknife_interval import effective_degrees_of_freedom, jackknife_interval
from entropy_experiments.text.numbers import as_number, value_and_error
from rl_training.intervals import interval, t_quantile, welch_freedom

_MANY = 30  # prompts from which Student's t keeps its level whatever the tails of a symmetric law


@dataclass(frozen=True)
class Agreement:
    """predicted - measured, its standard error, the degrees of freedom behind that, z = |difference| / standard error, the
    two-sided p-value and the 95% interval of the difference. paired: whether prompts were left out of both sides at once.
    """

    difference: float
    standard_error: float
    degrees_of_freedom: float
    z: float
    p_value: float
    low: float
    high: float
    paired: bool

    @property
    def agrees(self) -> bool:
        """Whether 0 lies in the 95% interval of the difference."""
        return self.low <= 0.0 <= self.high

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"agrees": self.agrees}


def told_from_zero(
    value: float | None,
    error: float | None,
    degrees_of_freedom: float = math.inf,
    left_out: np.ndarray | None = None,
) -> bool | None:
    """Whether 0 lies outside the 95% interval of an estimate; None where value or error are not known.

    left_out: (B,) its values with each prompt left out, which make the interval; without them it is Student's.
    """
    if value is None or error is None:
        return None
    if left_out is not None:
        ends = jackknife_interval(value, left_out)
        return None if np.isnan(ends.low) else not float(ends.low) <= 0.0 <= float(ends.high)
    return abs(value) > t_quantile(degrees_of_freedom) * error


def paired_agreement(difference: float, left_out: Sequence[float] | np.ndarray) -> Agreement | None:
    """Of sides that share their evaluation prompts. left_out: (B,) the difference with each prompt left out of both.

    None below two prompts, for values that are not finite, or for a difference without any spread.
    """
    values = np.asarray(left_out, dtype=np.float64)
    count = len(values)
    if count < 2 or not np.isfinite(values).all() or not math.isfinite(difference):
        return None
    error = math.sqrt((count - 1) / count * float(np.square(values - values.mean()).sum()))
    freedom = float(effective_degrees_of_freedom(values)) if count < _MANY else count - 1
    return _agreement(difference, error, freedom, paired=True)


def unpaired_agreement(
    predicted: tuple[float | None, float | None],
    measured: tuple[float | None, float | None],
    prompts: tuple[float, float] = (math.inf, math.inf),
) -> Agreement | None:
    """Of (value, standard error) of two sides that share no tokens. prompts: how many are behind either error.

    None where a number is not known, or both errors are 0.
    """
    (left, left_error), (right, right_error) = predicted, measured
    if left is None or right is None or left_error is None or right_error is None:
        return None
    error = math.hypot(left_error, right_error)
    freedom = welch_freedom([(left_error, prompts[0] - 1), (right_error, prompts[1] - 1)])
    return _agreement(left - right, error, freedom, paired=False)


def compare(predicted: Any, measured: Any) -> Agreement | None:
    """Of two estimates that share their evaluation prompts: objects or mappings with "value" (or "change") and "left_out", (B,)
    values with each prompt left out in the same order. None where either is not known prompt by prompt.
    """
    sides = [_value_and_left_out(side) for side in (predicted, measured)]
    if any(value is None or left_out is None for value, left_out in sides):
        return None
    (left, without), (right, other) = sides
    assert left is not None and right is not None and without is not None and other is not None
    if without.shape != other.shape:
        return None
    return paired_agreement(left - right, without - other)


def _agreement(difference: float, error: float, freedom: float, paired: bool) -> Agreement | None:
    if not error > 0:
        return None
    z = abs(difference) / error
    p_value = 2 * float(stdtr(min(freedom, 1e9), -z))
    return Agreement(difference, error, freedom, z, p_value, *interval(difference, error, freedom), paired)


def _value_and_left_out(entry: Any) -> tuple[float | None, np.ndarray | None]:
    if entry is None:
        return None, None
    if isinstance(entry, Mapping):
        value = as_number(entry.get("value", entry.get("change")))
        left_out = entry.get("left_out")
    else:
        value = as_number(getattr(entry, "value", getattr(entry, "change", None)))
        left_out = getattr(entry, "left_out", None)
    if left_out is None:
        return value, None
    return value, np.asarray(left_out.cpu() if hasattr(left_out, "cpu") else left_out, dtype=np.float64)


def estimate_of(entry: Any) -> tuple[float | None, float | None]:
    """(value, standard error) of whatever form of estimate: an object, a mapping or a bare number."""
    if hasattr(entry, "standard_error"):
        value = as_number(getattr(entry, "value", getattr(entry, "change", None)))
        error = as_number(entry.standard_error)
        return value, error if error is not None and error >= 0 else None
    if isinstance(entry, Mapping):
        return value_and_error({**entry, "value": entry.get("change", entry.get("value"))})
    return as_number(entry), None
