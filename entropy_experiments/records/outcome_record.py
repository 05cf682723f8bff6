"""What `entropy-experiments analyze --json` prints of one analysis: its numbers as a person would tell them, and the verdict."""

from __future__ import annotations

from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.record import Count, Nonnegative, Number, Probability, Record, Rows
from entropy_experiments.records.run_record import CheckpointRecord
from entropy_experiments.records.step_results import Estimator, Unit
from entropy_experiments.records.summary import AgreementRecord, Parts
from entropy_experiments.statistics.confidence import Sentence, Tone


class SentenceRecord(Record):
    """One sentence of a verdict."""

    tone: Tone
    """How it is to be taken."""
    text: str
    """The sentence."""

    @classmethod
    def of(cls, sentence: Sentence) -> SentenceRecord:
        """The record of a sentence."""
        return cls(tone=sentence.tone, text=sentence.text)


class MeasuredOutcome(Estimate):
    """The measured change of entropy, nats per token."""

    effective_sample_size: Nonnegative
    """Of the importance weights, in sequences."""
    sequences: Count | None
    """Sequences that were measured on."""

    @property
    def trustworthy(self) -> bool | None:
        """Whether the effective sample is at least half of the sequences; None where either is not known."""
        if self.effective_sample_size is None or self.sequences is None:
            return None
        return self.effective_sample_size >= self.sequences / 2


class NoiseOutcome(Record):
    """What another draw of the training buffer would make of the predicted change, nats per token."""

    standard_error: Nonnegative
    """Its standard error."""
    low: Number
    """Lower end of the 95% interval."""
    high: Number
    """Upper end."""


class SamePrompt(Record):
    """Are gradients of sequences of one prompt more alike?"""

    cosine: Number
    """Mean cosine of two training sequences' gradients with one prompt."""
    cosine_other_prompts: Number
    """The same with two prompts."""
    p_value: Probability
    """Of the difference."""
    signs_agree: bool | None
    """Whether raw K1 differs in the same direction; null where that is not known."""


class ChecksOutcome(Record):
    """Self-checks."""

    passed: Count
    """How many passed."""
    failed: Rows[str]
    """Names of those that failed."""


class Outcome(Record):
    """One analysis."""

    folder: str
    """Its results folder."""
    report: str
    """Its report.html."""
    checkpoint: CheckpointRecord
    """The analysed checkpoint."""
    unit: Unit
    """Of entropies and their changes."""
    entropy: Estimate
    """Entropy before the step."""
    estimator: Estimator | None
    """Of the prediction; null without one."""
    predicted: Estimate
    """Predicted change."""
    parts: Parts
    """The predicted change by the parts of the step."""
    measured: MeasuredOutcome
    """Measured change."""
    agreement: AgreementRecord | None
    """Prediction against measurement; null where the error of the difference is not known."""
    training_noise: NoiseOutcome | None
    """Spread over training buffers; null where it is not known."""
    same_prompt: SamePrompt
    """Likeness of gradients within prompts."""
    checks: ChecksOutcome
    """Self-checks."""
    failed_analyses: dict[str, str]
    """Analysis -> what went wrong."""
    verdict: Rows[SentenceRecord]
    """The report's sentences."""


class TriedCheckpoint(Record):
    """A checkpoint without results."""

    path: str
    """Its folder."""
    step: Count
    """Its training step."""


class NoOutcome(Record):
    """A checkpoint of a sweep that could not be analysed."""

    checkpoint: TriedCheckpoint
    """The checkpoint."""
    error: str
    """Why."""
