"""The 95% interval of an estimate from its values with each prompt left out: wide enough where few prompts and skew meet.

    x_p = B t - (B - 1) t_{-p}                    pseudo-values, one a prompt
    se^2 = sum_p (x_p - mean x)^2 / (B (B - 1))   the jackknife
    1/df = 1/(B - 1) + max(0, k) / 2B             degrees of freedom behind se; k: excess kurtosis of x
    g = skewness(x) / sqrt(B)                     how far their sum is from a normal law
    t - u(B, -g) se  to  t + u(B, g) se           the interval

u is Student's quantile on B - 1 degrees of freedom where the pseudo-values are not skewed, and on the side away from the tail. On
the side of the tail it is larger: an estimate whose tail is only partly in the sample lies to the other side *and* has too small
an error (in the exact world of benchmarks/calibration.py they correlate at 0.5 to 0.9), so that Student's interval covers 80 to
88% at 4 to 16 prompts. With g near its largest value, 1, it is smaller again: one prompt is then most of the error, and what it
adds to the error is more than what the truth can lie beyond. u is a table (.reach_table), as Student's quantiles are one:
of all intervals that are nowhere shorter than Student's, the shortest that cover at least 93% (skewness 4 and more: 91%) of the
means of every law in a list that benchmarks/interval_reach.py holds. Below 8 prompts, at least 91%, and less of the heaviest.

A tail that is in fewer than 5 of B prompts on average is often not in the sample at all, and no interval made of it knows of it.
`carried_by_few` says where few prompts carry what is there.

Source: Johnson, JASA 73 (1978), and Hall, JRSS B 54 (1992), for the part of skewness; Satterthwaite 1946 for df, as
Var(s^2)/s^4 = 2/(B - 1) + k/B; docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from entropy_experiments.statistics.reach_table import COUNTS, KNOTS, REACH
from rl_training.intervals import LEVEL

FEWEST_FOR_LEVEL = 12
"""Prompts below which an interval may cover less often than it says, by ten points where the influence of prompts is skewed."""

FEWEST_DEGREES, LEAST_PART_OF_DEGREES = 8.0, 0.4
"""Degrees of freedom behind an error, and their part of the number of prompts, below which few prompts carry it."""


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
        units = np.maximum(count * np.asarray(effective, np.float64), 2.0)
        freedom = np.minimum(effective_degrees_of_freedom(left_out), units - 1)
        skewness = sample_skewness(-left_out) / count**0.5
        low, high = (
            value + sign * error * (reach(units, sign * skewness) if count >= COUNTS[0] else student_reach(units))
            for sign in (-1, 1)
        )
    nothing = np.full_like(error, np.nan)
    return JackknifeInterval(*(np.where(known, x, nothing) for x in (low, high, error, freedom)))


def reach(units: np.ndarray, skewness: np.ndarray) -> np.ndarray:
    """u(B, g), (...,): standard errors to the end on the side that positive skewness points to.

    units: (...,) prompts behind the error, at least 2. skewness: (...,) over the square root of the number of prompts. Linear
    between the table's rows in 1/sqrt(B), to 1.96 at infinitely many; nowhere less than Student's.
    """
    units, skewness = np.broadcast_arrays(np.asarray(units, np.float64), np.clip(skewness, -1.0, 1.0))
    counts = np.array([*COUNTS, np.inf])
    table = np.vstack([REACH, np.full(len(KNOTS), stdtrit(1e9, 0.5 + LEVEL / 2))])
    places = 1 / np.sqrt(counts)  # descending
    at = np.clip(1 / np.sqrt(units), 0.0, places[0])
    row = np.clip(np.searchsorted(-places, -at, side="right") - 1, 0, len(places) - 2)
    column = np.clip(np.searchsorted(KNOTS, skewness, side="right") - 1, 0, len(KNOTS) - 2)
    knots = np.array(KNOTS)
    down = (places[row] - at) / (places[row] - places[row + 1])
    across = (skewness - knots[column]) / (knots[column + 1] - knots[column])
    above, below = (
        (1 - across) * table[r, column] + across * table[r, column + 1] for r in (row, row + 1)
    )  # fmt: skip
    found = (1 - down) * above + down * below
    return np.maximum(found, student_reach(units))


def student_reach(units: np.ndarray) -> np.ndarray:
    """(...,) Student's quantile on one degree of freedom less than there are units."""
    return stdtrit(np.maximum(np.asarray(units, np.float64) - 1, 1.0), 0.5 + LEVEL / 2)


def carried_by_few(degrees_of_freedom: float, prompts: float) -> bool:
    """Whether so few of the prompts carry an error that other prompts may tell another number.

    True of at most 2% of samples of a normal law, 25% of an exponential one at 16 prompts and 3% at 64; of 58 to 70% where the
    skewness is 30 (lognormal, sigma 1.5), and of 60 to 78% in the exact world in which rare completions carry the influence.
    """
    return degrees_of_freedom < min(FEWEST_DEGREES, LEAST_PART_OF_DEGREES * (prompts - 1))


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


def sample_skewness(values: np.ndarray) -> np.ndarray:
    """(...,) adjusted sample skewness of (..., B) values; 0 below three, or without spread."""
    n = values.shape[-1]
    if n < 3:
        return np.zeros(values.shape[:-1])
    deviations = values - values.mean(-1, keepdims=True)
    variance = np.square(deviations).mean(-1)
    found = (deviations**3).mean(-1) / variance**1.5 * np.sqrt(n * (n - 1)) / (n - 2)
    return np.where(np.isfinite(found), found, 0.0)
