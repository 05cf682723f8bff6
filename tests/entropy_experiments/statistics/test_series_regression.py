"""Least squares over steps that err alike: against explicit covariance matrices, and how often its intervals hold the truth."""

import numpy as np
import pytest
from scipy import stats

from entropy_experiments.statistics.series_regression import fit_series

N, M = 9, 4
RNG = np.random.default_rng(0)
ROWS = np.stack([RNG.normal(size=N + M), np.ones(N + M)], 1)
VALUES = RNG.normal(size=N)


def covariance(rho: float, count: int = N + M) -> np.ndarray:
    return rho ** np.abs(np.arange(count)[:, None] - np.arange(count)).astype(float)


def by_matrices(rho: float) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(coefficients, their covariance, variance of a point, log of the restricted likelihood) with the matrix inverted."""
    x, inverse = ROWS[:N], np.linalg.inv(covariance(rho, N))
    gram = np.linalg.inv(x.T @ inverse @ x)
    coefficients = gram @ x.T @ inverse @ VALUES
    left = VALUES - x @ coefficients
    squares = float(left @ inverse @ left)
    logs = [np.linalg.slogdet(m)[1] for m in (covariance(rho, N), x.T @ inverse @ x)]
    return coefficients, gram * squares / (N - 2), squares / (N - 2), -sum(logs) / 2 - (N - 2) / 2 * np.log(squares)


def test_every_correlation_has_its_generalised_least_squares_and_weight() -> None:
    fit = fit_series(ROWS[:N], VALUES)
    found = [by_matrices(rho) for rho in fit.correlations]
    np.testing.assert_allclose(fit.coefficients, [f[0] for f in found], rtol=1e-7)
    np.testing.assert_allclose(fit.covariance, [f[1] for f in found], rtol=1e-6)
    weights = np.exp([f[3] for f in found])
    np.testing.assert_allclose(fit.weights, weights / weights.sum(), rtol=1e-6)
    assert fit.correlation == pytest.approx(float(fit.correlations @ weights / weights.sum()))


def test_intervals_are_quantiles_of_the_mixture() -> None:
    fit = fit_series(ROWS[:N], VALUES)
    told = fit.curve(np.array([[1.0, 0.0]]))
    errors = np.sqrt(fit.covariance[:, 0, 0])
    for end, level in ((told.low[0], 0.025), (told.high[0], 0.975)):
        below = stats.t.cdf((end - fit.coefficients[:, 0]) / errors, N - 2) @ fit.weights
        assert below == pytest.approx(level, abs=2e-4)


@pytest.mark.parametrize("together", [False, True])
def test_what_comes_is_continued_from_the_last_residual(together: bool) -> None:
    """By the conditional normal law given all points seen, with the coefficients' error through the same weights."""
    fit = fit_series(ROWS[:N], VALUES)
    told = fit.mean_coming(ROWS[N:]) if together else fit.coming(ROWS[N:])
    average = np.full((1, M), 1 / M) if together else np.eye(M)
    values, variances = [], []
    for k, rho in enumerate(fit.correlations):
        whole = covariance(rho)
        carry = whole[N:, :N] @ np.linalg.inv(whole[:N, :N])
        left = VALUES - ROWS[:N] @ fit.coefficients[k]
        values.append(average @ (ROWS[N:] @ fit.coefficients[k] + carry @ left))
        rest = whole[N:, N:] - carry @ whole[:N, N:]
        free = average @ (ROWS[N:] - carry @ ROWS[:N])
        own = average @ rest @ average.T * fit.variance[k]
        variances.append(np.diag(own + free @ fit.covariance[k] @ free.T))
    mean = fit.weights @ np.array(values)
    np.testing.assert_allclose(told.value, mean, rtol=1e-8)
    spread = fit.weights @ (np.array(variances) + np.square(np.array(values) - mean))
    np.testing.assert_allclose(told.standard_error, np.sqrt(spread), rtol=1e-7)
    assert (told.low < told.value).all() and (told.value < told.high).all()


@pytest.mark.parametrize("alike", [0.0, 0.6])
def test_intervals_cover_whether_or_not_neighbours_err_alike(alike: float) -> None:
    """300 series of 12 steps that move one way. Steps taken as independent cover 70 to 75% where neighbours correlate at 0.6."""
    rng = np.random.default_rng(1)
    rows = np.stack([np.linspace(0, 1, 12), np.ones(12)], 1)
    held, independent = [], []
    for _ in range(300):
        noise = rng.normal(size=12)
        for t in range(1, 12):
            noise[t] = alike * noise[t - 1] + np.sqrt(1 - alike**2) * noise[t]
        told = fit_series(rows, noise).curve(np.array([[1.0, 0.0]]))
        held.append(told.low[0] <= 0 <= told.high[0])
        line = stats.linregress(rows[:, 0], noise)
        independent.append(abs(line.slope) <= stats.t.ppf(0.975, 10) * line.stderr)
    assert np.mean(held) >= 0.88
    assert np.mean(independent) < 0.8 or not alike


def test_points_on_the_curve_leave_no_error() -> None:
    told = fit_series(ROWS, ROWS @ [2.0, -1.0]).curve(np.eye(2))
    assert told.value == pytest.approx([2.0, -1.0]) and told.low == pytest.approx([2.0, -1.0])
