"""Where the table's gain of reward comes from, when it may be divided by, and what input leaves without a number."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entropy_experiments.analyses.weighting_schemes import weighting_schemes
from entropy_experiments.report.weighting_finding import weighting_finding
from tests.entropy_experiments.analyses.weighting_world import (
    FACTOR,
    LONGEST,
    World,
    assert_sound,
    close,
    make_world,
    row_of,
    spread,
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


# ---- where the reward comes from


def test_rewards_of_some_evaluation_sequences_are_enough(world: World) -> None:
    reward = world.arrays.evaluation.reward.copy()
    reward[[3, 10, 11]] = np.nan  # one completion of prompt 1, both of prompt 5
    arrays = replace(world.arrays, evaluation=replace(world.arrays.evaluation, reward=reward))
    found = weighting_schemes(arrays, LONGEST)
    known = np.isfinite(reward)
    update = world.update(arrays.weights)
    covariance = np.cov(reward[known], world.eval_scores[known] @ update)[0, 1]
    assert row_of(found, "run").reward_gain.value == pytest.approx(covariance, rel=1e-9)
    assert found.gain_side == "evaluation"
    assert "29 evaluation sequences" in found.gain_note
    assert_sound(found)


def test_gain_is_the_derivative_of_expected_reward() -> None:
    """A softmax over five actions, its sixteen evaluation sequences the whole distribution: d E[r] along the update."""
    counts, worth = [8, 4, 2, 1, 1], np.array([1.0, -1.0, 2.0, 0.5, 3.0])
    chances = np.array(counts) / 16
    actions = np.repeat(np.arange(5), counts)
    base = make_world(eval_prompts=list(range(16)), eval_reward=worth[actions])
    rows = np.eye(5) - chances  # d log pi(a) / d logits
    train_rows = rows[[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    arrays = replace(base.arrays, fisher=rows[actions] @ train_rows.T, train_fisher=train_rows @ train_rows.T)
    update = FACTOR * arrays.weights @ train_rows

    def expected_reward(step: float) -> float:
        unnormalised = chances * np.exp(step * update)
        return float(worth @ unnormalised / unnormalised.sum())

    exact = (expected_reward(1.0) - expected_reward(-1.0)) / 2
    entry = row_of(weighting_schemes(arrays, LONGEST), "run").reward_gain
    assert entry.value * 15 / 16 == pytest.approx(exact, rel=1e-6), "the whole distribution has no n - 1"


@pytest.mark.parametrize(("value", "word"), [(math.nan, "missing"), (1.0, "all equal")])
def test_training_side_stands_in_without_same_prompt_terms(world: World, value: float, word: str) -> None:
    evaluation = replace(world.arrays.evaluation, reward=np.full(len(world.arrays.evaluation), value))
    found = weighting_schemes(replace(world.arrays, evaluation=evaluation), LONGEST)
    assert found.gain_side == "training"
    assert word in found.gain_note
    assert "other prompts" in found.gain_note
    labels, weights = world.arrays.training, np.array(found.weights["rloo"])

    def gain(without: int | None) -> float:
        total = 0.0
        for i in range(len(labels)):
            rows = [j for j in range(len(labels)) if labels.prompt_index[j] not in (labels.prompt_index[i], without)]
            terms = []
            for j in rows:
                group = [k for k in range(len(labels)) if labels.prompt_index[k] == labels.prompt_index[j] and k != j]
                advantage = labels.reward[j] - labels.reward[group].mean()
                terms.append(advantage * float(world.train_scores[j] * world.kernel_p @ world.train_scores[i]))
            total += weights[i] * sum(terms) / len(terms)
        return FACTOR * total

    entry = row_of(found, "rloo").reward_gain
    assert entry.value == pytest.approx(gain(None), rel=1e-9)
    assert entry.standard_error == pytest.approx(spread([gain(p) for p in (3, 7, 11)]), rel=1e-9)
    assert_sound(found)


def test_two_sets_of_prompts_count_in_quadrature() -> None:
    """Twelve training prompts with a strong signal, so that the gain of the training side can be divided by."""
    prompts = [p // 4 for p in range(48)]
    reward = np.array([1.0, 0, 0, 1] * 12)
    world = make_world(3, train_prompts=prompts, train_reward=reward, eval_reward=np.zeros(32))
    found = weighting_schemes(world.arrays, LONGEST)
    row = row_of(found, "grpo")
    weights = np.array(found.weights["grpo"])
    change, gain = world.change(weights), row.reward_gain
    left = [world.change_without(weights, p) / gain.value for p in range(16)]
    assert row.entropy_cost_per_reward.value == pytest.approx(-change / gain.value, rel=1e-9)
    # the second part: the ratio with each training prompt left out of the rows
    raw, others = world.arrays, []
    for prompt in range(12):
        total = 0.0
        for i in range(48):
            rows = [j for j in range(48) if prompts[j] not in (prompts[i], prompt)]
            terms = [(reward[j] - 0.5) * 4 / 3 * raw.train_fisher[j, i] for j in rows]
            total += weights[i] * sum(terms) / len(terms)
        others.append(change / (FACTOR * total))
    expected = math.hypot(spread(left), spread(others))
    assert row.entropy_cost_per_reward.standard_error == pytest.approx(expected, rel=1e-9)


@pytest.mark.long
def test_the_leave_one_out_gain_is_unbiased_and_its_error_honest() -> None:
    """Rewards that depend on nothing: the gain is zero in the mean, and within 2 standard errors as often as it should."""
    z = []
    for seed in range(200):
        world = make_world(seed, eval_prompts=list(range(40)), signal=0.0)
        entry = row_of(weighting_schemes(world.arrays, LONGEST), "run").reward_gain
        z.append(entry.value / entry.standard_error)
    assert abs(np.mean(z)) < 3 / math.sqrt(200)
    assert 0.90 <= np.mean(np.abs(z) < 2) <= 0.98


def test_a_gain_within_noise_is_not_divided_by() -> None:
    world = make_world(1, signal=0.0)
    found = weighting_schemes(world.arrays, LONGEST)
    for row in (row for row in found.rows if "delta_h" in row):
        gain = row.reward_gain
        if abs(gain.value) <= 2 * gain.standard_error:
            assert row.entropy_cost_per_reward.value is None
            assert "is not significantly different from 0" in row.entropy_cost_per_reward.reason
            assert row.scale.equal_gain is None
        assert row.delta_h.equal_length.value is not None
    assert row_of(found, "run").entropy_cost_per_reward.value is None
    assert "what a unit of reward costs in entropy is not given" in weighting_finding(found)
    assert_sound(found)


def test_a_weighting_that_lowers_reward_has_no_price(world: World) -> None:
    arrays = replace(world.arrays, weights=-world.arrays.weights)
    row = row_of(weighting_schemes(arrays, LONGEST), "run")
    assert row.entropy_cost_per_reward.value is None
    assert "lower reward" in row.entropy_cost_per_reward.reason


# ---- degenerate input

MISSING = np.full(32, np.nan)
EQUAL: dict[str, Any] = {"train_reward": np.ones(10)}
ONE_PROMPT: dict[str, Any] = {"eval_prompts": [5] * 8}
SINGLES: dict[str, Any] = {"train_prompts": list(range(10))}


@pytest.mark.parametrize(
    ("changes", "name", "path", "reason"),
    [
        (EQUAL, "run", ("delta_h", "equal_length"), "has no length"),
        (EQUAL, "drop_top_1", (), "only 0 sequences lowered entropy"),
        (EQUAL, "kl_cov", (), "same token covariance"),
        (ONE_PROMPT, "run", ("delta_h", "raw"), "too few prompts"),
        (ONE_PROMPT, "run", ("entropy_cost_per_reward",), "no gain of reward to divide by: no standard error"),
        (ONE_PROMPT, "drop_top_1", ("spared",), "two halves"),
        ({"eval_prompts": [5], "eval_reward": np.ones(1)}, "rloo", ("delta_h", "equal_length"), "too few prompts"),
        ({"train_prompts": [4] * 10, "eval_reward": MISSING}, "run", ("reward_gain",), "missing, and .* single prompt"),
        ({"train_prompts": [4] * 5 + [6] * 5, "eval_reward": MISSING}, "run", ("reward_gain",), "too few prompts"),
        (SINGLES, "grpo", (), "at least two completions"),
        (SINGLES, "dapo", (), "at least two completions"),
        (SINGLES, "rloo", (), "at least two completions"),
        (SINGLES, "dr_grpo", ("delta_h", "equal_length"), "has no length"),
    ],
)
def test_degenerate_input_is_explained(changes: dict[str, Any], name: str, path: tuple[str, ...], reason: str) -> None:
    found = weighting_schemes(make_world(**changes).arrays, LONGEST)
    assert_sound(found)
    entry = row_of(found, name)
    for key in path:
        entry = getattr(entry, key)
    assert re.search(reason, entry.reason)


def test_what_degenerate_input_still_tells() -> None:
    assert "none makes a step" in weighting_finding(weighting_schemes(make_world(**EQUAL).arrays, LONGEST))
    world = make_world(**ONE_PROMPT)
    run = row_of(weighting_schemes(world.arrays, LONGEST), "run")
    assert run.delta_h.raw.value == pytest.approx(world.arrays.shares.sum())
    assert run.reward_gain.value == close(world.gain(world.arrays.weights))
    singles = weighting_schemes(make_world(train_prompts=list(range(10))).arrays, LONGEST)
    assert "grpo" not in singles.weights
    reinforce = row_of(singles, "reinforce")
    assert reinforce.delta_h.raw.value != 0, "REINFORCE has the batch to compare with"


def test_missing_training_rewards_or_length_leave_the_run_and_its_filters(world: World) -> None:
    reward = world.arrays.training.reward.copy()
    reward[4] = np.nan
    found = weighting_schemes(replace(world.arrays, training=replace(world.arrays.training, reward=reward)), LONGEST)
    assert_sound(found)
    assert "reward of sequence 4" in row_of(found, "grpo").reason
    assert row_of(found, "positives_only").delta_h.raw.value is not None
    found = weighting_schemes(world.arrays)
    assert "max_completion_length" in row_of(found, "dr_grpo").reason
    assert row_of(found, "dr_grpo_longest").delta_h.raw.value is not None


@pytest.mark.parametrize("name", ["fisher", "entropy_fisher", "train_fisher", "weights", "products"])
def test_bad_arrays_are_refused_by_name(world: World, name: str) -> None:
    values = getattr(world.arrays, name).copy()
    with pytest.raises(ValueError, match=f"{name} is"):
        weighting_schemes(replace(world.arrays, **{name: values[:-1]}), LONGEST)
    values.flat[3] = np.nan
    with pytest.raises(ValueError, match=f"{name} holds 1 entries"):
        weighting_schemes(replace(world.arrays, **{name: values}), LONGEST)
