"""Whether a sequence is scored by the same policy whatever stands beside it in a batch, and as it was drawn.

An analysis passes sequences in batches of its own making, and every number takes the log-probability of a sequence for a function
of that sequence. Rotary positions that are scaled by the longest sequence of a batch (dynamic NTK, LongRoPE) break that beyond a
length, and so do experts with a capacity for the whole batch, statistics of the batch, or noise that evaluation mode leaves on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.scores import token_statistics
from rl_training.errors import UserError
from rl_training.premises.batch_dependence import LongestSequence
from rl_training.premises.drawn_as_scored import generation_finding
from rl_training.premises.full_precision import agreement, coarsest_dtype

_ROWS, _TOKENS = 4, 8
"""Sequences that are scored alone and together, and tokens of each: fewer than any context that is extended."""

_SHORTER = (
    "analyse completions within the context that is not extended (entropy_analysis.sampling.max_completion_length), or train "
    "with a scaling that does not depend on length (linear, yarn, llama3)"
)


def refuse_dependence(model: nn.Module, batches: Sequence[SequenceBatch]) -> None:
    """Raises UserError where what the model makes of a sequence depends on its batch.

    Args:
        model: the policy.
        batches: the sides of an analysis, on the model's device.
    """
    longest = max(batches, key=lambda batch: int(batch.scored_lengths.max()))
    _refuse_company(model, longest)
    tokens = longest.input_ids[0][longest.attention_mask[0]].tolist()
    found = LongestSequence(model, tokens).finding(int(longest.scored_lengths.max()))
    if found is not None:
        raise UserError(f"{found}; {_SHORTER}")


def refuse_other_drawing(model: nn.Module, batch: SequenceBatch) -> None:
    """Raises UserError where `generate` draws from another distribution than sequences are scored by.

    Args:
        model: the policy, whole in this process.
        batch: a prompt to draw of, on the model's device, and the temperature.
    """
    prompt = batch.input_ids[0][batch.attention_mask[0] & ~batch.completion_mask[0]].tolist()
    found = generation_finding(model, prompt[-_TOKENS:], batch.temperature)
    if found is not None:
        raise UserError(
            f"{found}: its completions say nothing of the policy that is differentiated; train a model with a plain cache"
        )


def _refuse_company(model: nn.Module, batch: SequenceBatch) -> None:
    """Raises UserError where the last tokens of a few sequences have other log-probabilities together than alone."""
    rows = zip(batch.input_ids, batch.attention_mask, strict=True)
    ends = {tuple(ids[mask][-_TOKENS:].tolist()): None for ids, mask in rows}  # beginnings may all be the template's
    pieces = [piece for piece in ends if len(piece) > 1][:_ROWS]
    if not pieces:
        return
    together = _scored(model, pieces, batch)
    alone = torch.cat([_scored(model, [piece], batch) for piece in pieces])
    allowed = agreement(coarsest_dtype(model)).logprob * (2 + _TOKENS / 4)
    worst = int((together - alone).abs().argmax())
    if not float((together - alone).abs()[worst]) <= allowed:
        raise UserError(
            f"the log-probability of a sequence is {float(together[worst]):.6g} nats in a batch and {float(alone[worst]):.6g} "
            "alone: the model routes or normalises by the batch, or draws random numbers in evaluation mode, so that no number "
            "here would be one of the policy; train without that (experts without a capacity, for example)"
        )


def _scored(model: nn.Module, pieces: Sequence[tuple[int, ...]], like: SequenceBatch) -> Tensor:
    """(n,) log-probabilities of all tokens but each one's first."""
    parts = [[list(p[:1]) for p in pieces], [list(p[1:]) for p in pieces], list(range(len(pieces)))]
    batch = SequenceBatch.from_sequences(*parts, pad_token_id=0, temperature=like.temperature)
    return token_statistics(model, batch.to(like.device)).scores()
