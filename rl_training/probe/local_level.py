"""The change of a step from noisy measurements of it and of the steps before: a level that wanders.

    x_t = x_{t-1} + N(0, q)        y_t = x_t + N(0, se_t^2)        q = mean of (innovation^2 - se_t^2 - P), never below 0

x_t is the change that step t makes, y_t what was measured of it, P the variance of x before y_t is seen. The mean forgets by
KEEP a measurement; the first START measurements are taken as they are. A level lags behind a change that grows or fades steadily,
so running sums are made of the measurements and not of the level.

Source: Kalman 1960; local level, Harvey 1989. Chosen by replay of recorded runs (benchmarks/probe_replay).
"""

from __future__ import annotations

import math

from entropy_core.uncertainty import Estimate

KEEP, START = 0.9, 3


class LocalLevel:
    """Give it one measurement after the other."""

    def __init__(self) -> None:
        self._level = self._variance = self._excess = self._weight = 0.0
        self._seen = 0

    def add(self, measured: Estimate) -> Estimate:
        """Take in a measurement (nats per token, with its standard error) and say what the step's change is.

        A measurement without an error is passed on as it is and not taken in.
        """
        noise = measured.standard_error**2
        if not (math.isfinite(measured.value) and math.isfinite(noise)):
            return measured
        self._seen += 1
        if self._seen == 1:
            self._level, self._variance = measured.value, noise
            return measured
        innovation = measured.value - self._level
        self._excess = KEEP * self._excess + innovation**2 - noise - self._variance
        self._weight = KEEP * self._weight + 1
        prior = self._variance + max(0.0, self._excess / self._weight)
        whole = self._seen <= START or prior + noise == 0
        gain = 1.0 if whole else prior / (prior + noise)
        self._level += gain * innovation
        self._variance = noise if whole else (1 - gain) * prior
        return Estimate(self._level, math.sqrt(self._variance), measured.degrees_of_freedom)
