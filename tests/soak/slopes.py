"""Whether a quantity grows over many repetitions, with the noise of the answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entropy_experiments.statistics.series_regression import fit_series

_BLOCKS = 24
"""Means that a series is cut into: neighbours of these hardly err alike, and what is left of it the fit allows for."""


@dataclass(frozen=True)
class Slope:
    """per_item: growth for one repetition, with the ends of its 95% interval. mean: of the series, without its beginning."""

    per_item: float
    low: float
    high: float
    mean: float

    @property
    def grows(self) -> bool:
        """By more than its noise and, over as many repetitions again, by more than rounding."""
        return self.low > 0


def slope(values: list[float], skipped: float = 0.25) -> Slope:
    """Of a series of one value a repetition. skipped: the share at its beginning in which caches fill."""
    series = np.asarray(values[int(len(values) * skipped) :], dtype=np.float64)
    blocks = np.array_split(series, min(_BLOCKS, len(series)))
    ends = np.cumsum([len(block) for block in blocks])
    middles = ends - np.array([len(block) for block in blocks]) / 2
    means = np.array([block.mean() for block in blocks])
    if np.ptp(means) == 0:
        return Slope(0.0, 0.0, 0.0, float(series.mean()))
    found = fit_series(np.stack([np.ones_like(middles), middles], 1), means).curve(np.array([[0.0, 1.0]]))
    return Slope(float(found.value[0]), float(found.low[0]), float(found.high[0]), float(series.mean()))
