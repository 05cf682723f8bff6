"""Sampling: the distribution that is differentiated, streams left alone, and the two policies of the collector."""

import numpy as np
import pytest
import torch

from entropy_core.scores import token_statistics
from rl_training.errors import UserError
from rl_training.filtered_buffer import GroupsWanted, collect_filtered
from rl_training.models.load import load_model_and_tokenizer
from rl_training.sampling import (
    Policy,
    SamplingConfig,
    draw,
    generate_completions,
    make_sampling_config,
    score,
    tokenize_prompts,
)
from rl_training.tasks.difficulty import PassRates
from tests.tiny_policy import even_start_reward

ROWS = [
    {"prompt": [{"role": "user", "content": f"{i}+{i}"}], "prompt_index": i, "answer": str(2 * i)} for i in range(8)
]


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return load_model_and_tokenizer(str(tiny_policy), device="cpu")


@pytest.mark.parametrize("bad", [{"top_p": 0.9}, {"top_k": 50}, {"temperature": 0.0}, {"max_completion_length": 0}])
def test_another_distribution_than_the_softmax_is_refused(bad):
    settings = {"temperature": 1.0, "max_completion_length": 4, "eos_token_ids": (1,), "pad_token_id": 0, **bad}
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingConfig(**settings)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_completions_come_from_the_distribution_that_is_scored(policy, temperature):
    """Surprisal and entropy estimate the same number; a hidden top_k of 50 would part them by many standard errors."""
    model, tokenizer = policy
    sampling_config = make_sampling_config(model, tokenizer, temperature, 6)
    rollouts = draw(model, tokenizer, ROWS, 60, sampling_config, seed=1, status="evaluation")
    statistics = token_statistics(model, rollouts.to_batch(sampling_config))
    gaps = -statistics.scores() - statistics.entropy_sums()
    z = float(gaps.mean() / (gaps.std() / len(gaps) ** 0.5))
    assert abs(z) < 4, (
        f"z = {z:.1f}: sampled from another distribution than the one scored (truncated, or another temperature)"
    )
    first_tokens = {c[0] for c in rollouts.completion_ids}
    assert len(first_tokens) > 15


def test_completions_end_at_the_first_eos_and_streams_stay(policy):
    model, tokenizer = policy
    sampling_config = make_sampling_config(model, tokenizer, 1.0, 8)
    prompts = tokenize_prompts(tokenizer, [row["prompt"] for row in ROWS])
    torch.manual_seed(5)
    np.random.seed(5)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())
    first = generate_completions(model, prompts * 8, sampling_config, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0]), "the global torch stream moved"
    assert (np.random.get_state()[1] == before[1]).all()
    assert first == generate_completions(model, prompts * 8, sampling_config, seed=3)
    assert first != generate_completions(model, prompts * 8, sampling_config, seed=4)
    assert all(1 not in tokens[:-1] and 1 <= len(tokens) <= 8 for tokens in first)


def test_filtered_keeps_groups_with_reward_differences_and_counts_the_rest(policy):
    model, tokenizer = policy
    sampling_config = make_sampling_config(model, tokenizer, 1.0, 4)
    drawer = Policy(model, tokenizer, sampling_config)
    buffer, counts = collect_filtered(
        drawer, ROWS, lambda drawn: score(drawn, [even_start_reward]), PassRates(8), GroupsWanted(3, 3), seed=0
    )
    assert counts.kept == len(buffer) and counts.generated == counts.kept + counts.rejected
    for index in set(buffer.prompt_index):
        rewards = {r for r, i in zip(buffer.reward, buffer.prompt_index, strict=True) if i == index}
        assert len(rewards) == 2


def test_no_gradient_anywhere_is_said_clearly(policy):
    model, tokenizer = policy
    sampling_config = make_sampling_config(model, tokenizer, 1.0, 4)
    with pytest.raises(UserError, match="no prompt with mixed rewards"):
        collect_filtered(
            Policy(model, tokenizer, sampling_config),
            ROWS,
            lambda drawn: score(drawn, [lambda completions, **_: [1.0] * len(completions)]),
            PassRates(8),
            GroupsWanted(2, 2),
            seed=0,
        )


def test_rewards_add_up_and_a_wrong_count_is_refused(policy):
    model, tokenizer = policy
    sampling_config = make_sampling_config(model, tokenizer, 1.0, 4)
    rollouts = draw(model, tokenizer, ROWS[:2], 2, sampling_config, seed=0, status="evaluation")
    assert rollouts.reward == [None] * 4
    rollouts = score(
        rollouts, [lambda completions, **_: [1.0] * len(completions), lambda answer, **_: [None, 2.0, 0.0, 0.5]]
    )
    assert rollouts.reward == [1.0, 3.0, 1.0, 1.5]
    with pytest.raises(UserError, match="returned 1 rewards for 4"):
        score(rollouts, [lambda **_: [1.0]])
