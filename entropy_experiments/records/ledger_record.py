"""What `ledger` found: the predicted change of entropy over a run, divided among what went into its steps."""

from __future__ import annotations

from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.record import Count, Index, Number, Record, Rows
from entropy_experiments.records.summary import AgreementRecord


class LedgerRow(Record):
    """One part of a partition."""

    name: str
    """What it is."""
    prompt_index: Index | None = None
    """Of a training prompt: its number in the task; absent of others."""
    share: StudentEstimate
    """Its accounting share of the predicted change, nats per token."""


class Ledger(Record):
    """A run's change of entropy, step by step predicted, and by whom."""

    first_step: Count
    """Optimizer step that it begins with, from 1."""
    last_step: Count
    """Optimizer step that it ends with."""
    predicted: StudentEstimate
    """Sum over the steps of the first-order change, nats per token."""
    measured: StudentEstimate
    """Change of entropy from before the first step to after the last, on fresh completions of the same prompts at both."""
    agreement: AgreementRecord | None = None
    """The two against each other, a held-out prompt left out of both at once; null where its error is not known."""
    by_kind: Rows[LedgerRow]
    """Right, wrong and cut-off sequences; momentum from before the first step; weight decay. They add up to `predicted`."""
    by_token: Rows[LedgerRow]
    """By place and text of the training tokens; with the two last rows of `by_kind` they add up to `predicted`."""
    by_prompt: Rows[LedgerRow]
    """The training prompts of largest shares, and the sum of the others."""
    prompts: Count
    """Training prompts."""
    eval_sequences: Count
    """Completions of held-out prompts at each step, over which errors are."""
    worst_gap: Number
    """Distance of the weights had from a checkpoint's, relative to the way from the last checkpoint; the largest one."""
