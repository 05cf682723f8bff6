"""Advantages and weights against the table of theory section 5, written out by hand, and against the losses
themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from entropy_core.gradients import per_sequence_gradients
from entropy_core.weighting import WEIGHTING_SCHEMES, advantages, longest_of_prompt, sequence_weights
from tests.entropy_core.support import whole_space
from tests.oracle.comparison import assert_close
from tests.oracle.enumeration import CompletionSpace, flatten_rows, token_terms
from tests.oracle.policy import RecurrentPolicy

# Two prompts, three completions each, interleaved as a shuffling trainer would leave them.
REWARDS = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.0, 0.5], dtype=torch.float64)
PROMPT = torch.tensor([4, 9, 4, 9, 4, 9])
LENGTHS = torch.tensor([2, 4, 3, 1, 5, 2])
LONGEST = 8
EPSILON = 1e-4

# Prompt 4: rewards 1, 0, 0, mean 1/3, standard deviation sqrt(1/3). Prompt 9: 0.5, 2, 0.5, mean 1, deviation
# sqrt(3/4).
CENTRED = [2 / 3, -1 / 2, -1 / 3, 1.0, -1 / 3, -1 / 2]
DEVIATION = [math.sqrt(1 / 3), math.sqrt(3 / 4)] * 3
STANDARDISED = [a / (d + EPSILON) for a, d in zip(CENTRED, DEVIATION, strict=True)]
OTHERS = [1 - 0, 0.5 - 1.25, 0 - 0.5, 2 - 0.5, 0 - 0.5, 0.5 - 1.25]
FROM_BATCH_MEAN = [r - 4 / 6 for r in REWARDS.tolist()]
TOTAL_LENGTH = 17

BY_HAND = {
    "dr_grpo": (CENTRED, [a / (6 * LONGEST) for a in CENTRED]),
    "grpo": (STANDARDISED, [a / (6 * t) for a, t in zip(STANDARDISED, LENGTHS.tolist(), strict=True)]),
    "dapo": (STANDARDISED, [a / TOTAL_LENGTH for a in STANDARDISED]),
    "rloo": (OTHERS, [a / 6 for a in OTHERS]),
    "reinforce": (FROM_BATCH_MEAN, [a / 6 for a in FROM_BATCH_MEAN]),
}


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_every_scheme_is_written_out() -> None:
    assert set(BY_HAND) == set(WEIGHTING_SCHEMES)


@pytest.mark.parametrize("scheme", BY_HAND)
def test_advantages_and_weights_by_hand(scheme: str) -> None:
    wanted_advantages, wanted_weights = BY_HAND[scheme]
    others = {f"this is {name}": column(values[1]) for name, values in BY_HAND.items() if name != scheme}
    assert_close(advantages(REWARDS, PROMPT, scheme), column(wanted_advantages), 1e-12, f"advantage of {scheme}")
    weights = sequence_weights(REWARDS, PROMPT, LENGTHS, scheme, max_completion_length=LONGEST)
    assert weights.dtype == torch.float64
    assert_close(weights, column(wanted_weights), 1e-12, f"weight of {scheme}", others)


def test_dr_grpo_by_the_longest_completion_of_the_prompt() -> None:
    longest = [5, 4] * 3
    wanted = column([a / (6 * length) for a, length in zip(CENTRED, longest, strict=True)])
    weights = sequence_weights(REWARDS, PROMPT, LENGTHS, "dr_grpo", length_normalizer="prompt_longest")
    batch_longest = column([a / (6 * 5) for a in CENTRED])
    assert_close(
        weights,
        wanted,
        1e-12,
        "L is L_max(p)",
        {"the longest of the batch, not of the prompt": batch_longest},
    )
    assert longest_of_prompt(LENGTHS, PROMPT).tolist() == longest


def test_single_precision_and_integer_rewards_are_exact() -> None:
    rewards = torch.tensor([1, 0, 0, 1], dtype=torch.int64)
    index = torch.tensor([0, 0, 1, 1])
    assert_close(advantages(rewards, index, "dr_grpo"), column([0.5, -0.5, -0.5, 0.5]), 1e-14, "integer rewards")
    assert advantages(rewards.float(), index, "grpo").dtype == torch.float64


@pytest.mark.parametrize("scheme", ["dr_grpo", "grpo", "dapo", "rloo"])
def test_a_uniform_group_has_no_weight(scheme: str) -> None:
    weights = sequence_weights(torch.ones(4), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 3, 4]), scheme, 8)
    assert not weights.any() and torch.isfinite(weights).all(), "a group of equal rewards has no gradient, and no NaN"


@pytest.fixture(scope="module")
def step(space: CompletionSpace) -> tuple[list[int], Tensor]:
    """Twelve completions, four a prompt, and their rewards."""
    rows = [121 * prompt + offset for prompt in range(3) for offset in (0, 2, 9, 77)]
    return rows, torch.tensor([0.0, 1.0, 0.3, 1.0, 1.0, 1.0, 0.0, 0.2, 0.5, 0.0, 0.0, 1.0], dtype=torch.float64)


def loss_of(scheme: str, logprobs: Tensor, mask: Tensor, advantage: Tensor, normalizer: Tensor | float) -> Tensor:
    """Each algorithm's loss as its paper writes it, with a ratio that is one in value and alive in
    gradient."""
    ratio = torch.exp(logprobs - logprobs.detach()) * mask
    token_losses = -ratio * advantage[:, None]
    if scheme == "dr_grpo":
        return (token_losses.sum(1) / normalizer).mean()
    if scheme == "grpo":
        return (token_losses.sum(1) / mask.sum(1)).mean()
    if scheme == "dapo":
        return token_losses.sum() / mask.sum()
    return -(advantage * logprobs.sum(1)).mean()


def advantages_by_loops(rewards: list[float], prompts: list[int], scheme: str) -> list[float]:
    """Group by group, in plain Python."""
    result = []
    for n, reward in enumerate(rewards):
        group = [r for r, p in zip(rewards, prompts, strict=True) if p == prompts[n]]
        others = [r for m, (r, p) in enumerate(zip(rewards, prompts, strict=True)) if p == prompts[n] and m != n]
        mean = sum(group) / len(group)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        result.append(
            {
                "dr_grpo": reward - mean,
                "grpo": (reward - mean) / (deviation + EPSILON),
                "dapo": (reward - mean) / (deviation + EPSILON),
                "rloo": reward - sum(others) / len(others),
                "reinforce": reward - sum(rewards) / len(rewards),
            }[scheme]
        )
    return result


@pytest.mark.parametrize("normalizer", ["constant", "prompt_longest"])
@pytest.mark.parametrize("scheme", BY_HAND)
def test_weighted_rows_are_the_gradient_of_the_loss(
    policy: RecurrentPolicy,
    space: CompletionSpace,
    step: tuple[list[int], Tensor],
    scheme: str,
    normalizer: str,
) -> None:
    """g = −Σ_i w_i ∇S_i equals autograd through the loss that the scheme stands for."""
    rows, rewards = step
    batch = whole_space(space).select(rows)
    prompts, lengths = space.prompt_index[rows], space.lengths[rows]
    weights = sequence_weights(rewards, prompts, batch.completion_lengths, scheme, 4, normalizer)
    gradient = -weights @ flatten_rows(per_sequence_gradients(policy, batch))
    longest = torch.tensor([max(float(t) for t, q in zip(lengths, prompts, strict=True) if q == p) for p in prompts])
    advantage = column(advantages_by_loops(rewards.tolist(), prompts.tolist(), scheme))
    logprobs, _ = token_terms(policy, space)
    loss = loss_of(
        scheme,
        logprobs[rows],
        space.mask[rows],
        advantage,
        longest.double() if normalizer == "prompt_longest" else 4.0,
    )
    wanted = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(policy.parameters()))])
    assert_close(
        gradient,
        wanted,
        1e-10,
        f"−Σ w ∇S is not the gradient of the {scheme} loss",
        {
            "the sign": -wanted,
            "the number of sequences is missing": wanted * len(rows),
            "the number of tokens is missing": wanted * float(lengths.sum()),
            "divided by the number of prompts, not of sequences": wanted * len(rows) / 3,
        },
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="dr_grpo"):
        advantages(REWARDS, PROMPT, "gspo")
    with pytest.raises(ValueError):
        sequence_weights(REWARDS, PROMPT, LENGTHS, "dr_grpo")
    with pytest.raises(ValueError):
        sequence_weights(REWARDS, PROMPT, LENGTHS, "dr_grpo", 8, "mean")
    with pytest.raises(ValueError, match="sequence 1"):
        advantages(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]), "dr_grpo")
    for scheme in ("rloo", "grpo", "dapo"):
        with pytest.raises(ValueError):
            advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), scheme)
