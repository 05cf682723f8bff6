"""Difficulty weighting: what is drawn more often, what is never given up, and that it survives a checkpoint."""

import numpy as np
import pytest

from rl_training.tasks.difficulty import PassRates


def test_half_solved_prompts_weigh_most_and_none_is_given_up():
    rates = PassRates(3)
    for _ in range(5):
        rates.update(0, [1.0] * 80)
        rates.update(1, [1.0, 0.0] * 40)
        rates.update(2, [0.0] * 80)
    weights = rates.weights()
    assert weights[1] > 2 * weights[0] and weights[1] > 2 * weights[2]
    assert weights.min() == pytest.approx(0.1 * weights.max()), "a prompt solved 80 times would never be drawn again"


def test_weights_are_the_expected_variance_under_the_posterior():
    rates = PassRates(1)
    rates.update(0, [1.0, 1.0, 0.0])
    q = np.random.default_rng(0).beta(1 + 2, 1 + 1, size=400_000)
    assert rates.weights()[0] == pytest.approx((q * (1 - q)).mean(), rel=0.01)


def test_draws_are_distinct_follow_the_weights_and_avoid_what_is_excluded():
    rates = PassRates(10)
    rates.update(3, [1.0, 0.0] * 20)
    for prompt in range(10):
        if prompt != 3:
            rates.update(prompt, [0.0] * 40)
    firsts = [rates.draw(1, np.random.default_rng(seed))[0][0] for seed in range(2000)]
    chosen, chances = rates.draw(1, np.random.default_rng(0))
    expected = rates.weights()[3] / rates.weights().sum()
    assert np.mean([f == 3 for f in firsts]) == pytest.approx(expected, abs=4 * (expected / 2000) ** 0.5)
    assert chances[0] == pytest.approx(rates.weights()[chosen[0]] / rates.weights().sum())
    drawn, _ = rates.draw(7, np.random.default_rng(1), exclude=[0, 1, 2])
    assert len(set(drawn)) == 7 and not set(drawn) & {0, 1, 2}


def test_uniform_draws_ignore_difficulty():
    rates = PassRates(2)
    rates.update(0, [1.0, 0.0] * 50)
    rates.update(1, [1.0] * 100)
    drawn = [rates.draw(1, np.random.default_rng(seed), weighted=False)[0][0] for seed in range(600)]
    assert 240 < sum(drawn) < 360


def test_unscorable_rewards_are_left_out_and_state_returns():
    rates = PassRates(2)
    rates.update(1, [float("nan"), 1.0])
    assert rates.passes[1] == 1 and rates.failures[1] == 0
    copy = PassRates(2)
    copy.load_state_dict(rates.state_dict())
    np.testing.assert_array_equal(copy.weights(), rates.weights())
    with pytest.raises(ValueError, match="2 prompts, the task has 3"):
        PassRates(3).load_state_dict(rates.state_dict())
