"""The 95% interval of an estimate: one rule for every figure, sentence and log line. No torch: reports are made anywhere.

    value -+ t(df) se               t: the 97.5% quantile of Student's t on df degrees of freedom
    df = B - 1                      of a jackknife over B prompts, of a sum over B equal folds
    df = se^4 / sum se_k^4/df_k     of a sum of independent terms, se^2 = sum se_k^2
    tanh(artanh(r) -+ 1.96/sqrt(n - 3))      of a correlation r of n pairs

An error from four prompts is itself uncertain: 95% of intervals hold the truth at 3.2 of them, not at 2.
Source: Student 1908; Fisher 1921; Welch 1947; docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from scipy.special import stdtrit

LEVEL = 0.95


@lru_cache(maxsize=4096)
def t_quantile(degrees_of_freedom: float, level: float = LEVEL) -> float:
    """How many standard errors a two-sided interval of this level reaches: 12.7, 4.3, 3.2, ... 1.96. At least one degree."""
    return float(stdtrit(min(max(degrees_of_freedom, 1.0), 1e9), 0.5 + level / 2))


def interval(value: float, standard_error: float, degrees_of_freedom: float) -> tuple[float, float]:
    """(low, high) of the 95% interval of an estimate."""
    reach = t_quantile(degrees_of_freedom) * standard_error
    return value - reach, value + reach


def welch_freedom(terms: Iterable[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of independent terms, (standard error, degrees of freedom) each; infinite for exact ones."""
    known = [(error, freedom) for error, freedom in terms if error > 0]
    total = math.hypot(*(error for error, _ in known))
    shares = sum((error / total) ** 4 / max(freedom, 1.0) for error, freedom in known)
    return 1 / shares if shares > 0 else math.inf


def correlation_interval(r: float, pairs: int) -> tuple[float, float]:
    """(low, high) of a correlation of so many pairs, taken as independent; -1 to 1 below four."""
    if pairs < 4:
        return -1.0, 1.0
    if abs(r) >= 1 - 1e-12:
        return r, r
    reach = t_quantile(math.inf) / math.sqrt(pairs - 3)
    return math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)
