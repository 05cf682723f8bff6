"""A few sequences with their log-probabilities under the policy that is saved: who loads the
checkpoint must find the same ones.

    S_i = sum_k log pi(a_ik | c_ik)        over all of a completion's tokens, whether the policy drew them or not

Weights, base model, adapter, its initialisation, precision, vocabulary: whatever makes the loaded
policy another one than the saved one shows in S. Computed in evaluation mode and without mixed
precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from entropy_core.batch import SequenceBatch
from entropy_core.passes.forward import input_device
from entropy_core.scores import token_statistics
from rl_training.premises.full_precision import agreement, coarsest_dtype, without_autocast
from rl_training.run.sidecar import SidecarWitness
from rl_training.sequences import RolloutSequence

SEQUENCES, COMPLETION_TOKENS, TOKENS = 4, 64, 4096


def choose_witness(sequences: Sequence[RolloutSequence]) -> list[RolloutSequence]:
    """Up to 4 sequences of different prompts, the shortest of them, each the prompt's longest
    completion; few enough tokens that saving a checkpoint does not notice.
    """
    longest: dict[tuple[int, ...], RolloutSequence] = {}
    for sequence in sequences:
        known = longest.setdefault(sequence.prompt_ids, sequence)
        if len(sequence.completion_ids) > len(known.completion_ids):
            longest[sequence.prompt_ids] = sequence
    chosen, tokens = [], 0
    for sequence in sorted(longest.values(), key=lambda s: (len(s.prompt_ids), s.prompt_ids)):
        tokens += len(sequence.prompt_ids) + min(len(sequence.completion_ids), COMPLETION_TOKENS)
        if len(chosen) == SEQUENCES or (chosen and tokens > TOKENS):
            break
        if sequence.prompt_ids and sequence.completion_ids:
            chosen.append(sequence)
    return chosen


def witness_of(
    model: nn.Module, sequences: Sequence[RolloutSequence], temperature: float, pad_token_id: int
) -> SidecarWitness | None:
    """What to record of the policy as it is now; None where there are no sequences."""
    chosen = choose_witness(sequences)
    if not chosen:
        return None
    prompts = [list(s.prompt_ids) for s in chosen]
    completions = [list(s.completion_ids[:COMPLETION_TOKENS]) for s in chosen]
    scores = _scores(model, prompts, completions, temperature, pad_token_id)
    return SidecarWitness(prompt_ids=prompts, completion_ids=completions, scores=scores)


def witness_differences(
    model: nn.Module, witness: SidecarWitness, temperature: float, pad_token_id: int, recorded: torch.dtype
) -> list[tuple[float, float]]:
    """For each sequence |S found - S recorded|, nats (NaN where one is not finite), and what
    rounding explains of it.

    Args:
        recorded: what the model's weights were in when S was recorded.
    """
    found = _scores(model, witness.prompt_ids, witness.completion_ids, temperature, pad_token_id)
    coarsest = max((coarsest_dtype(model), recorded), key=lambda dtype: torch.finfo(dtype).eps)
    allowed = agreement(coarsest).logprob
    return [
        (abs(now - then), allowed * (2 + len(completion) / 4))
        for now, then, completion in zip(found, witness.scores, witness.completion_ids, strict=True)
    ]


def worst_difference(differences: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """The (difference, tolerance) furthest beyond its tolerance; None where all are within."""
    beyond = [pair for pair in differences if not pair[0] <= pair[1]]
    return max(beyond, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1], default=None)


def _scores(
    model: Any, prompts: list[list[int]], completions: list[list[int]], temperature: float, pad_token_id: int
) -> list[float]:
    index = list(range(len(prompts)))
    batch = SequenceBatch.from_sequences(prompts, completions, index, pad_token_id, temperature)
    with without_autocast(model):
        return token_statistics(model, batch.to(input_device(model))).scores().tolist()
