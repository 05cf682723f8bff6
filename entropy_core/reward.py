"""First-order change of mean reward along a direction, on sequences that took no part in what is judged.

    D J = E[ r D S ]   ~   n/(n-1) sum_t p_t ( r_t - sum_s p_s r_s ) D S_t          D S_t = <dS_t, u>

p: weights of the sequences, 1/n each where the policy drew them, normalised ratios to it otherwise. The mean in the bracket is
the baseline; with equal weights n/(n - 1) makes it that of the other sequences, and the estimate unbiased.
Symbols: S score, u direction. Source: docs/analyses/prices.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reward_derivative(rewards: Tensor, scores: Tensor, weights: Tensor | None = None) -> Tensor:
    """(columns,) change of mean reward a unit of each direction.

    Args:
        rewards: (N,). scores: (N, columns) D S_t. weights: (N,) of any scale; None: equal.

    Raises:
        ValueError: fewer than two sequences.
    """
    count = len(rewards)
    if count < 2:
        raise ValueError("a change of mean reward needs two sequences: its baseline is the mean of the others")
    rewards, scores = rewards.double(), scores.double()
    p = torch.full_like(rewards, 1 / count) if weights is None else weights.double() / weights.double().sum()
    return count / (count - 1) * ((p * (rewards - p @ rewards)) @ scores)


def reward_derivative_left_out(rewards: Tensor, scores: Tensor, prompt_index: Tensor, weights: Tensor) -> Tensor:
    """(B, columns) `reward_derivative` without each prompt; NaN where a single sequence is left."""
    kept = [prompt_index != prompt for prompt in prompt_index.unique()]
    nothing = scores.new_full((scores.shape[1],), torch.nan, dtype=torch.float64)
    return torch.stack(
        [reward_derivative(rewards[k], scores[k], weights[k]) if int(k.sum()) > 1 else nothing for k in kept]
    )
