"""Least squares over the steps of a run, whose neighbours err alike: intervals that allow for a correlation that is not known.

    y_t = z_t beta + e_t,     e_t = rho e_{t-1} + sqrt(1 - rho^2) u_t,     u_t independent, normal, of one size
    w(rho) ~ |S_rho|^-1/2 |X' S_rho^-1 X|^-1/2 RSS_rho^-(n - p)/2          rho uniform on (-1, 1), S_rho = rho^|t - t'|

Given rho, generalised least squares has Student's t on n - p degrees of freedom; what is stated is its average over rho by w:
the mean, and the 2.5% and 97.5% quantiles of the mixture. Taking steps as independent, intervals of 12 steps cover 73% where
neighbours correlate at 0.6. A correction of the error by an estimate of rho is no remedy at these lengths: that estimate is far
too small where the curve moves one way, as entropy does. w is the restricted likelihood, in which the curve's constants are
integrated out.

Of new points that follow, e is continued from the last residual. Source: Chib, Journal of Econometrics 58 (1993), for regression
with autocorrelated errors; Harville, Biometrika 61 (1974), for w; benchmarks/results/calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
_CORRELATIONS = np.linspace(-0.96, 0.98, 49)
_HALVINGS = 22
_NEGLIGIBLE = 1e-4
_EXACT = 1e-20  # of the sum of squares, below which a fit leaves nothing


@dataclass(frozen=True)
class Told:
    """(m,) values with standard error and the ends of the 95% interval."""

    value: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class SeriesFit:
    """Fits of n points by p columns at each of K correlations.

    coefficients (K, p), covariance (K, p, p), variance (K,) of a point, last_residual (K,), weights (K,) that add up to 1.
    """

    correlations: np.ndarray
    weights: np.ndarray
    coefficients: np.ndarray
    covariance: np.ndarray
    variance: np.ndarray
    last_row: np.ndarray
    last_residual: np.ndarray
    n: int

    @property
    def degrees_of_freedom(self) -> int:
        return self.n - self.coefficients.shape[1]

    @property
    def correlation(self) -> float:
        """Mean correlation of neighbours."""
        return float(self.weights @ self.correlations)

    def curve(self, rows: np.ndarray) -> Told:
        """z beta of (m, p) rows."""
        variance = np.einsum("mi,kij,mj->mk", rows, self.covariance, rows)
        return self._mixed(rows @ self.coefficients.T, variance)

    def coming(self, rows: np.ndarray) -> Told:
        """Each of the (m, p) points that come next, in order."""
        ahead = np.arange(1, len(rows) + 1)
        carried = self.correlations[:, None] ** ahead  # (K, m)
        return self._coming(rows[:, None, :] - carried.T[..., None] * self.last_row, rows, carried.T, 1 - carried.T**2)

    def mean_coming(self, rows: np.ndarray) -> Told:
        """The mean of the (m, p) points that come next."""
        ahead = np.arange(1, len(rows) + 1)
        carried = (self.correlations[:, None] ** ahead).mean(1)
        apart, together = np.abs(ahead[:, None] - ahead).ravel(), (ahead[:, None] + ahead).ravel()
        spread = np.array([float((r**apart - r**together).mean()) for r in self.correlations])
        mean = rows.mean(0, keepdims=True)
        return self._coming(
            mean[:, None, :] - carried[None, :, None] * self.last_row, mean, carried[None], spread[None]
        )

    def _coming(self, free: np.ndarray, rows: np.ndarray, carried: np.ndarray, spread: np.ndarray) -> Told:
        """free: (m, K, p), by which coefficients err; carried, spread: (m, K) of the last residual and of a point's variance."""
        value = rows @ self.coefficients.T + carried * self.last_residual
        return self._mixed(value, np.einsum("mki,kij,mkj->mk", free, self.covariance, free) + spread * self.variance)

    def _mixed(self, value: np.ndarray, variance: np.ndarray) -> Told:
        """Of (m, K) means and variances, the mixture of Student's t."""
        mean, error = value @ self.weights, np.sqrt(np.maximum(variance, 0.0))
        spread = np.sqrt((np.square(value - mean[:, None]) + variance) @ self.weights)
        low, high = (self._quantile(value, error, p) for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        exact = spread == 0
        return Told(mean, spread, np.where(exact, mean, low), np.where(exact, mean, high))

    def _quantile(self, value: np.ndarray, error: np.ndarray, level: float) -> np.ndarray:
        known = self.weights > _NEGLIGIBLE * self.weights.max()
        weights = self.weights[known] / self.weights[known].sum()
        value, error = value[:, known], np.maximum(error[:, known], 1e-300)
        each = value + stdtrit(self.degrees_of_freedom, level) * error
        student = _student(self.degrees_of_freedom)
        low, high = each.min(1), each.max(1)  # the mixture's lies between those of its parts
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            below = np.interp((middle[:, None] - value) / error, *student) @ weights < level
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


@lru_cache(maxsize=64)
def _student(degrees_of_freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Student's distribution function as a table, to 1e-6: it is asked for very often."""
    at = np.sinh(np.linspace(-8.0, 8.0, 4001))
    return at, stdtr(degrees_of_freedom, at)


def fit_series(rows: np.ndarray, values: np.ndarray) -> SeriesFit:
    """Of (n, p) rows of full rank and (n,) values, in order; n at least p + 1."""
    n, p = rows.shape
    rho = _CORRELATIONS[:, None, None]
    whole = np.column_stack([rows, values])
    white = np.repeat(whole[None], len(rho), 0)
    white[:, 1:] = (whole[1:] - rho * whole[:-1]) / np.sqrt(1 - rho**2)
    x, y = white[..., :p], white[..., p]
    gram = x.transpose(0, 2, 1) @ x
    inverse = np.linalg.inv(gram)
    coefficients = np.einsum("kij,knj,kn->ki", inverse, x, y)
    left = np.square(y - np.einsum("knp,kp->kn", x, coefficients)).sum(1)
    least = _EXACT * max(float(np.square(values - values.mean()).sum()), 1e-300)
    squares = np.where(left > least, left, 0.0)
    likelihood = -(n - 1) / 2 * np.log(1 - _CORRELATIONS**2) - np.linalg.slogdet(gram)[1] / 2
    likelihood -= (n - p) / 2 * np.log(np.maximum(squares, least))
    weights = np.exp(likelihood - likelihood.max())
    variance = squares / (n - p)
    return SeriesFit(
        _CORRELATIONS, weights / weights.sum(), coefficients, variance[:, None, None] * inverse, variance, rows[-1],
        values[-1] - coefficients @ rows[-1], n,
    )  # fmt: skip
