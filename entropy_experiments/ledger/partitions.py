"""By what a run's loss gradient is divided: each partition's parts add up to the gradient.

by prompt and kind      right (reward from 0.5 on), wrong, cut off; whole sequences
by token                first of the completion, end of sequence, and the others by their text: digits, letters, the rest
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.gradients import batch_gradients
from entropy_core.passes.settings import PassSettings
from rl_training.sampling import Rollouts

KINDS = ("right", "wrong", "cut off")
TOKENS = ("first token", "end of sequence", "digits", "letters", "other tokens")
RIGHT_FROM = 0.5
Gradient = dict[str, Tensor]


def kind_of(reward: float | None, completion_ids: tuple[int, ...], ends: tuple[int, ...]) -> str:
    """Of one sequence; one that has no reward and was not cut off is wrong."""
    if not completion_ids or completion_ids[-1] not in ends:
        return "cut off"
    return "right" if reward is not None and reward >= RIGHT_FROM else "wrong"


def by_sequence(
    model: nn.Module,
    batch: SequenceBatch,
    weights: Tensor,
    rollouts: Rollouts,
    ends: tuple[int, ...],
    passes: PassSettings,
) -> dict[tuple[int, str], Gradient]:
    """(prompt, kind) -> its part of the loss gradient -sum_i w_i dS_i; sequences without weight are in none."""
    members: dict[tuple[int, str], list[int]] = {}
    for row, sequence in enumerate(rollouts):
        if weights[row] and sequence.prompt_index is not None:
            key = sequence.prompt_index, kind_of(sequence.reward, sequence.completion_ids, ends)
            members.setdefault(key, []).append(row)
    found = {}
    for key, rows in members.items():
        part = batch.select(rows)
        objective = score_coefficients(part, -weights[rows].to(part.device))
        found[key] = batch_gradients(model, part, [objective], passes, True)[0]
    return found


def by_token(
    model: nn.Module,
    batch: SequenceBatch,
    weights: Tensor,
    whole: Gradient,
    decode: Callable[[int], str],
    ends: tuple[int, ...],
    passes: PassSettings,
) -> dict[str, Gradient]:
    """Name of TOKENS -> its part of the loss gradient `whole`; the last is what the others leave."""
    kinds = token_kinds(batch, decode, ends)
    minus = -weights.to(batch.device).double()[:, None] * batch.completion_mask
    objectives = [
        TokenCoefficients(torch.zeros_like(minus), minus * (kinds == place)) for place in range(len(TOKENS) - 1)
    ]
    parts = batch_gradients(model, batch, objectives, passes, True)
    rest = {name: g - sum(part[name] for part in parts) for name, g in whole.items()}
    return dict(zip(TOKENS, [*parts, rest], strict=True))


def token_kinds(batch: SequenceBatch, decode: Callable[[int], str], ends: tuple[int, ...]) -> Tensor:
    """(N, L) places in TOKENS; -1 off completions."""
    mask, ids = batch.completion_mask, batch.input_ids
    kinds = torch.full(ids.shape, -1, dtype=torch.long, device=ids.device)
    of_id = {token: _kind_of_text(decode(token)) for token in ids[mask].unique().tolist()}
    for token, place in of_id.items():
        kinds[mask & (ids == token)] = 1 if token in ends else place
    first = mask & (mask.long().cumsum(1) == 1)
    kinds[first] = 0
    return kinds


def _kind_of_text(text: str) -> int:
    stripped = text.strip()
    if stripped.isdigit():
        return TOKENS.index("digits")
    return TOKENS.index("letters" if stripped.isalpha() else "other tokens")
