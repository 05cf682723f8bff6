"""A correlation with its interval (six pairs at 0.44 say anything from -0.58 to 0.92).

By a jackknife over pairs on Fisher's scale (rl_training.intervals), n pairs, n at least 4. It takes pairs as independent; those
of successive steps that move alike make it too narrow: where neighbours correlate at 0.6, 30 pairs cover 85%.
Source: Fisher 1921; docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rl_training.intervals import correlation_interval

_FEWEST = 4


@dataclass(frozen=True)
class Correlation:
    """r of n pairs and its 95% interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        low, high = (f"{end:.2f}".replace("-", "\N{MINUS SIGN}") for end in (self.low, self.high))
        value = f"{self.value:.2f}".replace("-", "\N{MINUS SIGN}")
        return f"{value}, 95% interval {low} to {high}"


def correlation(left: np.ndarray, right: np.ndarray) -> Correlation | None:
    """Pearson's r of (n,) pairs without NaN; None below four of them, or where a side does not vary."""
    if len(left) < _FEWEST or min(np.ptp(left), np.ptp(right)) == 0:
        return None
    value = float(np.clip(np.corrcoef(left, right)[0, 1], -1.0, 1.0))
    return Correlation(value, *correlation_interval(left, right), len(left))
