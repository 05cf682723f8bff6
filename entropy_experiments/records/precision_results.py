"""Stored comparison of an analysis with the precision that its run was trained in."""

from __future__ import annotations

from typing import Literal

from entropy_experiments.records.record import Count, Nonnegative, Number, Record


class PolicyRoundingRecord(Record):
    """Passes as in training against the analysis' own, over the same sequences."""

    sequences: Count
    """How many."""
    tokens: Count
    """Their completion tokens."""
    logprob: Number
    """Root mean square of the difference of a token's log-probability, nats."""
    entropy: Number
    """Entropy in the analysis' precision, nats per token."""
    entropy_in_training: Number
    """The same by passes as in training."""
    gradient: Number
    """Norm of the difference of the gradients of entropy, over the norm of the analysis' own."""
    predicted: Number
    """Predicted change by the gradient of these sequences, nats per token; null without a step."""
    predicted_in_training: Number
    """The same by the gradient of passes as in training."""


class StepRoundingRecord(Record):
    """The step in the types that the optimizer keeps weights and moments in, against the analysed one."""

    weights: str
    """Type of the trained weights."""
    moments: str
    """Types of the moments that are below float32."""
    moved: Number
    """Weights that the rounded step changes, over those that the analysed one changes."""
    length: Nonnegative | None
    """Norm of the rounded step over that of the analysed one."""
    predicted: Number
    """Predicted change by the analysed step, nats per token: of the gradient that shares are made with."""
    predicted_in_training: Number
    """The same by the rounded step."""


class TrainingPrecisionRecord(Record):
    """What is only in the numbers of training: rounding below the precision of the analysis."""

    weights: str
    """Type that the run's record gives for the model's weights; without a record, that of which the saved ones are values."""
    autocast: str
    """Mixed precision of its passes: no, bf16 or fp16."""
    policy: PolicyRoundingRecord | None
    """Of the policy; null where passes were as they are here, or cannot be made as they were."""
    step: StepRoundingRecord | None
    """Of the step; null where the optimizer keeps float32 moments."""
    finer_weights: Literal["stored", "rounded"] | None = None
    """Of an optimizer with finer weights than passes had, or than the checkpoint's: whether the checkpoint holds them, or rounded
    copies of them. Null where there are none, or no moments to see it by; absent in older folders."""
    not_compared: Literal["cut", "offloaded", "few_sequences", "not_recorded"] | None = None
    """Why `policy` is null though passes were, or may have been, in half precision; absent in older folders."""
