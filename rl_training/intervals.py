"""The 95% interval of an estimate: one rule for every figure, sentence and log line. No torch:
reports are made anywhere.

    value -+ t(df) se               t: the 97.5% quantile of Student's t on df degrees of freedom
    df = B - 1                      of a jackknife over B prompts, of a sum over B equal folds
    df = se^4 / sum se_k^4/df_k     of a sum of independent terms, se^2 = sum se_k^2
    tanh(z -+ t(n - 1) se_z)        of a correlation r of n pairs, z = artanh(r), its error by a jackknife over pairs;
                                    of few pairs at least tanh(z -+ 1.96/sqrt(n - 3))

An error from four prompts is itself uncertain: 95% of intervals hold the truth at 3.2 of them, not
at 2.
Source: Student 1908; Fisher 1921; Welch 1947; docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
MANY_PAIRS = 8


@lru_cache(maxsize=4096)
def t_quantile(degrees_of_freedom: float, level: float = LEVEL) -> float:
    """How many standard errors a two-sided interval of this level reaches: 12.7, 4.3, 3.2, ...
    1.96.

    At least one degree.
    """
    return float(stdtrit(min(max(degrees_of_freedom, 1.0), 1e9), 0.5 + level / 2))


def interval(value: float, standard_error: float, degrees_of_freedom: float) -> tuple[float, float]:
    """(low, high) of the 95% interval of an estimate."""
    reach = t_quantile(degrees_of_freedom) * standard_error
    return value - reach, value + reach


def welch_freedom(terms: Iterable[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of independent terms, (standard error, degrees of freedom) each;
    infinite for exact ones.
    """
    known = [(error, freedom) for error, freedom in terms if error > 0]
    total = math.hypot(*(error for error, _ in known))
    shares = sum((error / total) ** 4 / max(freedom, 1.0) for error, freedom in known)
    return 1 / shares if shares > 0 else math.inf


def correlation_interval(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """(low, high) of the correlation of (n,) pairs, taken as independent; -1 to 1 below four, the
    correlation itself at +-1.

    A jackknife over pairs holds for heavy tails too, where Fisher's interval covers 89% (t with 5
    degrees of freedom, 100 pairs); of fewer than MANY_PAIRS it is the wider of both.
    """
    count = len(left)
    if count < 4:
        return -1.0, 1.0
    r = float(np.clip(np.corrcoef(left, right)[0, 1], -1.0, 1.0))
    if abs(r) >= 1 - 1e-12:
        return r, r
    z, others = math.atanh(r), np.arctanh(_without_each_pair(np.asarray(left, float), np.asarray(right, float)))
    error = math.sqrt((count - 1) / count * float(np.square(others - others.mean()).sum()))
    reach = t_quantile(count - 1) * error
    if count < MANY_PAIRS or not math.isfinite(reach):
        reach = max(reach if math.isfinite(reach) else 0.0, t_quantile(math.inf) / math.sqrt(count - 3))
    return math.tanh(z - reach), math.tanh(z + reach)


def _without_each_pair(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(n,) correlations with each of n pairs left out, short of +-1."""
    count = len(left)
    x, y = left - left.mean(), right - right.mean()
    # Leaving out pair p takes n/(n - 1) x_p y_p from the sum of products around the means.
    xy, xx, yy = (total.sum() - count / (count - 1) * total for total in (x * y, x * x, y * y))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = xy / np.sqrt(xx * yy)
    return np.clip(found, -1 + 1e-12, 1 - 1e-12)
