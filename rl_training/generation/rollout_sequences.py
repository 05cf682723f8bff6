"""Generated sequences on their way to the probe: as lists of tokens, so that processes can exchange
them, and as batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from rl_training.probe.shares import TrainingSequences
from rl_training.sampling import SamplingConfig
from rl_training.sequences import RolloutSequence


def choose(
    sequences: Sequence[RolloutSequence], count: int, per_prompt: int, rng: np.random.Generator
) -> list[RolloutSequence]:
    """About `count` sequences: prompts at random, at most `per_prompt` completions of each, whole
    prompts until it is reached.

    More prompts are taken, not more completions of one, where prompts are many enough. Nothing of
    rewards is looked at.

    Raises:
        ValueError: there are no sequences.
    """
    if not sequences:
        raise ValueError(
            "no sequence passed through the trainer's compute_loss in this step: there is nothing to watch"
        )
    groups: dict[tuple[int, ...], list[RolloutSequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.prompt_ids, []).append(sequence)
    each = max(per_prompt, -(-count // len(groups)))  # ceil: more of each where prompts are few
    chosen: list[RolloutSequence] = []
    for key in (list(groups)[i] for i in rng.permutation(len(groups))):
        if len(chosen) >= count:
            break
        members = groups[key]
        take = min(each, count - len(chosen), len(members))
        chosen += [members[i] for i in rng.permutation(len(members))[:take]]
    return chosen


def to_batch(sequences: Sequence[RolloutSequence], sampling_config: SamplingConfig) -> SequenceBatch:
    """Sequences with equal prompts share a prompt index."""
    index: dict[tuple[int, ...], int] = {}
    return SequenceBatch.from_sequences(
        [s.prompt_ids for s in sequences],
        [s.completion_ids for s in sequences],
        [index.setdefault(s.prompt_ids, len(index)) for s in sequences],
        sampling_config.pad_token_id,
        sampling_config.temperature,
        [s.drawn for s in sequences],
    )


def drawn_scores(sequences: Sequence[RolloutSequence]) -> Tensor | None:
    """(N,) float64, or None where today's policy drew them.

    Raises:
        ValueError: only some have a score.
    """
    values = [s.drawn_score for s in sequences if s.drawn_score is not None]
    if 0 < len(values) < len(sequences):
        raise ValueError(
            f"{len(values)} of {len(sequences)} sequences come with the log-probability they were drawn at: all or none "
            "must; rollouts=fresh needs none"
        )
    return torch.tensor(values, dtype=torch.float64) if values else None


def prior_log_weights(sequences: Sequence[RolloutSequence]) -> Tensor | None:
    """(N,) float64 log-weights against the way prompts were drawn, or None where they were drawn
    evenly.
    """
    values = torch.tensor([s.log_prior for s in sequences], dtype=torch.float64)
    return None if bool((values == values[0]).all()) else values


def to_training_sequences(
    sequences: Sequence[RolloutSequence],
    sampling_config: SamplingConfig,
    device: torch.device,
    max_norm: float | None = None,
) -> TrainingSequences:
    """All sequences of a step, with weights where every one is known: of every token where they
    were read off the loss. max_norm: of `TrainingSequences`.
    """
    batch = to_batch(sequences, sampling_config)
    return TrainingSequences(
        batch.to(device),
        torch.tensor([s.advantage for s in sequences], dtype=torch.float64, device=device),
        _weights(sequences, batch, device),
        max_norm,
    )


def _weights(sequences: Sequence[RolloutSequence], batch: SequenceBatch, device: torch.device) -> Tensor | None:
    if all(s.token_weights is not None for s in sequences):
        placed = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
        for row, s in enumerate(sequences):
            start = len(s.prompt_ids)
            placed[row, start : start + len(s.completion_ids)] = torch.tensor(s.token_weights, dtype=torch.float64)
        return placed.to(device)
    weights = torch.tensor([s.weight for s in sequences], dtype=torch.float64)
    return None if bool(weights.isnan().any()) else weights.to(device)
