"""Stored result of the analysis weighting_schemes: what other weightings of the same sequences would cost in entropy."""

from __future__ import annotations

import math
from typing import Literal

from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.record import Count, Finite, Nonnegative, Number, Record, Result, Rows
from entropy_experiments.statistics.confidence import Known
from rl_training.intervals import interval

Normalisation = Literal["raw", "equal_length", "equal_gain"]


class EntropyChanges(Record):
    """Change of entropy by the batch part of the step with these weights, nats per token."""

    raw: StudentEstimate
    """With the weights as they are."""
    equal_length: StudentEstimate
    """Scaled to an update of the run's length in the metric 1/P."""
    equal_gain: StudentEstimate
    """Scaled to the run's gain of reward."""


class ChangesBesideRun(Record):
    """The same minus that of the run's own weights, nats per token."""

    equal_length: StudentEstimate
    """At equal length."""
    equal_gain: StudentEstimate
    """At equal gain."""


class WeightScales(Record):
    """Factors on the weights."""

    equal_length: Number
    """To an update of the run's length."""
    equal_gain: Number
    """To the run's gain of reward."""


class MeasuredChange(Record):
    """What the step with these weights really does, less what zero weights do, nats per token."""

    value: Number
    """The measured change."""
    standard_error: Nonnegative
    """Its standard error, a jackknife over groups of prompts."""
    ratio: Number
    """Measured over predicted."""
    z: Nonnegative
    """|difference| over its standard error; null where that is not known."""
    effective_sample_size: Nonnegative = None
    """Of the importance weights, in sequences, the smaller of both steps'; absent from older files."""
    trustworthy: bool | None = None
    """Whether that is at least half of the sequences; null where it is not known."""

    def known(self) -> Known | None:
        """The change with the normal 95% interval of its error, where that is to be trusted; None where there is none."""
        if self.value is None or self.standard_error is None or self.trustworthy is False:
            return None if self.value is None else Known(self.value)
        return Known(self.value, *interval(self.value, self.standard_error, math.inf))


class WeightingRow(Record):
    """One weighting. Without weights, `reason` stands in place of all numbers."""

    name: str
    """Its name."""
    label: str
    """Its name in words."""
    kind: Literal["run", "scheme", "filter"]
    """The run's own weights, a weighting scheme, or a filter of the run's weights."""
    reason: str | None = None
    """Why it has no weights; absent where it has."""
    sequences: Count | None = None
    """Sequences of a weight other than 0."""
    delta_h: EntropyChanges | None = None
    """Predicted change of entropy."""
    minus_run: ChangesBesideRun | None = None
    """Its difference to the run's own."""
    reward_gain: StudentEstimate | None = None
    """Predicted change of mean reward."""
    entropy_cost_per_reward: StudentEstimate | None = None
    """Nats per token lost for a unit of mean reward."""
    update_length: Nonnegative = None
    """Of the update, in the metric 1/P."""
    cosine_with_run: Number = None
    """Between this update and the run's, in the metric 1/P."""
    scale: WeightScales | None = None
    """Factors on the weights."""
    actual: dict[Normalisation, MeasuredChange] | None = None
    """What real steps did; absent where none was taken."""
    spared: StudentEstimate | None = None
    """Of drop_top_k: entropy spared without the k most lowering sequences, judged on other prompts than they were chosen on."""


class WeightingResult(Result):
    """analyses.weighting_schemes: what would other weightings of the same sequences cost in entropy?"""

    rows: Rows[WeightingRow]
    """One entry a weighting, the run's own first."""
    weights: dict[str, Rows[Finite]]
    """Name -> weights of the training sequences."""
    gain_side: Literal["evaluation", "training"] | None
    """Whose rewards the gain is of; null: there is none."""
    gain_note: str
    """The same in words, or why there is none."""
    n_eval: Count
    """Evaluation sequences."""
    n_train: Count
    """Training sequences."""
    eval_prompts: Count
    """Evaluation prompts."""
