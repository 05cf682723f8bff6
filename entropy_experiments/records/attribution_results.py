"""Stored result of the analysis attribution: who moved entropy in the analysed step. Nats per token."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from entropy_experiments.records.record import (
    Count,
    Finite,
    Index,
    Nonnegative,
    Number,
    Probability,
    Record,
    Result,
    Rows,
    same_length,
)
from entropy_experiments.records.step_results import Unit


class SequenceShares(Record):
    """Numbers of the training sequences, in the buffer's order."""

    share: Rows[Finite]
    """Accounting share; they add up to the step's batch part."""
    horizon: Rows[Finite]
    """The same over the life of the momentum buffer."""
    prompt_index: Rows[Index]
    """Number of the sequence's prompt."""
    effect: Rows[Finite] | None = None
    """What leaving the sequence out of the step does; they do not add up. Absent where not computed."""

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        same_length(share=self.share, horizon=self.horizon, prompt_index=self.prompt_index, effect=self.effect)
        return self


class PromptShare(Record):
    """One training prompt."""

    prompt_index: Index
    """Its number."""
    prompt: str
    """Its text."""
    sequences: Count
    """Its sequences."""
    share: Finite
    """Sum of their shares."""
    horizon: Finite
    """Sum over the life of the momentum buffer."""


class PromptContribution(Record):
    """One evaluation prompt."""

    prompt_index: Index
    """Its number."""
    prompt: str
    """Its text."""
    sequences: Count
    """Its sequences."""
    contribution: Finite
    """Sum of their terms of the predicted change."""


class Concentration(Record):
    """How far a few values make up the sum of absolute values."""

    count: Count
    """Values."""
    sum: Finite
    """Their sum."""
    top: Count
    """How many top_mass is of."""
    top_mass: Probability
    """Part of the mass that the largest hold."""
    half_mass_count: Count | None
    """How many hold half of it."""
    gini: Number
    """Gini coefficient."""
    effective_number: Nonnegative
    """(sum |x|)^2 / sum x^2."""
    reason: str
    """Why numbers are null, or ""."""


class Concentrations(Record):
    """Concentration of the shares."""

    all: Concentration
    """Of all sequences."""
    lowering: Concentration
    """Of those that lowered entropy."""
    raising: Concentration
    """Of those that raised it."""


class TokenShares(Record):
    """Shares of one training sequence's tokens."""

    sequence: Count
    """Its training index."""
    prompt_index: Index
    """Its prompt."""
    share: Finite
    """Its share, the sum over the tokens."""
    reward: Number
    """Its reward."""
    tokens: Rows[Finite]
    """Share of each completion token; 0 where the policy did not draw it."""
    texts: Rows[str] | None
    """Text of each."""
    drawn: Rows[bool] | None
    """Whether the policy drew it; null: all of them."""

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        same_length(tokens=self.tokens, texts=self.texts, drawn=self.drawn)
        return self


class TokenAttribution(Record):
    """Shares by token."""

    closure: Nonnegative
    """Largest |sum over tokens - share| over the largest |share|."""
    sequences: Rows[TokenShares]
    """Of the sequences in top_sequences."""


class EvaluationSide(Record):
    """Which evaluation sequences the predicted change is made of."""

    total: Finite
    """The predicted change."""
    contribution: Rows[Finite]
    """Term of each evaluation sequence."""
    own_change: Rows[Finite] | None
    """Predicted change of the entropy of its own tokens, nats per completion."""
    lowering: Count
    """Sequences with a term below 0."""
    raising: Count
    """Sequences with a term above 0."""
    concentration: Concentration
    """Of the terms."""
    prompts: Rows[PromptContribution]
    """By prompt, most lowering first."""

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        same_length(contribution=self.contribution, own_change=self.own_change)
        return self


class GroupShares(Record):
    """One group of sequences."""

    side: Literal["training", "evaluation"]
    """Which buffer."""
    by: Literal["ending", "advantage"]
    """What they are grouped by."""
    group: str
    """The group's name."""
    sequences: Count
    """Its sequences."""
    value: Finite
    """Sum of their shares (training) or terms (evaluation)."""
    entropy: Finite
    """Nats per token of their tokens."""


class AttributionResult(Result):
    """analyses.attribution: which sequences, prompts and tokens moved entropy in this step?"""

    unit: Unit
    """Of all shares."""
    total: Finite
    """Sum of the shares."""
    horizon_factor: Finite
    """A batch's change over the life of the momentum buffer over that in its own step."""
    horizon_total: Finite
    """total times that."""
    sequences: SequenceShares
    """By training sequence."""
    prompts: Rows[PromptShare]
    """By training prompt, most lowering first."""
    sum_of_effects: Number
    """Sum of the effects of leaving out, which is not the step's."""
    concentration: Concentrations
    """How far a few sequences make up the change."""
    top_sequences: Rows[Count]
    """Training indices: the most lowering, then the most raising ones."""
    tokens: TokenAttribution | None
    """By token; null where not computed."""
    evaluation: EvaluationSide | None
    """The evaluation side; null where not computed."""
    groups: Rows[GroupShares]
    """By ending and by the sign of the advantage."""
