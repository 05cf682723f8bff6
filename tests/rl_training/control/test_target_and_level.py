"""Schedules of the target, and what the filtered level makes of looks and predictions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from rl_training.control.level import EntropyLevel
from rl_training.control.missed import MissedDistance
from rl_training.control.target import TargetPath
from rl_training.controller_config import EntropyControllerConfig


def _path(**settings) -> TargetPath:
    path = TargetPath(EntropyControllerConfig(**settings))
    path.begin(0.7)
    return path


def test_schedules() -> None:
    assert [_path().at(step, 100) for step in (0, 50)] == [0.7, 0.7], "null holds what the first step finds"
    assert _path(target=0.5).at(50, 100) == 0.5
    line = _path(target=0.5, schedule="linear", final_target=0.3)
    assert [line.at(step, 100) for step in (0, 25, 100, 120)] == pytest.approx([0.5, 0.45, 0.3, 0.3])
    curve = _path(target=0.5, schedule="cosine", final_target=0.3, schedule_steps=10)
    assert [curve.at(step, 100) for step in (0, 5, 10)] == pytest.approx([0.5, 0.4, 0.3])
    assert 0.5 - curve.at(1, 100) < 0.3 * (0.5 - line.at(10, 100)), "a cosine begins flat"


def test_the_gate_opens_once_the_running_reward_has_come_so_far() -> None:
    path = _path(target=0.5, schedule="reward_gated", final_target=0.3, schedule_steps=10, reward_gate=0.6)
    path.note_reward(0, 0.5)
    for step in range(1, 10):
        path.note_reward(step, 0.59)
    assert path.at(40, 100) == 0.5
    path.note_reward(10, None)
    path.note_reward(11, math.nan)
    for step in range(20, 40):
        path.note_reward(step, 0.7)
    opened = path.state()["opened"]
    assert 20 < opened < 30 and path.at(opened + 5, 100) == pytest.approx(0.4)
    path.note_reward(50, 0.0)
    assert path.at(opened + 10, 100) == pytest.approx(0.3), "an open gate stays open"


@pytest.mark.parametrize(
    "settings",
    [
        {"final_target": 0.3},
        {"schedule": "linear"},
        {"schedule": "reward_gated", "final_target": 0.3},
        {"schedule": "linear", "final_target": 0.3, "reward_gate": 0.5},
        {"alpha_min": 0.1},
        {"target": 0.0},
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings) -> None:
    with pytest.raises(ValidationError):
        EntropyControllerConfig(**settings)


def test_the_level_is_nearer_to_the_truth_than_looks_and_takes_over_a_constant_bias() -> None:
    """Drift 0.002 a step of which half is predicted; looks err by 0.03."""
    rng, level, truth = np.random.default_rng(0), EntropyLevel(0.2, 0.02, 0.01, 8), 0.5
    errors, looks, biases = [], [], []
    for _ in range(400):
        look = truth + 0.03 * rng.standard_normal()
        errors.append(level.see(look) - truth)
        looks.append(look - truth)
        level.expect(-0.001)
        truth -= 0.002
        biases.append(level.bias)
    assert np.std(errors[100:]) < 0.5 * np.std(looks[100:])
    assert np.mean(biases[100:]) == pytest.approx(-0.001, abs=3e-4), "the integral term does not find the bias"
    assert abs(np.mean(errors[100:])) < 0.004, "the level lags behind what is not predicted"


def _seen(offset: float, seed: int) -> np.ndarray:
    """Levels over 400 steps at 0.4 nats; held-out looks err by 0.025 and are the same for 8 steps, own completions by 0.02."""
    rng, level = np.random.default_rng(seed), EntropyLevel(0.2, 0.0, 0.01, 8)
    held = np.repeat(0.4 + 0.025 * rng.standard_normal(50), 8)
    own = 0.4 + offset + 0.02 * rng.standard_normal(400)
    return np.array([level.see(z, 0.025, x) for z, x in zip(held, own, strict=True)])


def test_the_offset_of_the_steps_own_completions_is_learned() -> None:
    """A trainer that prefers undecided prompts: its completions are 0.1 above the held-out ones."""
    found = np.array([_seen(0.1, seed) for seed in range(20)])
    assert found[:, 0] == pytest.approx(0.5, abs=0.06), "the first look is nearly the step's own"
    assert found[:, 200:].mean() == pytest.approx(0.4, abs=0.006)
    assert np.sqrt(np.mean((found[:, 200:] - 0.4) ** 2)) < 0.015


def test_an_offset_that_is_not_there_costs_next_to_nothing() -> None:
    """Taken at its face value, the offset would carry the error of held-out looks into the level."""
    off = np.array([_seen(0.0, seed)[50:] - 0.4 for seed in range(40)])
    alone = 0.02 * math.sqrt(0.2 / 1.8)  # of the level by own completions that need no offset
    assert np.sqrt(np.mean(off**2)) < 1.1 * alone


def test_the_bias_is_bounded_and_a_look_that_is_not_finite_changes_nothing() -> None:
    level = EntropyLevel(0.2, 0.5, 0.01, 8)
    level.see(0.5)
    for _ in range(10):
        level.see(5.0)
    assert level.bias == 0.01
    before = level.value
    assert level.see(math.nan) == before + 0.01


def test_states_go_on() -> None:
    one, other = EntropyLevel(0.2, 0.02, 0.01, 8), EntropyLevel(0.2, 0.02, 0.01, 8)
    for look in (0.5, 0.51, 0.47):
        one.see(look)
        one.expect(-0.01)
    other.load(one.state())
    assert one.see(0.4) == other.see(0.4) and one.bias == other.bias
    path, again = _path(target=0.5), _path(target=0.4)
    path.note_reward(0, 0.5)
    again.load(path.state())
    assert again.state() == path.state()


@pytest.mark.parametrize("horizon", [4, 16])
def test_what_plans_get_wrong_at_every_step_is_made_good(horizon: int) -> None:
    """The loop as planned: 1/N of the distance at a step, and a drift that no plan sees."""
    target, drift = 0.4, -0.002
    ends = {}
    for counts in (False, True):
        missed, entropy, lowest = MissedDistance(horizon, limit=1.0), 0.5, 1.0
        for _ in range(40 * horizon):
            planned = (target - entropy - missed.value) / horizon
            missed.sum_up(entropy - target, counts)
            entropy += planned + drift
            lowest = min(lowest, entropy)
        ends[counts] = entropy
    assert ends[False] == pytest.approx(target + horizon * drift, rel=1e-6)
    assert ends[True] == pytest.approx(target, abs=1e-6)
    assert lowest > target - 1.1 * 0.1 * math.exp(-2) - horizon * abs(drift), (
        "more than a critically damped loop overshoots"
    )


def test_a_plan_that_was_cut_and_a_level_that_is_not_finite_are_not_summed_up() -> None:
    missed = MissedDistance(8, limit=0.08)
    missed.sum_up(1.0, counts=False)
    missed.sum_up(math.nan, counts=True)
    assert missed.value == 0.0
    for _ in range(100):
        missed.sum_up(-1.0, counts=True)
    assert missed.value == -0.08
