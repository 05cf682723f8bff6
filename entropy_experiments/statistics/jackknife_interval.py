"""The 95% interval of an estimate from its values with each prompt left out: wide enough where few prompts and skew meet.

    x_p = B t - (B - 1) t_{-p}                    pseudo-values: as many as prompts, their mean is t but for the ratio's bias
    se^2 = sum_p (x_p - mean x)^2 / (B (B - 1))   the jackknife
    1/df = 1/(B - 1) + max(0, k) / 2B             k: excess kurtosis of x; Satterthwaite's, as Var(s^2)/s^4 = 2/(B - 1) + k/B
    g(z) = z + G z^2 / 3 sqrt(B) + G^2 z^3 / 27 B + G / 6 sqrt(B)     z = (t - truth)/se,  G: skewness of x

Student's interval |z| <= q(df) assumes that mean and spread are independent. With skewness they are not: where the long tail
is not in the sample, the estimate lies to one side *and* its error is too small, which costs 0.25 G^2/B of coverage (six
points at 16 prompts and the skewness of an exponential). |g(z)| <= q(df) is Hall's interval, right to second order, longer on the
side of the tail. From B prompts G and k are themselves uncertain, so that each end is the wider one of the two; with many prompts
both are Student's. It stays below 95% where a tail is rarer than one prompt in B: how far is in benchmarks/results/calibration.

Source: Satterthwaite 1946; Johnson, JASA 73 (1978); Hall, JRSS B 54 (1992); docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from rl_training.intervals import LEVEL

FEWEST_FOR_LEVEL = 12
"""Prompts below which an interval may cover less often than it says, by ten points where the influence of prompts is skewed."""


@dataclass(frozen=True)
class JackknifeInterval:
    """low and high, the standard error and the degrees of freedom behind it, floats or arrays of one shape.

    NaN where nothing is known: a single prompt, or values that are not finite.
    """

    low: np.ndarray
    high: np.ndarray
    standard_error: np.ndarray
    degrees_of_freedom: np.ndarray

    def holds(self, truth: float | np.ndarray) -> np.ndarray:
        return (self.low <= truth) & (truth <= self.high)

    def as_dict(self) -> dict[str, float | None]:
        """ "low", "high" and "degrees_of_freedom" for JSON, None for what is not known. Of a single estimate."""
        names = ("low", "high", "degrees_of_freedom")
        return {name: v if np.isfinite(v := float(getattr(self, name))) else None for name in names}


def jackknife_interval(
    value: float | np.ndarray,
    left_out: np.ndarray,
    effective: float | np.ndarray = 1.0,
    level: float = LEVEL,
) -> JackknifeInterval:
    """Of estimates (...,) and their values with each of B prompts left out (..., B).

    effective: of reweighted sequences, their effective sample size over their number; no more than B times as many prompts are
    behind the error then.
    """
    value, left_out = np.asarray(value, np.float64), np.asarray(left_out, np.float64)
    count = left_out.shape[-1]
    if count < 2:
        return JackknifeInterval(*[np.full(left_out.shape[:-1], np.nan)] * 4)
    known = np.isfinite(left_out).all(-1) & np.isfinite(value)
    with np.errstate(all="ignore"):
        error = np.sqrt((count - 1) / count * np.square(left_out - left_out.mean(-1, keepdims=True)).sum(-1))
        units = np.maximum(count * np.asarray(effective, np.float64) - 1, 1.0)
        skewness, freedom = _skewness(-left_out), np.minimum(effective_degrees_of_freedom(left_out), units)
        reach = stdtrit(freedom, 0.5 + level / 2)
        # The ends of Hall's interval, z at g(z) = +-reach; (1 + a z)^3 = 1 + 3a(g - shift) for a = G/(3 sqrt B).
        bend, shift = skewness / (3 * count**0.5), skewness / (6 * count**0.5)
        low = value - error * np.maximum(reach, _inverse(reach, bend, shift))
        high = value + error * np.maximum(reach, -_inverse(-reach, bend, shift))
    nothing = np.full_like(error, np.nan)
    return JackknifeInterval(*(np.where(known, x, nothing) for x in (low, high, error, freedom)))


def ends_of(value: float | None, left_out: object, effective: float = 1.0) -> dict[str, float | None]:
    """ "low", "high" and "degrees_of_freedom" of an estimate, as every sentence, table and figure shows it; {} where the values
    with each prompt left out, (B,) as a tensor or an array, are not known.
    """
    if value is None or left_out is None:
        return {}
    return jackknife_interval(value, np.asarray(left_out, np.float64), effective).as_dict()


def effective_degrees_of_freedom(values: np.ndarray) -> np.ndarray:
    """(...,) of the variance of (..., B) values: B - 1, and fewer (at least 1) where some weigh much more than the others.

    Any affine image of the values has as many: pseudo-values and values with each prompt left out alike.
    """
    values = np.asarray(values, np.float64)
    n = values.shape[-1]
    if n < 4:
        return np.full(values.shape[:-1], float(max(n - 1, 1)))
    deviations = values - values.mean(-1, keepdims=True)
    variance = np.square(deviations).mean(-1)
    with np.errstate(all="ignore"):
        plain = (deviations**4).mean(-1) / np.square(variance) - 3
        excess = ((n + 1) * plain + 6) * (n - 1) / ((n - 2) * (n - 3))  # unbiased for a normal law
    excess = np.where(np.isfinite(excess), np.maximum(excess, 0.0), 0.0)
    return np.maximum(1 / (1 / (n - 1) + excess / (2 * n)), 1.0)


def _skewness(values: np.ndarray) -> np.ndarray:
    """(...,) adjusted sample skewness of (..., B) values; 0 below three, or without spread."""
    n = values.shape[-1]
    if n < 3:
        return np.zeros(values.shape[:-1])
    deviations = values - values.mean(-1, keepdims=True)
    variance = np.square(deviations).mean(-1)
    found = (deviations**3).mean(-1) / variance**1.5 * np.sqrt(n * (n - 1)) / (n - 2)
    return np.where(np.isfinite(found), found, 0.0)


def _inverse(target: np.ndarray, bend: np.ndarray, shift: np.ndarray) -> np.ndarray:
    straight = np.abs(bend) < 1e-9
    safe = np.where(straight, 1.0, bend)
    return np.where(straight, target - shift, (np.cbrt(1 + 3 * safe * (target - shift)) - 1) / safe)
