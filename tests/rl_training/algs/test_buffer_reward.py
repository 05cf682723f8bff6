"""The mean reward that is logged is that of all prompts, however they were drawn, and its error is a jackknife over groups."""

import math

import numpy as np
import pytest

from rl_training.algs.buffer_reward import NAME, reward_of_all_prompts


def test_draws_that_prefer_half_solved_prompts_do_not_make_every_policy_half_right():
    """Of prompts that are never or always solved few are drawn: their plain mean is 0.5, that of all prompts 0.15."""
    rng = np.random.default_rng(0)
    solved = np.repeat([0.0, 0.5], [70, 30])
    chances = np.repeat([0.1, 1.0], [70, 30])
    chances /= chances.sum()
    drawn = rng.choice(100, size=20_000, p=chances)
    found = reward_of_all_prompts(solved[drawn].tolist(), chances[drawn].tolist())
    assert solved[drawn].mean() > 0.35 and found[NAME] == pytest.approx(0.15, abs=0.01)


def test_the_error_leaves_out_one_group_at_a_time():
    rewards, chances = [0.1, 0.9, 0.4, math.nan, 0.5], [0.1, 0.4, 0.2, 0.9, 0.3]
    found = reward_of_all_prompts(rewards, chances)

    def mean(kept):
        return sum(rewards[k] / chances[k] for k in kept) / sum(1 / chances[k] for k in kept)

    known = [0, 1, 2, 4]
    left_out = np.array([mean([k for k in known if k != gone]) for gone in known])
    assert found[NAME] == pytest.approx(mean(known))
    assert found[f"{NAME}_se"] == pytest.approx(math.sqrt(3 / 4 * np.square(left_out - left_out.mean()).sum()))
    assert found[f"{NAME}_df"] == 3


def test_one_group_has_no_error_and_none_no_mean():
    assert reward_of_all_prompts([0.25], [0.5]) == {NAME: 0.25}
    assert reward_of_all_prompts([math.nan], [0.5]) == {}
