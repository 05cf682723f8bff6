"""Stored results of the analyses that look at buffers and kernels: buffers and prompt_structure.
Their questions and formulas: docs/analyses; what makes them: entropy_experiments/analyses.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from entropy_experiments.records.estimates import Mean
from entropy_experiments.records.record import (
    Count,
    Finite,
    Nonnegative,
    Number,
    Probability,
    Record,
    Result,
    Rows,
    same_length,
)

# ---- buffers


class BufferDescription(Record):
    """One quantity of one buffer, of the sequences that have it."""

    sequences: Count
    """Sequences that have the quantity."""
    prompts: Count
    """Prompts that they answer."""
    mean: Number
    """Mean over the sequences, in the quantity's unit."""
    standard_error: Nonnegative
    """Of the mean, a jackknife over prompts."""
    deviation: Nonnegative
    """Standard deviation over the sequences."""


class Histogram(Record):
    """Shares of each buffer's sequences by bin."""

    edges: Rows[Finite]
    """Edges of the bins, one more than bins; empty without values."""
    evaluation: Rows[Finite]
    """Share of the evaluation sequences in each bin."""
    training: Rows[Finite]
    """Share of the training sequences in each bin."""

    @model_validator(mode="after")
    def _bins(self) -> Self:
        same_length(edges=self.edges[1:], evaluation=self.evaluation, training=self.training)
        return self


Quantity = Literal["length", "entropy", "reward", "truncated"]


class BufferComparison(Record):
    """One quantity of both buffers."""

    evaluation: BufferDescription
    """The evaluation buffer."""
    training: BufferDescription
    """The training buffer."""
    standardised_difference: Number
    """(training mean - evaluation mean) over the pooled standard deviation."""
    probability_larger: Mean
    """P(training > evaluation) + P(equal)/2."""
    p_value: Probability
    """Two-sided, of that probability being 1/2."""
    differs: bool
    """Whether that is beyond chance at 5%, corrected for several quantities (Holm)."""
    reason: str
    """Why a number is null, or ""."""
    histogram: Histogram
    """Both distributions."""


class BuffersResult(Result):
    """analyses.buffers: how the training buffer differs from the evaluation buffer."""

    quantities: dict[Quantity, BufferComparison]
    """length (tokens), entropy (nats per token), reward, truncated (share cut at the maximum length)."""
    shared_prompts: Count
    """Prompts that are in both buffers."""


# ---- prompt_structure


class Duplicates(Record):
    """Equal sequences of a buffer."""

    sequences: Count
    """Sequences."""
    distinct: Count
    """Distinct ones among them."""
    equal_pairs: Count
    """Pairs of sequences that are equal."""


class PairBlock(Record):
    """Kernel entries of one kind of pair."""

    pairs: Count
    """How many."""
    mean: Number
    """Their mean: nats^2 x P, or a cosine."""
    quantiles: Annotated[Rows[Finite], Field(min_length=5, max_length=5)] | None
    """5, 25, 50, 75 and 95%; null without pairs."""


class PermutationTest(Record):
    """A difference against its permutation distribution."""

    difference: Number
    """What was observed."""
    p_value: Probability
    """Two-sided."""
    null_mean: Number
    """Mean of the permuted differences."""
    null_deviation: Nonnegative
    """Their standard deviation."""
    null_low: Number
    """Their 2.5% quantile."""
    null_high: Number
    """Their 97.5% quantile."""
    reason: str | None
    """Why there is no test; null where there is one."""


class TrainingPairs(Record):
    """Pairs of training sequences by whether they share their prompt."""

    self: PairBlock
    """Each sequence with itself."""
    same_prompt: PairBlock
    """Distinct sequences of one prompt."""
    cross_prompt: PairBlock
    """Sequences of two prompts."""
    test: PermutationTest
    """Same prompt - other prompts."""


class BufferPairs(Record):
    """Pairs of an evaluation and a training sequence by whether they share their prompt."""

    same_prompt: PairBlock
    """Sequences of one prompt."""
    cross_prompt: PairBlock
    """Sequences of two prompts."""
    equal_to_training: Count
    """Evaluation sequences left out because they are training sequences too."""
    test: PermutationTest
    """Same prompt - other prompts."""


class CorrectnessPairs(Record):
    """Pairs of one prompt's training sequences by whether both, one or none is correct."""

    correct_correct: PairBlock
    """Both correct."""
    correct_wrong: PairBlock
    """One correct, one wrong."""
    wrong_wrong: PairBlock
    """Both wrong."""
    test: PermutationTest
    """Alike - unlike, within prompts."""


class TrainingStructure(Record):
    """The training buffer's own kernel."""

    raw: TrainingPairs
    """Of K1."""
    cosine: TrainingPairs
    """Of its cosine."""
    signs_agree: bool | None
    """Whether both differ from their null means in the same direction; null without tests."""


class EvaluationStructure(Record):
    """The kernel between the buffers."""

    raw: BufferPairs
    """Of K1."""
    cosine: None
    """Not computed."""
    cosine_reason: str
    """Why not."""


class GroupStructure(Record):
    """Correct and wrong completions of one prompt."""

    rule: str
    """What is called correct."""
    correct: Count
    """Correct sequences."""
    wrong: Count
    """Wrong sequences."""
    neither: Count
    """Sequences that are neither."""
    raw: CorrectnessPairs
    """Of K1."""
    cosine: CorrectnessPairs
    """Of its cosine."""
    signs_agree: bool | None
    """Whether both differ from their null means in the same direction; null without tests."""


class PairSum(Record):
    """A sum over one kind of ordered pair."""

    value: Number
    """Nats per token."""
    pairs: Count
    """How many pairs."""


class SingleBatch(Record):
    """What the training batch would predict of its own step's batch part, nats per token; the first three add up to value."""

    self: PairSum
    """Each sequence with itself."""
    same_prompt: PairSum
    """Distinct sequences of one prompt."""
    cross_prompt: PairSum
    """Sequences of two prompts."""
    value: Number
    """V, their sum."""
    evaluation_value: Number
    """The same weights with the evaluation buffer as entropy side."""
    u_statistic: Mean
    """U over prompts, free of the bias; null with one prompt."""
    bias: Mean
    """V - U."""
    reason: str | None
    """Why a number is null."""


class PromptStructureResult(Result):
    """analyses.prompt_structure: do sequences of one prompt move each other more than those of others?"""

    n_train: Count
    """Training sequences."""
    n_prompts: Count
    """Their prompts."""
    without_gradient: Count
    """Training sequences without a gradient, which have no cosine."""
    duplicates: Duplicates
    """Equal training sequences, whose pairs are in no block."""
    permutations: Count
    """Permutations of each test."""
    seed: Count
    """Of the permutations."""
    train: TrainingStructure
    """Training sequences with each other."""
    evaluation: EvaluationStructure
    """Evaluation with training sequences."""
    within_group: GroupStructure
    """Correct and wrong completions of one prompt."""
    single_batch: SingleBatch
    """One batch in both roles."""
