"""Intervals of means of zeros and ones stay where such means can be, and cover."""

import numpy as np
import pytest
import torch

from entropy_experiments.records.estimate_entries import ratio_estimate
from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.zero_or_one import change_of_zeros_and_ones, of_zeros_and_ones, zeros_and_ones


def mean_of(rewards, prompts):
    jackknifed = ratio_estimate(torch.tensor(rewards, dtype=torch.float64), torch.tensor(prompts))
    return jackknifed, of_zeros_and_ones(jackknifed, len(rewards), len(set(prompts)))


@pytest.mark.parametrize("ones", [0, 1, 2, 6, 7, 8])
def test_ends_stay_between_0_and_1_and_around_the_mean(ones):
    before, found = mean_of([1.0] * ones + [0.0] * (8 - ones), list(range(8)))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high, "eight alike do not make a rate exact"
    assert (found.value, found.standard_error) == (before.value, before.standard_error)
    if ones == 1:
        assert before.low < 0, "what the jackknife said"


def test_copies_of_a_prompts_sequences_are_no_further_draws():
    single = mean_of([1.0, 0.0, 0.0, 1.0, 0.0, 0.0], list(range(6)))[1]
    copied = mean_of([1.0, 0.0, 0.0, 1.0, 0.0, 0.0] * 4, list(range(6)) * 4)[1]
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_it_covers(rate):
    rng, held = np.random.default_rng(3), 0
    for _ in range(300):
        found = mean_of((rng.random(16) < rate).astype(float).tolist(), list(range(16)))[1]
        held += found.low <= rate <= found.high
    assert held >= 0.92 * 300


def test_what_is_not_known_stays_so_and_which_numbers_it_is_for():
    alone = Estimate(value=1.0, standard_error=None)
    assert of_zeros_and_ones(alone, 3, 1) == alone
    assert zeros_and_ones([0.0, 1.0, 1]) and not zeros_and_ones([]) and not zeros_and_ones([0.0, 0.5])


def test_a_change_stays_between_its_bounds_and_is_not_exact():
    wide = Estimate(value=0.8, standard_error=0.2, low=0.3, high=1.3, degrees_of_freedom=7)
    assert (change_of_zeros_and_ones(wide).low, change_of_zeros_and_ones(wide).high) == (0.3, 1.0)
    same = Estimate(value=0.0, standard_error=0.0, low=0.0, high=0.0, degrees_of_freedom=7)
    assert change_of_zeros_and_ones(same).known().holds_zero is None
