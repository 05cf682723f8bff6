"""The law R = -a e^H + b: planted constants come back, bands cover as often as they say, forecasts are held to account."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import curve_fit

from entropy_experiments.sweep.evolution.entropy_law import LawFit, fit_law, law_over_training

A, B = 0.15, 0.95


def run(steps, noise, rng):
    h = np.linspace(1.8, 0.25, steps)
    return h, B - A * np.exp(h) + noise * rng.normal(size=steps)


def test_planted_constants_come_back_exactly_without_noise():
    h, r = run(12, 0.0, np.random.default_rng(0))
    result = law_over_training(range(12), h, r)
    assert result["fit"]["a"]["value"] == pytest.approx(A, abs=1e-9), "sign or base of the exponent?"
    assert result["fit"]["b"]["value"] == pytest.approx(B, abs=1e-9)
    assert result["fit"]["at_zero_entropy"]["value"] == pytest.approx(B - A, abs=1e-9)
    assert result["forecast"]["held_out"]["mean_error"]["value"] == pytest.approx(0.0, abs=1e-9)


def test_agrees_with_another_fitter():
    """Constants and their errors against scipy's curve_fit."""
    h, r = run(20, 0.05, np.random.default_rng(1))
    fit = law_over_training(range(20), h, r)["fit"]
    (a, b), covariance = curve_fit(lambda x, a, b: b - a * np.exp(x), h, r)
    assert (fit["a"]["value"], fit["b"]["value"]) == pytest.approx((a, b), rel=1e-5)
    errors = fit["a"]["standard_error"], fit["b"]["standard_error"]
    assert errors == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-4), "residual degrees of freedom?"


@pytest.mark.long
def test_bands_cover_as_often_as_they_say():
    """95% bands hold the true curve, and held-out points, in 95% of 2000 runs: within 4 binomial standard deviations."""
    rng = np.random.default_rng(2)
    curve, points, means, count = 0, [], 0, 2000
    for _ in range(count):
        h, r = run(12, 0.05, rng)
        fit = fit_law(h, r)
        assert isinstance(fit, LawFit)
        middle, error = fit.predict(np.array([0.5]))
        curve += abs(middle[0] - (B - A * math.exp(0.5))) <= fit.reach() * error[0]
        held = law_over_training(range(12), h, r)["forecast"]["held_out"]
        points.append(held["inside"])
        means += held["mean_error_inside"]
    slack = 4 * math.sqrt(0.95 * 0.05 / count)
    assert abs(curve / count - 0.95) < slack, f"the band of the curve covers {curve / count:.3f}"
    assert abs(means / count - 0.95) < slack, f"the band of the later mean covers {means / count:.3f}"
    # points of one run share their fit, so that fewer than all of them count as independent
    assert abs(np.mean(points) - 0.95) < 2 * slack, f"the band of single points covers {np.mean(points):.3f}"


def test_bands_of_what_came_by_the_textbook():
    """Simple regression in x = e^H: s^2 (1 + 1/n + (x - mean)^2 / Sxx) for a point, 1/m in place of 1 for the mean of m."""
    h, r = run(15, 0.05, np.random.default_rng(7))
    held = law_over_training(range(15), h, r)["forecast"]["held_out"]
    x, n, m = np.exp(h), 5, 10
    line = stats.linregress(x[:n], r[:n])
    s2 = np.square(r[:n] - line.intercept - line.slope * x[:n]).sum() / (n - 2)
    spread = 1 / n + np.square(x[n:] - x[:n].mean()) / np.square(x[:n] - x[:n].mean()).sum()
    reach = stats.t.ppf(0.975, n - 2) * np.sqrt(s2 * (1 + spread))
    np.testing.assert_allclose(held["predicted"], line.intercept + line.slope * x[n:], rtol=1e-9)
    np.testing.assert_allclose(np.subtract(held["high"], held["predicted"]), reach, rtol=1e-9)
    np.testing.assert_allclose(np.subtract(held["predicted"], held["low"]), reach, rtol=1e-9)
    shift = 1 / n + np.square(x[n:].mean() - x[:n].mean()) / np.square(x[:n] - x[:n].mean()).sum()
    assert held["mean_error"]["standard_error"] == pytest.approx(np.sqrt(s2 * (1 / m + shift)), rel=1e-9)
    assert held["inside"] == np.mean(np.abs(r[n:] - held["predicted"]) <= reach)


def test_a_run_that_leaves_the_law_is_outside():
    h, r = run(24, 0.01, np.random.default_rng(3))
    r[8:] -= 0.4
    result = law_over_training(range(24), h, r)
    held = result["forecast"]["held_out"]
    assert not held["mean_error_inside"] and held["mean_error"]["value"] == pytest.approx(-0.4, abs=0.1)
    assert "OUTSIDE" in result["sentence"]


def test_noise_that_goes_together_is_said():
    rng = np.random.default_rng(4)
    h = np.linspace(1.8, 0.25, 60)
    drift = np.cumsum(rng.normal(size=60))
    fit = law_over_training(range(60), h, B - A * np.exp(h) + 0.02 * drift)["fit"]
    assert fit["bands_too_narrow"] and fit["autocorrelation"] > 0.5


@pytest.mark.parametrize(
    ("h", "r", "words"),
    [
        ([], [], "there are 0"),
        ([1.0, 0.9, 0.8], [0.1, 0.2, 0.3], "there are 3"),
        ([1.0] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "the same at all steps"),
    ],
)
def test_too_little_says_why(h, r, words):
    result = law_over_training(range(len(h)), h, r)
    assert words in result["fit"]["reason"] and "was not fitted" in result["sentence"]


def test_steps_are_taken_in_their_order():
    """The first third is of training, not of the list."""
    h, r = run(12, 0.02, np.random.default_rng(5))
    order = np.random.default_rng(6).permutation(12)
    assert law_over_training(order, h[order], r[order]) == law_over_training(range(12), h, r)
