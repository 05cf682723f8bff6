"""The change of a step from noisy measurements of it and of the steps before: a level that wanders.

    x_t = x_{t-1} + N(0, q)        y_t = x_t + N(0, se_t^2)        y = dh / h, relative changes
    q = max( (0.2 x)^2 , mean of (innovation^2 - se_t^2 - P) )

x_t is the relative change that step t makes, y_t what was measured of it, P the variance of x before y_t is seen. The mean
forgets by KEEP a measurement; the first innovation is taken whole. Relative changes of a policy that collapses stay alike where
changes shrink. A level lags behind what grows or fades, so running sums are made of the measurements and not of the level.

Source: Kalman 1960; local level, Harvey 1989. Chosen by replay of recorded runs (benchmarks/probe_replay).
"""

from __future__ import annotations

import math

from entropy_core.uncertainty import Estimate

KEEP, WANDERS = 0.95, 0.2


class LocalLevel:
    """Give it one measurement after the other."""

    def __init__(self) -> None:
        self._level = self._variance = self._excess = self._weight = 0.0
        self._seen = 0

    def add(self, measured: Estimate, entropy: float) -> Estimate:
        """Take in a measurement and say what the step's change is.

        Args:
            measured: in nats per token; without an error it is passed on as it is and not taken in.
            entropy: h of the sequences that it was measured on, nats per token.

        Returns:
            In nats per token, with the measurement's degrees of freedom.
        """
        scale = max(abs(entropy), 1e-6) if math.isfinite(entropy) else 1.0
        value, noise = measured.value / scale, (measured.standard_error / scale) ** 2
        if not (math.isfinite(value) and math.isfinite(noise)):
            return measured
        self._seen += 1
        if self._seen == 1:
            self._level, self._variance = value, noise
            return measured
        innovation = value - self._level
        self._excess = KEEP * self._excess + innovation**2 - noise - self._variance
        self._weight = KEEP * self._weight + 1
        prior = self._variance + max((WANDERS * self._level) ** 2, self._excess / self._weight)
        whole = self._seen == 2 or prior + noise == 0
        gain = 1.0 if whole else prior / (prior + noise)
        self._level += gain * innovation
        self._variance = noise if whole else (1 - gain) * prior
        return Estimate(self._level * scale, math.sqrt(self._variance) * scale, measured.degrees_of_freedom)
