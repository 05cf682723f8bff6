"""The linear datamodelling score: its rank correlation, and the line of the response over halves, with intervals that cover."""

import json

import numpy as np
import pytest
from scipy import stats

from entropy_experiments.analyses.intervention import half_subsets, linear_datamodelling_score
from entropy_experiments.records.record import json_of


def test_score_equals_scipys_on_noisy_shares():
    rng = np.random.default_rng(0)
    shares, subsets = rng.normal(size=20), half_subsets(20, 40)
    measured = subsets @ shares + 0.5 * rng.normal(size=40)
    found = linear_datamodelling_score(subsets, shares, measured)
    assert found.spearman == pytest.approx(stats.spearmanr(subsets @ shares, measured).statistic, abs=1e-12)
    assert found.pearson == pytest.approx(stats.pearsonr(subsets @ shares, measured).statistic, abs=1e-12)
    line = stats.linregress(subsets @ shares, measured)
    assert (found.slope, found.intercept) == pytest.approx((line.slope, line.intercept))
    assert found.interval[0] < found.spearman < found.interval[1] <= 1
    for name, error in (("slope", line.stderr), ("intercept", line.intercept_stderr)):
        low, high = getattr(found, f"{name}_interval")
        assert (low + high) / 2 == pytest.approx(getattr(found, name)) and high - low == pytest.approx(
            4.05 * error, rel=0.3
        )


@pytest.mark.long
def test_bootstrap_interval_covers():
    """Over 60 repeats at correlation 0.7, the 95% interval holds the true rank correlation at least 50 times (median 57)."""
    true = 6 / np.pi * np.arcsin(0.7 / 2)
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        subsets = np.eye(40, dtype=bool)
        shares = rng.normal(size=40)
        measured = 0.7 * shares + np.sqrt(1 - 0.49) * rng.normal(size=40)
        low, high = linear_datamodelling_score(subsets, shares, measured, seed=seed).interval
        inside += low <= true <= high
    assert inside >= 50


@pytest.mark.long
@pytest.mark.parametrize("count", [5, 40])
def test_slope_and_intercept_have_intervals_that_cover(count):
    """Truth 0.8 and -0.3 with noise that grows with the prediction: over 300 repeats the 95% intervals cover 268 times and more
    (all but 1 of 1000 repetitions of 94%)."""
    rng, inside = np.random.default_rng(1), np.zeros(2)
    for _ in range(300):
        shares = rng.normal(size=count)
        measured = -0.3 + 0.8 * shares + (0.2 + 0.3 * np.abs(shares)) * rng.normal(size=count)
        found = linear_datamodelling_score(np.eye(count, dtype=bool), shares, measured)
        for k, (name, truth) in enumerate((("slope", 0.8), ("intercept", -0.3))):
            low, high = getattr(found, f"{name}_interval")
            inside[k] += low <= truth <= high
    assert (inside >= 268).all(), inside


def test_clip_ratios_scale_shares_but_not_the_rest():
    subsets = np.array([[True, False], [False, True], [True, True]])
    ratios, rest = np.array([2.0, 3.0, 1.0]), 10.0
    measured = rest + ratios * np.array([1.0, 4.0, 5.0])
    found = linear_datamodelling_score(subsets, np.array([1.0, 4.0]), measured, ratios, rest)
    assert found.predicted == pytest.approx(measured.tolist())
    assert found.root_mean_square_error == pytest.approx(0.0, abs=1e-12)
    assert (found.slope, found.intercept) == pytest.approx((1.0, 0.0), abs=1e-9)
    assert found.slope_interval == pytest.approx([1.0, 1.0], abs=1e-6), "no noise, no interval to speak of"


@pytest.mark.parametrize(
    ("shares", "measured", "reason"),
    [(np.zeros(6), np.arange(12.0), "all predicted"), (np.arange(6.0), np.ones(12), "all measured")],
)
def test_nothing_to_rank_is_said(shares, measured, reason):
    found = linear_datamodelling_score(half_subsets(6, 12), shares, measured)
    assert found.spearman is None and found.interval is None and reason in found.reason
    json.dumps(json_of(found), allow_nan=False)


def test_two_subsets_say_nothing():
    found = linear_datamodelling_score(half_subsets(6, 2), np.arange(6.0), np.arange(2.0))
    assert found.spearman is None and "2 subsets" in found.reason


def test_bad_score_input():
    subsets = half_subsets(6, 12)
    with pytest.raises(ValueError, match="measurements"):
        linear_datamodelling_score(subsets, np.ones(6), np.ones(11))
    with pytest.raises(ValueError, match="not finite"):
        linear_datamodelling_score(subsets, np.full(6, np.nan), np.ones(12))
