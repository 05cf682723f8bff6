"""Intervals from values with each prompt left out: their coverage where prompts are few and skewed, and their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from entropy_core.uncertainty import effective_degrees_of_freedom as of_folds
from entropy_experiments.statistics.jackknife_interval import effective_degrees_of_freedom, jackknife_interval

REPEATS = 4000


def means(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(...,) means of (..., B) draws, and the same with each draw left out."""
    count = draws.shape[-1]
    total = draws.sum(-1)
    return total / count, (total[..., None] - draws) / (count - 1)


def coverage_of_student(draws: np.ndarray, truth: float) -> float:
    reach = stats.t.ppf(0.975, draws.shape[-1] - 1) * stats.sem(draws, axis=-1)
    return float((np.abs(draws.mean(-1) - truth) <= reach).mean())


@pytest.mark.parametrize("count", [4, 8, 16, 64])
@pytest.mark.parametrize("law", ["normal", "exponential", "uniform", "student5"])
def test_it_covers_for_symmetric_and_for_skewed_laws(law: str, count: int) -> None:
    """Laws that nothing was chosen by: 93 to 97.5%, where Student's alone covers 87 to 94% of means of exponentials."""
    rng = np.random.default_rng(count)
    draws, truth = {
        "normal": lambda: (rng.normal(size=(REPEATS, count)), 0.0),
        "exponential": lambda: (rng.exponential(size=(REPEATS, count)), 1.0),
        "uniform": lambda: (rng.random((REPEATS, count)), 0.5),
        "student5": lambda: (rng.standard_t(5, size=(REPEATS, count)), 0.0),
    }[law]()
    found = float(jackknife_interval(*means(draws)).holds(truth).mean())
    least, most = (0.92, 0.99) if count < 8 else (0.93, 0.98)
    assert least <= found <= most, f"{law}, {count} draws: {found:.1%}"
    if law == "exponential":
        before = coverage_of_student(draws, truth)
        assert before < found, f"Student's alone covers {before:.1%}"
        assert count > 16 or before < 0.93


def test_without_skew_and_tails_it_is_students() -> None:
    """Values at equal distances: no skewness, kurtosis below the normal law's."""
    draws = np.linspace(-1, 3, 21)
    found = jackknife_interval(*means(draws))
    wanted = stats.ttest_1samp(draws, 0.0).confidence_interval(0.95)
    assert (float(found.low), float(found.high)) == pytest.approx((wanted.low, wanted.high))
    assert float(found.degrees_of_freedom) == 20 and float(found.standard_error) == pytest.approx(stats.sem(draws))


def test_the_end_on_the_side_of_the_tail_is_halls() -> None:
    """g(z) = q at the end: solved here by bisection, in the module in closed form."""
    draws = np.array([0.0, 0.1, 0.2, 0.4, 0.7, 1.1, 1.9, 3.6, 7.0])
    value, left_out = means(draws)
    found, n = jackknife_interval(value, left_out), len(draws)
    skew = stats.skew(draws, bias=False)
    reach = stats.t.ppf(0.975, found.degrees_of_freedom)

    def g(z: float) -> float:
        return z + skew * z**2 / (3 * n**0.5) + skew**2 * z**3 / (27 * n) + skew / (6 * n**0.5) + reach

    low, high = -50.0, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if g(middle) < 0 else (low, middle)
    assert float(found.high) == pytest.approx(value - low * float(found.standard_error))
    assert float(found.low) == pytest.approx(value - reach * float(found.standard_error)), "the other end is Student's"
    mirrored = jackknife_interval(-value, -left_out)
    assert (float(mirrored.low), float(mirrored.high)) == pytest.approx((-float(found.high), -float(found.low)))


def test_one_heavy_prompt_leaves_few_degrees_of_freedom() -> None:
    draws = np.random.default_rng(0).normal(size=40)
    plain = effective_degrees_of_freedom(draws)
    draws[3] = 60.0
    assert plain > 20 and effective_degrees_of_freedom(draws) < 3
    count = len(draws)
    excess = stats.kurtosis(draws, bias=False)
    assert effective_degrees_of_freedom(draws) == pytest.approx(1 / (1 / (count - 1) + excess / (2 * count)))
    assert effective_degrees_of_freedom((draws.sum() - draws) / 39) == pytest.approx(
        effective_degrees_of_freedom(draws)
    )


def test_an_effective_sample_of_a_quarter_leaves_a_quarter_of_the_degrees() -> None:
    value, left_out = means(np.linspace(-1, 1, 40))
    whole, part = jackknife_interval(value, left_out), jackknife_interval(value, left_out, 0.25)
    assert float(whole.degrees_of_freedom) == 39 and float(part.degrees_of_freedom) == 9
    assert float(part.high - part.low) > float(whole.high - whole.low)


def test_what_is_not_known_has_no_interval() -> None:
    assert np.isnan(jackknife_interval(1.0, np.array([2.0])).low)
    assert np.isnan(jackknife_interval(1.0, np.array([2.0, np.nan, 1.0])).high)
    assert jackknife_interval(1.0, np.array([2.0])).as_dict() == {"low": None, "high": None, "degrees_of_freedom": None}
    alone = jackknife_interval(1.5, np.array([1.0, 2.0]))
    assert float(alone.high) == pytest.approx(1.5 + 12.7062 * 0.5, rel=1e-5), "two prompts: one degree of freedom"
    equal = jackknife_interval(2.0, np.full(6, 2.0))
    assert float(equal.low) == float(equal.high) == 2.0


def test_folds_have_the_same_degrees_of_freedom() -> None:
    for seed in range(5):
        draws = np.random.default_rng(seed).exponential(size=(4 + seed,))
        deviations = torch.tensor(draws - draws.mean())
        assert of_folds(deviations) == pytest.approx(float(effective_degrees_of_freedom(draws)))
