"""Which generated sequences the probe watches, and what it remembers of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from rl_training.generation.rollout_sequences import (
    RolloutSequence,
    choose,
    drawn_scores,
    prior_log_weights,
    to_batch,
    to_training_sequences,
)
from rl_training.sampling import SamplingConfig

SAMPLING = SamplingConfig(temperature=0.7, max_completion_length=4, eos_token_ids=(1,), pad_token_id=9)


def sequences(prompts: int = 6, each: int = 4) -> list[RolloutSequence]:
    """Completions of prompts (p, p, ..., p) of p + 1 tokens, each distinct, with advantages that say which it is."""
    return [
        RolloutSequence((p,) * (p + 1), (10 + p, 20 + k), advantage=float(100 * p + k), weight=0.5 * k)
        for p in range(prompts)
        for k in range(each)
    ]


def prompts_of(chosen: list[RolloutSequence]) -> Counter:
    return Counter(s.prompt_ids for s in chosen)


@pytest.mark.parametrize(
    ("count", "per_prompt", "expected"),
    [
        (8, 4, [4, 4]),
        (8, 2, [2, 2, 2, 2]),
        (6, 4, [4, 2]),
        (6, 1, [1, 1, 1, 1, 1, 1]),
        (12, 1, [2, 2, 2, 2, 2, 2]),  # more than there are prompts: as few of each as will do
        (24, 1, [4, 4, 4, 4, 4, 4]),
        (100, 1, [4, 4, 4, 4, 4, 4]),  # no more than there are
        (3, 8, [3]),
    ],
)
def test_so_many_sequences_of_so_few_completions_a_prompt(count: int, per_prompt: int, expected: list[int]) -> None:
    chosen = choose(sequences(), count, per_prompt, np.random.default_rng(0))
    assert sorted(prompts_of(chosen).values(), reverse=True) == expected
    assert len(set(chosen)) == len(chosen), "a sequence was taken twice"


def test_the_choice_is_random_reproducible_and_even() -> None:
    """Over many draws every prompt and every completion is taken equally often, whatever its advantage."""
    everything = sequences()
    assert choose(everything, 8, 2, np.random.default_rng(1)) == choose(everything, 8, 2, np.random.default_rng(1))
    counts: Counter = Counter()
    for seed in range(600):
        counts.update(choose(everything, 8, 2, np.random.default_rng(seed)))
    assert len(counts) == 24
    expected = 600 * 8 / 24
    deviation = (expected * (1 - 8 / 24)) ** 0.5
    worst = max(abs(n - expected) for n in counts.values()) / deviation
    assert worst < 4.5, f"a sequence was taken {worst:.1f} standard deviations off evenness"


def test_order_of_arrival_of_completions_does_not_split_a_prompt() -> None:
    """Trainers shuffle a generation batch: completions of a prompt arrive apart."""
    shuffled = [sequences()[i] for i in np.random.default_rng(3).permutation(24)]
    assert sorted(prompts_of(choose(shuffled, 8, 4, np.random.default_rng(0))).values()) == [4, 4]


def test_of_nothing_nothing_can_be_chosen() -> None:
    with pytest.raises(ValueError, match="no sequence passed through"):
        choose([], 8, 4, np.random.default_rng(0))


def test_a_batch_of_sequences() -> None:
    some = [sequences()[i] for i in (5, 0, 4, 1)]
    batch = to_batch(some, SAMPLING)
    assert batch.temperature == 0.7
    assert batch.prompt_index.tolist() == [0, 1, 0, 1], "equal prompts share an index"
    for n, sequence in enumerate(some):
        assert batch.input_ids[n][batch.completion_mask[n]].tolist() == list(sequence.completion_ids)
        prompt = batch.attention_mask[n] & ~batch.completion_mask[n]
        assert batch.input_ids[n][prompt].tolist() == list(sequence.prompt_ids)
        assert bool((batch.input_ids[n][~batch.attention_mask[n]] == 9).all())


def scored(values: list[float | None]) -> list[RolloutSequence]:
    return [RolloutSequence((1,), (2, n), drawn_score=value) for n, value in enumerate(values)]


def test_scores_of_the_policy_that_drew() -> None:
    assert drawn_scores(scored([None, None])) is None, "today's policy drew them"
    found = drawn_scores(scored([-1.5, -1000.123456789]))
    assert found is not None and found.dtype == torch.float64 and found.tolist() == [-1.5, -1000.123456789]


def test_scores_known_for_some_alone_are_an_error() -> None:
    """Taking all for today's would leave the others without their weights."""
    with pytest.raises(ValueError, match="2 of 3"):
        drawn_scores(scored([-1.5, None, -2.0]))


def test_prior_weights_are_minus_the_log_of_how_prompts_were_drawn() -> None:
    even = [RolloutSequence((p,), (2,), draw_probability=0.25) for p in range(4)]
    assert prior_log_weights(even) is None
    chances = [0.5, 0.25, 0.125]
    uneven = [RolloutSequence((p,), (2,), draw_probability=chance) for p, chance in enumerate(chances)]
    found = prior_log_weights(uneven)
    assert found is not None and found.dtype == torch.float64
    torch.testing.assert_close(found.exp() * torch.tensor(chances, dtype=torch.float64), torch.ones(3).double())


def test_training_sequences_with_weights_where_every_one_is_known() -> None:
    training = to_training_sequences(sequences(2, 2), SAMPLING, torch.device("cpu"))
    assert training.advantages.tolist() == [0.0, 1.0, 100.0, 101.0]
    assert training.weights is not None and training.weights.tolist() == [0.0, 0.5, 0.0, 0.5]
    assert training.batch.prompt_index.tolist() == [0, 0, 1, 1]
    unknown = [*sequences(1, 2), RolloutSequence((5,), (6,), advantage=1.0)]
    assert to_training_sequences(unknown, SAMPLING, torch.device("cpu")).weights is None
