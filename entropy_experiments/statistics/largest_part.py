"""Which of several parts of one number is the largest in size, decided by the paired difference.

    d(k, -+) = s_l x_l -+ x_k       l: the part of the largest |x|, s_l its sign, k: any other

x_l is the largest where both intervals of d (.jackknife_interval: every prompt left out of both sides at once) lie above 0 for
all k: then |x_l| > |x_k| whatever the sign of x_k. Parts share their evaluation prompts and err together, so that their own
intervals overlap long before the order is in doubt. It is an intersection-union test: no correction for the number of parts is
due, and where two parts tie it names one in at most 5% of buffers (2.5% for either).
Source: Berger, Technometrics 24 (1982); docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from entropy_experiments.statistics.jackknife_interval import jackknife_interval


@dataclass(frozen=True)
class LargestPart:
    """The part of the largest size, the one that comes nearest to it, by how much it is larger, and the 95% interval of that.

    low, high: of the difference in size of the two, with the sign of the smaller one that leaves the lower end lower.
    """

    part: str
    beside: str
    difference: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether it is larger than every other beyond the error of the difference."""
        return self.low > 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"certain": self.certain}


def largest_part(parts: Mapping[str, tuple[float, np.ndarray]]) -> LargestPart | None:
    """parts: name -> (value, (B,) the value with each prompt left out). Parts that are exactly 0 are never nearest.

    None where fewer than two parts move, or where a spread is not known.
    """
    moving = {name: part for name, part in parts.items() if part[0] != 0.0 or np.any(part[1])}
    if len(moving) < 2:
        return None
    first = max(moving, key=lambda name: abs(moving[name][0]))
    sign = -1.0 if moving[first][0] < 0 else 1.0
    found = []
    for name, (value, left_out) in moving.items():
        if name == first:
            continue
        for other in (-1.0, 1.0):
            size, series = (sign * np.asarray(a, np.float64) + other * np.asarray(b, np.float64)
                            for a, b in zip(moving[first], (value, left_out), strict=True))  # fmt: skip
            ends = jackknife_interval(size, series)
            if np.isnan(ends.low):
                return None
            found.append(LargestPart(first, name, float(size), float(ends.low), float(ends.high)))
    return min(found, key=lambda one: one.low)
