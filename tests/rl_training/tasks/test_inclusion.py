"""How likely prompts are to be in a draw, against every order of drawing, and what it is for: means over all prompts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from rl_training.tasks import inclusion
from rl_training.tasks.difficulty import PassRates
from rl_training.tasks.inclusion import inclusion_probabilities


def every_draw(weights: np.ndarray, count: int) -> dict[tuple[int, ...], float]:
    """Each set of `count` prompts -> how likely a draw one after the other ends in it, over all its orders."""
    found: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), count):
        left, chance = float(weights.sum()), 1.0
        for prompt in order:
            chance *= weights[prompt] / left
            left -= weights[prompt]
        found[tuple(sorted(order))] = found.get(tuple(sorted(order)), 0.0) + chance
    return found


def by_enumeration(weights: np.ndarray, count: int) -> np.ndarray:
    found = np.zeros(len(weights))
    for members, chance in every_draw(weights, count).items():
        found[list(members)] += chance
    return found


@pytest.mark.parametrize(
    ("prompts", "count", "spread"), [(5, 2, 1.0), (6, 4, 1.0), (7, 3, 3.0), (7, 6, 2.0), (6, 1, 1.0)]
)
def test_against_every_order_of_drawing(prompts: int, count: int, spread: float) -> None:
    weights = np.exp(spread * np.random.default_rng(prompts).normal(size=prompts))
    found = inclusion_probabilities(weights, count)
    assert found == pytest.approx(by_enumeration(weights, count), rel=1e-10) and found.sum() == pytest.approx(count)
    first = count * weights / weights.sum()
    assert count == 1 or np.abs(first / found - 1).max() > 0.1, "weights of the first draw would do as well"


def test_all_are_drawn_or_none() -> None:
    assert inclusion_probabilities(np.array([1.0, 5.0]), 2).tolist() == [1.0, 1.0]
    assert inclusion_probabilities(np.array([1.0, 5.0]), 0).tolist() == [0.0, 0.0]
    assert inclusion_probabilities(np.full(9, 0.3), 4) == pytest.approx(np.full(9, 4 / 9))
    for weights, count in (([1.0, 2.0], 3), ([1.0, 0.0], 1), ([1.0, np.nan], 1), ([1.0], -1)):
        with pytest.raises(ValueError, match="cannot be drawn"):
            inclusion_probabilities(np.array(weights), count)


def test_many_prompts_are_approximated_to_a_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.maximum(np.random.default_rng(3).random(80), 0.1)
    for count in (1, 8, 40, 78):
        near = inclusion_probabilities(weights, count)
        with monkeypatch.context() as patched:
            patched.setattr(inclusion, "EXACT", 100)
            exact = inclusion_probabilities(weights, count)
        assert near == pytest.approx(exact, rel=0.015) and near.sum() == pytest.approx(count)


def some_rates(size: int) -> PassRates:
    rates = PassRates(size)
    for prompt in range(size):
        for _ in range(prompt + 1):
            rates.update(prompt, [float(k < 1 + prompt % 4) for k in range(4)])
    return rates


@pytest.mark.long
def test_the_numbers_of_a_draw_are_how_often_it_holds_each_prompt() -> None:
    rates, draws = some_rates(6), 1500
    wanted = by_enumeration(rates.weights(), 4)
    held = np.zeros(6)
    for seed in range(draws):
        drawn, chances = rates.draw(4, np.random.default_rng(seed))
        held[drawn] += 1
        assert chances == pytest.approx(wanted[drawn].tolist(), rel=1e-10)
    low, high = stats.binom.ppf([0.0005, 0.9995], draws, wanted[:, None]).T
    assert ((low <= held) & (held <= high)).all(), (held / draws, wanted)
    few, expected = rates.draw(9, np.random.default_rng(0))
    first = rates.weights() / rates.weights().sum()
    assert len(few) == 9 and expected == pytest.approx((9 * first[few]).tolist()), "with replacement"


def test_a_mean_over_all_prompts_has_no_bias_that_matters() -> None:
    """8 of 12 prompts whose reward rises with their weight: weights of 1/inclusion against 1/(chance to be drawn first)."""
    weights = np.array([0.25, 0.25, 0.24, 0.22, 0.2, 0.16, 0.12, 0.1, 0.07, 0.05, 0.03, 0.025])
    rewards = 1.0 - np.linspace(0.0, 1.0, 12) ** 2
    held = inclusion_probabilities(weights, 8)
    clocks = np.random.default_rng(0).exponential(size=(40_000, 12)) / weights
    members = np.argpartition(clocks, 8, axis=1)[:, :8]  # the first eight are a draw, one after the other
    truth = float(rewards.mean())
    horvitz_thompson = (rewards / held)[members].sum(1) / 12
    assert abs(horvitz_thompson.mean() - truth) < 4 * stats.sem(horvitz_thompson), (
        "unbiased, to the noise of these draws"
    )
    bias = {}
    for name, chance in (("inclusion", held), ("first", weights)):
        ratio = (rewards / chance)[members].sum(1) / (1 / chance)[members].sum(1)
        bias[name] = float(ratio.mean() - truth)
    assert abs(bias["inclusion"]) < 0.03 < 0.05 < abs(bias["first"]), bias
