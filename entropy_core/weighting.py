"""Sequence weights w_i: what each training sequence contributes to the loss gradient, g = -sum_i
w_i dS_i.

On policy (ratio 1, no KL) every scheme is linear in the score gradients:

    scheme        advantage A_i                          weight w_i
    dr_grpo       r - mean of its group                  A / (N L),  L the maximum length, or the prompt's longest completion
    grpo          (r - mean) / (std + 1e-4)              A / (N T_i)
    dapo          (r - mean) / (std + 1e-4)              A / sum_j T_j
    rloo          r - mean of the others of its group    A / N
    reinforce     r - mean of the batch                  A / N

Symbols: r reward, T_i completion length, N sequences in the step; a group is the completions of one
prompt; std with Bessel's correction. Sources: Liu et al. 2025 (Dr. GRPO), Shao et al. 2024 (GRPO),
Yu et al. 2025 (DAPO), Ahmadian et al. 2024 (RLOO); docs/theory/fisher-kernel.md.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

WeightingScheme = Literal["dr_grpo", "grpo", "dapo", "rloo", "reinforce"]
WEIGHTING_SCHEMES: tuple[str, ...] = get_args(WeightingScheme)
LengthNormalizer = Literal["constant", "prompt_longest"]

STD_EPSILON = 1e-4


def advantages(rewards: Tensor, prompt_index: Tensor, scheme: WeightingScheme) -> Tensor:
    """(N,) float64 advantages of (N,) rewards.

    Raises:
        ValueError: an unknown scheme, rewards that are not finite, or a group of one where others
            are needed.

    Examples:
        >>> rewards, prompts = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> advantages(rewards, prompts, "dr_grpo").tolist()  # the group's mean is taken off
        [0.5, -0.5, 0.0, 0.0]
    """
    rewards = rewards.double()
    if not bool(torch.isfinite(rewards).all()):
        bad = int((~torch.isfinite(rewards)).nonzero()[0, 0])
        raise ValueError(
            f"the reward of sequence {bad} is {float(rewards[bad])}: every training sequence needs a finite one"
        )
    _, group = prompt_index.unique(return_inverse=True)
    counts = torch.bincount(group).double()
    total = torch.zeros_like(counts).index_add_(0, group, rewards)
    centred = rewards - (total / counts)[group]
    if scheme == "dr_grpo":
        return centred
    if scheme == "reinforce":
        return rewards - rewards.mean()
    if scheme not in WEIGHTING_SCHEMES:
        raise ValueError(f"unknown weighting scheme {scheme!r}: choose one of {', '.join(WEIGHTING_SCHEMES)}")
    if bool((counts < 2).any()):
        raise ValueError(f"scheme {scheme!r} needs at least two completions of every prompt")
    if scheme == "rloo":
        return centred * (counts / (counts - 1))[group]
    squares = torch.zeros_like(counts).index_add_(0, group, centred.square())
    return centred / ((squares / (counts - 1)).sqrt() + STD_EPSILON)[group]


def longest_of_prompt(lengths: Tensor, prompt_index: Tensor) -> Tensor:
    """(N,) the length of the longest completion of each sequence's prompt."""
    _, group = prompt_index.unique(return_inverse=True)
    longest = torch.zeros(int(group.max()) + 1, dtype=lengths.dtype, device=lengths.device)
    return longest.scatter_reduce_(0, group, lengths, "amax")[group]


def sequence_weights(
    rewards: Tensor,
    prompt_index: Tensor,
    lengths: Tensor,
    scheme: WeightingScheme = "dr_grpo",
    max_completion_length: int | None = None,
    length_normalizer: LengthNormalizer = "constant",
) -> Tensor:
    """(N,) float64 weights w_i from (N,) rewards, prompt indices and completion lengths (tokens).

    Args:
        max_completion_length: needed by dr_grpo with the constant normaliser.

    Raises:
        ValueError: as `advantages` does, or where dr_grpo has no length to divide by.

    Examples:
        >>> rewards, prompts = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> lengths = torch.tensor([2, 3, 2, 2])
        >>> sequence_weights(rewards, prompts, lengths, max_completion_length=4).tolist()
        [0.03125, -0.03125, 0.0, 0.0]
    """
    advantage = advantages(rewards, prompt_index, scheme)
    count, lengths = len(rewards), lengths.double()
    if scheme == "dr_grpo":
        if length_normalizer == "prompt_longest":
            return advantage / (count * longest_of_prompt(lengths, prompt_index))
        if length_normalizer != "constant":
            raise ValueError(f"unknown length normaliser {length_normalizer!r}: choose 'constant' or 'prompt_longest'")
        if max_completion_length is None or max_completion_length < 1:
            raise ValueError("dr_grpo with the constant normaliser divides by max_completion_length: give it, >= 1")
        return advantage / (count * max_completion_length)
    if scheme == "grpo":
        return advantage / (count * lengths)
    return advantage / (lengths.sum() if scheme == "dapo" else count)
