"""The law R = -a e^H + b: planted constants come back, bands cover as often as they say, forecasts are held to account."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from entropy_experiments.report.evolution_words import law_sentence
from entropy_experiments.sweep.evolution.entropy_law import law_over_training

A, B = 0.15, 0.95


def run(steps, noise, rng):
    h = np.linspace(1.8, 0.25, steps)
    return h, B - A * np.exp(h) + noise * rng.normal(size=steps)


def test_planted_constants_come_back_exactly_without_noise():
    h, r = run(12, 0.0, np.random.default_rng(0))
    result = law_over_training(range(12), h, r)
    assert result.fit.a.value == pytest.approx(A, abs=1e-9), "sign or base of the exponent?"
    assert result.fit.b.value == pytest.approx(B, abs=1e-9)
    assert result.fit.at_zero_entropy.value == pytest.approx(B - A, abs=1e-9)
    assert result.forecast.held_out.mean_error.value == pytest.approx(0.0, abs=1e-9)


def test_agrees_with_another_fitter():
    """Constants within their errors of scipy's curve_fit, whose steps are independent, and errors that are larger."""
    h, r = run(20, 0.05, np.random.default_rng(1))
    fit = law_over_training(range(20), h, r).fit
    found, covariance = curve_fit(lambda x, a, b: b - a * np.exp(x), h, r)
    for name, value, error in zip("ab", found, np.sqrt(np.diag(covariance)), strict=True):
        assert abs(getattr(fit, name).value - value) < error < getattr(fit, name).standard_error < 2 * error


@pytest.mark.long
def test_bands_cover_as_often_as_they_say():
    """Bands of the curve, of later points and of their mean, over 500 runs of independent noise: they allow for more."""
    rng = np.random.default_rng(2)
    found, count = [], 500
    for _ in range(count):
        h, r = run(18, 0.05, rng)
        result = law_over_training(range(18), h, r)
        curve, held = result.fit.curve, result.forecast.held_out
        place = int(np.argmin(np.abs(np.array(curve.entropy) - 0.5)))
        true = B - A * math.exp(curve.entropy[place])
        found.append([curve.low[place] <= true <= curve.high[place], held.inside, held.mean_error_inside])
    rates = dict(zip(("curve", "points", "mean"), np.mean(found, 0), strict=True))
    assert all(0.93 <= rate <= 0.995 for rate in rates.values()), rates


def test_a_run_that_leaves_the_law_is_outside():
    h, r = run(24, 0.01, np.random.default_rng(3))
    r[8:] -= 0.4
    result = law_over_training(range(24), h, r)
    held = result.forecast.held_out
    assert not held.mean_error_inside and held.mean_error.value == pytest.approx(-0.4, abs=0.1)
    assert "OUTSIDE" in law_sentence(result)


def test_noise_that_goes_on_widens_the_intervals_and_is_said():
    rng = np.random.default_rng(4)
    h, noise = np.linspace(1.8, 0.25, 60), rng.normal(size=60)
    drift = np.cumsum(noise)
    drift *= noise.std() / np.std(drift - np.polyval(np.polyfit(h, drift, 1), h))
    apart, alike = (law_over_training(range(60), h, B - A * np.exp(h) + 0.02 * e) for e in (noise, drift))
    assert alike.fit.autocorrelation > 0.5 and "goes on from step to step" in law_sentence(alike)
    assert abs(apart.fit.autocorrelation) < 0.3 and "goes on" not in law_sentence(apart)
    assert alike.fit.a.standard_error > 2 * apart.fit.a.standard_error


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
    assert words in result.fit.reason and "was not fitted" in law_sentence(result)


def test_steps_are_taken_in_their_order():
    """The first third is of training, not of the list."""
    h, r = run(12, 0.02, np.random.default_rng(5))
    order = np.random.default_rng(6).permutation(12)
    assert law_over_training(order, h[order], r[order]) == law_over_training(range(12), h, r)
