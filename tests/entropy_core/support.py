"""Batches for the tests: token lists laid out every way that a caller may, and a batch that is a whole
distribution."""

from __future__ import annotations

import torch

from entropy_core.batch import SequenceBatch
from tests.oracle.enumeration import CompletionSpace, ExactPolicy
from tests.oracle.model_cases import PAD_TOKEN, TokenLists


def right_padded(lists: TokenLists, temperature: float = 1.0) -> SequenceBatch:
    return SequenceBatch.from_sequences(
        lists.prompt_ids, lists.completion_ids, lists.prompt_index, PAD_TOKEN, temperature
    )


def padded(
    lists: TokenLists, left: list[int], right: list[int], pad_token: int, temperature: float = 1.0
) -> SequenceBatch:
    """Sequence n with left[n] pads before it and right[n] or more behind it, laid out by hand."""
    total = max(
        before + len(prompt) + len(completion) + after
        for before, prompt, completion, after in zip(left, lists.prompt_ids, lists.completion_ids, right, strict=True)
    )
    ids = torch.full((len(left), total), pad_token)
    attention = torch.zeros(len(left), total, dtype=torch.bool)
    completions = torch.zeros_like(attention)
    for n, (before, prompt, completion) in enumerate(zip(left, lists.prompt_ids, lists.completion_ids, strict=True)):
        start, end = before + len(prompt), before + len(prompt) + len(completion)
        ids[n, before:end] = torch.tensor(prompt + completion)
        attention[n, before:end] = True
        completions[n, start:end] = True
    return SequenceBatch(ids, attention, completions, torch.tensor(lists.prompt_index), temperature)


def left_padded(lists: TokenLists, pad_token: int = PAD_TOKEN, temperature: float = 1.0) -> SequenceBatch:
    """The layout of a generation batch: every sequence ends in the last column."""
    lengths = [len(p) + len(c) for p, c in zip(lists.prompt_ids, lists.completion_ids, strict=True)]
    left = [max(lengths) - length for length in lengths]
    return padded(lists, left, [0] * len(left), pad_token, temperature)


def alone(lists: TokenLists, n: int, temperature: float = 1.0) -> SequenceBatch:
    """Sequence n in a batch of its own, without padding."""
    one = TokenLists([lists.prompt_ids[n]], [lists.completion_ids[n]], [lists.prompt_index[n]])
    return right_padded(one, temperature)


def whole_space(space: CompletionSpace, temperature: float = 1.0) -> SequenceBatch:
    """Every completion once."""
    return right_padded(TokenLists(space.prompt_ids, space.completion_ids, space.prompt_index.tolist()), temperature)


def distribution_as_batch(exact: ExactPolicy, copies: int, temperature: float = 1.0) -> SequenceBatch:
    """Completion t stands copies·π(t|p) times, which must be whole: the sample mean over it is the exact
    expectation."""
    times = exact.probabilities * exact.space.prompts * copies
    assert torch.allclose(times, times.round(), atol=1e-9), "this policy is not a finite batch"
    rows = torch.repeat_interleave(torch.arange(len(times)), times.round().long())
    return whole_space(exact.space, temperature).select(rows)
