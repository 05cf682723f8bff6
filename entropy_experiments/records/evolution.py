"""`evolution.json` of a sweep: what its checkpoints say together, a run at a time. Changes of entropy are in nats per token."""

from __future__ import annotations

import math
from typing import Self

from pydantic import model_validator

from entropy_experiments.records.estimates import Estimate, LargestPartRecord, Mean, Measurement
from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.law_results import LawResult
from entropy_experiments.records.record import (
    Count,
    Finite,
    Index,
    Number,
    Probability,
    Record,
    Rows,
    same_length,
)
from entropy_experiments.records.step_results import Estimator, Unit
from entropy_experiments.records.summary import AgreementRecord, Parts, StepParts
from entropy_experiments.statistics.confidence import Known
from entropy_experiments.statistics.correlation import Correlation
from rl_training.intervals import interval


class ReasonedMean(Mean):
    """A number, or why it is not known."""

    reason: str | None
    """Why a number is null."""

    def known(self) -> Known | None:
        """The number with the normal 95% interval of its error."""
        if self.value is None or self.standard_error is None:
            return None if self.value is None else Known(self.value)
        return Known(self.value, *interval(self.value, self.standard_error, math.inf))


class ByAdvantage(Record):
    """Sums of the sequences' shares, nats per token."""

    above: Finite
    """Of those rewarded above their prompt's mean."""
    below: Finite
    """Of those rewarded below it."""


class BufferSizes(Record):
    """Sequences of both buffers."""

    evaluation: Count
    """Of the evaluation buffer."""
    training: Count
    """Of the training buffer."""


class CheckpointRow(Record):
    """What one analysis says of its checkpoint."""

    step: Count
    """Its training step."""
    folder: str
    """Name of its results folder."""
    entropy: Estimate
    """Entropy before the step, nats per token."""
    reward: Estimate | None
    """Mean reward of the evaluation buffer; null where nothing was rewarded."""
    estimator: Estimator | None
    """Of the prediction; null without one."""
    predicted: StepParts | None
    """Predicted change by the next step and its parts."""
    actual: Measurement | None
    """Measured change by the next step."""
    agreement: AgreementRecord | None
    """The prediction against that."""
    by_advantage: ByAdvantage | None
    """Shares of the change; null where they were not computed."""
    sequences: BufferSizes
    """Sizes of the buffers."""
    failed_checks: Rows[str]
    """Self-checks that failed."""
    failed_analyses: Rows[str]
    """Analyses that failed."""
    kernel_norm: ReasonedMean | None
    """Root mean square of K1's entries, nats^2 x P; this and what follows: null without a kernel."""
    effective_rank: ReasonedMean | None
    """Directions that the evaluation sequences' rows of K1 point in."""
    training_rank: ReasonedMean | None
    """Directions that the training sequences' gradients point in."""
    same_prompt_share: ReasonedMean | None
    """Share of the squared cosines of training gradients that is of pairs of one prompt."""
    same_prompt_pairs: Probability
    """Share of the pairs that are of one prompt."""

    @property
    def failed(self) -> list[str]:
        """Names of the self-checks and analyses that failed."""
        return [*self.failed_checks, *self.failed_analyses]

    @property
    def change(self) -> Known | None:
        """The predicted change by the whole step."""
        return None if self.predicted is None else self.predicted.total.known()

    @property
    def measured(self) -> Known | None:
        """The measured change."""
        return None if self.actual is None else self.actual.known()

    @property
    def predicted_and_measured(self) -> tuple[float, float] | None:
        """Both values; None where one is not known."""
        return None if self.change is None or self.measured is None else (self.change.value, self.measured.value)

    @property
    def trustworthy(self) -> bool | None:
        """Whether the measurement is to be trusted; None without one."""
        return None if self.actual is None else self.actual.trustworthy


class Comparable(Record):
    """Evaluation prompts, by number and text: what can be compared between checkpoints."""

    prompts: Count
    """In every checkpoint."""
    of: Count
    """In any checkpoint."""

    @property
    def same_everywhere(self) -> bool:
        """Whether all checkpoints have the same evaluation prompts."""
        return self.prompts == self.of


class Comparison(Record):
    """What entropy did between two checkpoints, and what the steps between them were predicted to do."""

    from_step: Count
    """Training step of the earlier one."""
    to_step: Count
    """Training step of the later one."""
    observed: Estimate
    """What entropy did on the evaluation prompts that all checkpoints share."""
    expected: Estimate
    """What the steps were predicted to do, added up."""
    difference: Estimate
    """observed - expected."""


class RewardPrice(Record):
    """What a unit of mean reward cost in entropy between two checkpoints."""

    entropy_change: Estimate
    """Change of entropy, nats per token."""
    reward_change: Estimate
    """Change of mean reward."""
    price: Estimate
    """-(change of entropy) / (change of reward), nats per token for one more of mean reward."""
    reason: str | None
    """Why there is no price."""


class LosingPrompts(Record):
    """Do the same evaluation prompts lose entropy at both checkpoints?"""

    spearman: Number
    """Rank correlation of the prompts' parts of the predicted changes."""
    prompts: Count
    """Prompts in it."""
    reason: str | None
    """Why there is none."""


class KernelAlignment(ReasonedMean):
    """Do both kernels couple the same evaluation prompts? Debiased centred kernel alignment: 0 no more than chance, 1 alike."""

    p_value: Probability
    """Of the prompts of one kernel permuted, one-sided."""
    prompts: Count
    """Evaluation prompts in common."""


class KernelCosine(Record):
    """Cosine of both kernels as means over (evaluation prompt, training prompt)."""

    value: Number
    """The cosine."""
    prompts: Count
    """Training prompts in common."""
    reason: str | None
    """Why it is null."""


class ClusterFlow(Record):
    """How the clusters of training gradients pass into one another, by the training prompts of both checkpoints."""

    prompts: Count | None
    """Training prompts in common; null where clusters were not looked for."""
    earlier: Rows[Count]
    """Numbers of the earlier checkpoint's clusters."""
    later: Rows[Count]
    """Numbers of the later one's."""
    flow: Rows[Rows[Finite]] | None
    """[earlier cluster, later cluster]: share of the common prompts' sequences; all add up to 1."""
    reason: str | None
    """Why there is no flow."""


class CheckpointChange(Comparison):
    """Two successive checkpoints."""

    losers: LosingPrompts
    """Whether the same prompts lose entropy."""
    price: RewardPrice
    """Price of reward."""
    alignment: KernelAlignment
    """Of the kernels."""
    cosine: KernelCosine
    """Of the kernels on shared training prompts."""
    flow: ClusterFlow
    """Of the clusters."""
    likeness: Rows[Rows[Number]] | None
    """[earlier cluster, later cluster]: correlation of their mean columns of K1 over the evaluation prompts."""


class EntropyPath(Record):
    """Since the first checkpoint, an entry a checkpoint."""

    step: Rows[Count]
    """Training steps."""
    observed: Rows[Estimate]
    """What entropy did."""
    expected: Rows[Estimate]
    """What the steps were predicted to do, added up."""

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        same_length(step=self.step, observed=self.observed, expected=self.expected)
        return self


class NextSteps(Record):
    """Predicted and measured changes of the step after each checkpoint, where both are known and the latter is to be trusted."""

    steps: Count
    """Such checkpoints."""
    untrusted: Count
    """Further ones whose measurement is not to be trusted."""
    predicted: Estimate
    """Sum of the predictions."""
    actual: Estimate
    """Sum of the measurements."""
    compared: Count
    """Checkpoints at which the error of the difference is known."""
    agreeing: Count
    """Those of them at which its 95% interval holds 0."""
    correlation: Number
    """Of predictions and measurements."""
    correlation_interval: Rows[Finite] | None
    """Its 95% interval."""
    reason: str | None
    """Why there is no correlation."""

    @property
    def correlation_found(self) -> Correlation | None:
        """The correlation with its interval."""
        if self.correlation is None or self.correlation_interval is None:
            return None
        low, high = self.correlation_interval
        return Correlation(self.correlation, low, high, self.steps)


class PromptSum(Record):
    """A training prompt over all checkpoints."""

    prompt_index: Index
    """Its number."""
    prompt: str
    """Its text."""
    share: Finite
    """Sum of its sequences' shares, nats per token."""
    low: Number = None
    """Lower end of its 95% interval, over evaluation prompts; null where checkpoints do not share these."""
    high: Number = None
    """Upper end."""
    first_in: Probability = None
    """Part of the bootstraps over evaluation prompts in which it lowered entropy most; null where not known."""
    sequences: Count
    """Its sequences."""


class WholeRun(Comparison):
    """From the first checkpoint to the last."""

    parts: Parts
    """What the parts of the steps add up to."""
    largest_part: LargestPartRecord | None
    """The largest of them; null where checkpoints do not share their evaluation prompts."""
    prediction: NextSteps
    """Was each next step predicted?"""
    price: RewardPrice | None
    """Price of reward; null for one checkpoint."""
    most_lowering_prompts: Rows[PromptSum]
    """Training prompts that lowered entropy most, by their shares in the analysed steps."""


class Laws(Record):
    """Reward against entropy."""

    training: LawResult
    """By the run's log."""
    evaluation: LawResult
    """By the evaluation buffers of the checkpoints."""


class Evolution(Record):
    """One run over its checkpoints."""

    unit: Unit
    """Of all changes."""
    checkpoints: Rows[CheckpointRow]
    """By step."""
    comparable: Comparable
    """The evaluation prompts."""
    changes: Rows[CheckpointChange]
    """Between successive checkpoints."""
    path: EntropyPath
    """Since the first checkpoint."""
    whole: WholeRun
    """Over all checkpoints."""
    law: Laws
    """Reward against entropy."""
    history: Rows[HistoryRow]
    """The run's log."""
