"""The entropy curve without its noise, its slope, and when it reaches a floor: a Kalman filter over what the probe logs.

    h_{t+1} = h_t + u_t        u_t = s_t + eta_t        s_{t+1} = s_t + xi_t        eta ~ N(0, q_h), xi ~ N(0, q_s)
    seen at step t:  entropy = h_t + noise,  each change (watched, or measured and predicted) = u_t + noise

with the standard errors that are logged beside them. How rough the curve is (q_h, q_s) is not known: a filter runs for every pair
of a grid, and their answers are averaged with weights of their likelihood, older steps of which fade, so that the answer adapts
where a curve turns. The time to the floor is the first k at which h_{t+k} is below it with probability one half; its band the
first at which that is 10% and 90%.

Symbols: h entropy per token before step t, s its slope per step, u its change by step t; units nats per token (and per step).
Source: Kalman 1960; local linear trend, Harvey 1989; docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

LEVEL = 0.80
"""Of the bands."""

HORIZON = 1000
"""Steps beyond which no time to the floor is said."""

_STEP_ROUGHNESS = np.array([0.0, 0.001, 0.003, 0.01, 0.03, 0.1])
_SLOPE_ROUGHNESS = np.array([0.0, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03])
_FADE = 0.97
_LEAST_ERROR = 1e-6
_FIRST_SLOPE = 0.2
_H, _S, _U = 0, 1, 2


@dataclass(frozen=True)
class FilteredEntropy:
    """Attributes:
    entropy, low, high: h before the step and its 80% band. slope: per step, after it.
    steps_to_floor, soonest, latest: from after the step, with an 80% band; infinite beyond HORIZON, NaN without a floor.
    """

    entropy: float
    low: float
    high: float
    slope: float
    steps_to_floor: float
    soonest: float
    latest: float


class EntropyFilter:
    """Give it one step after the other.

    Args:
        floor: nats per token; None for no time to it.
    """

    def __init__(self, floor: float | None = None) -> None:
        self._floor = floor
        steps, slopes = np.meshgrid(_STEP_ROUGHNESS, _SLOPE_ROUGHNESS)
        self._of_step, self._of_slope = steps.ravel() ** 2, slopes.ravel() ** 2
        self._mean = np.zeros((len(self._of_step), 3))
        self._covariance = np.zeros((len(self._of_step), 3, 3))
        self._log_weights = np.zeros(len(self._of_step))
        self._begun = False

    def add(self, entropy: float, error: float, changes: Iterable[tuple[float, float]]) -> FilteredEntropy | None:
        """Take in one step.

        Args:
            entropy, error: h before the step and its standard error; what is not finite is left out.
            changes: independent estimates of the step's change with their standard errors; those not finite are left out.

        Returns:
            What is known now; None before the first entropy with an error.
        """
        if not self._begun:
            if not _usable(entropy, error):
                return None
            self._begin(entropy, error)
        elif _usable(entropy, error):
            self._observe(_H, entropy, error)
        before = self._quantiles(_H)
        self._mean[:, _U] = self._mean[:, _S]  # u = s + eta
        self._covariance[:, _U, :] = self._covariance[:, _S, :]
        self._covariance[:, :, _U] = self._covariance[:, :, _S]
        self._covariance[:, _U, _U] = self._covariance[:, _S, _S] + self._of_step
        for value, its_error in changes:
            if _usable(value, its_error):
                self._observe(_U, value, its_error)
        self._mean[:, _H] += self._mean[:, _U]
        self._covariance[:, _H, :] += self._covariance[:, _U, :]
        self._covariance[:, :, _H] += self._covariance[:, :, _U]
        self._covariance[:, _S, _S] += self._of_slope
        weights = self._weights()
        times = (math.nan,) * 3 if self._floor is None else self._times(self._floor, weights)
        return FilteredEntropy(*before, float(weights @ self._mean[:, _S]), *times)

    def _begin(self, entropy: float, error: float) -> None:
        self._begun = True
        self._mean[:, _H] = entropy
        self._covariance[:, _H, _H] = max(error, _LEAST_ERROR) ** 2
        self._covariance[:, _S, _S] = (_FIRST_SLOPE * max(abs(entropy), 0.1)) ** 2

    def _observe(self, place: int, value: float, error: float) -> None:
        variance = max(error, _LEAST_ERROR) ** 2 + self._covariance[:, place, place]
        off = value - self._mean[:, place]
        gain = self._covariance[:, :, place] / variance[:, None]
        self._mean += gain * off[:, None]
        self._covariance -= gain[:, :, None] * self._covariance[:, None, place, :]
        likelihood = -0.5 * (np.log(variance) + off**2 / variance)
        self._log_weights = _FADE * self._log_weights + likelihood
        self._log_weights -= self._log_weights.max()

    def _weights(self) -> np.ndarray:
        found = np.exp(self._log_weights)
        return found / found.sum()

    def _quantiles(self, place: int) -> tuple[float, float, float]:
        """(mean, low, high) of a component of the state, the filters' answers mixed."""
        weights, means = self._weights(), self._mean[:, place]
        mean = float(weights @ means)
        variance = float(weights @ (self._covariance[:, place, place] + (means - mean) ** 2))
        reach = float(ndtri(0.5 + LEVEL / 2)) * math.sqrt(max(variance, 0.0))
        return mean, mean - reach, mean + reach

    def _times(self, floor: float, weights: np.ndarray) -> tuple[float, float, float]:
        """(steps, soonest, latest) until h is below `floor` with probability 0.5, 0.1 and 0.9."""
        k = np.arange(HORIZON + 1, dtype=np.float64)[:, None]
        mean = self._mean[:, _H] + k * self._mean[:, _S]
        c = self._covariance
        variance = c[:, _H, _H] + 2 * k * c[:, _H, _S] + k**2 * c[:, _S, _S]
        variance = variance + k * self._of_step + (k - 1).clip(0) * k * (2 * k - 1).clip(0) / 6 * self._of_slope
        below = ndtr((floor - mean) / np.sqrt(np.maximum(variance, _LEAST_ERROR**2))) @ weights
        times = []
        for probability in (0.5, 0.5 - LEVEL / 2, 0.5 + LEVEL / 2):
            reached = np.flatnonzero(below >= probability)
            times.append(float(reached[0]) if len(reached) else math.inf)
        return times[0], times[1], times[2]


def _usable(value: float, error: float) -> bool:
    return math.isfinite(value) and math.isfinite(error) and error >= 0
