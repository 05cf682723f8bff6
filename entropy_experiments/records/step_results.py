"""Stored results of the analyses of the step: entropy_prediction, higher_order, attribution, intervention, baselines.

Their questions and formulas: docs/analyses; what makes them: entropy_experiments/analyses. Changes of entropy and shares are in
nats per token.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from entropy_experiments.records.estimates import Estimate, StudentEstimate
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

Unit = Literal["nats per token"]
Estimator = Literal["rao_blackwell", "split", "score_function", "fixed_prefix"]
MeasureKind = Literal["snis", "fresh", "exact", "fixed_prefix"]
Pair = Annotated[tuple[Finite, Finite], Field(strict=False)]

# ---- entropy_prediction


class MeasuredAtScale(Estimate):
    """A measured change at one scale of the step."""

    effective_sample_size: Nonnegative
    """Of the importance weights; null where there are none."""
    trustworthy: bool | None
    """Whether that is at least half of the sequences."""


class PredictionComparison(Record):
    """One estimator against one measurement."""

    estimator: Estimator
    """The estimator."""
    measure: MeasureKind
    """The measurement."""
    ratio: Number
    """Measured over predicted."""
    near_zero: bool
    """Whether the prediction is not significantly different from 0."""
    difference: Number
    """Predicted - measured."""
    standard_error: Nonnegative
    """Of the difference."""
    degrees_of_freedom: Nonnegative
    """Behind that error."""
    z: Nonnegative
    """|difference| over its standard error."""
    p_value: Probability
    """Two-sided."""
    low: Number
    """Lower end of the difference's 95% interval."""
    high: Number
    """Upper end."""
    agrees: bool | None
    """Whether that interval holds 0."""
    reason: str
    """Why the ratio is null, or ""."""


class PredictionRow(Record):
    """One scale of the step."""

    scale: Finite
    """Times the step."""
    predicted: dict[Estimator, Estimate]
    """First order, by estimator."""
    measured: dict[MeasureKind, MeasuredAtScale]
    """By kind of measurement."""
    comparisons: Rows[PredictionComparison]
    """Estimators against the measurements of what they predict."""


class Departure(Record):
    """How far the first order is off at one scale."""

    scale: Finite
    """Times the step."""
    departure: Finite
    """|measured - predicted| over the larger of both."""
    trustworthy: bool | None
    """Whether the measurement can be trusted."""


class FirstOrderRange(Record):
    """Up to what scale the first order is enough."""

    estimator: Estimator | None
    """Which prediction is compared with ..."""
    measure: MeasureKind | None
    """... which measurement."""
    tolerance: Finite
    """The departure that is allowed."""
    departures: Rows[Departure]
    """By scale."""
    holds_to: Number
    """The largest scale within the tolerance."""
    fails_at: Number
    """The next one."""
    crossing: Number
    """Where the departure passes the tolerance, log-linear between both."""
    reason: str
    """Why numbers are null, or ""."""


class EntropyPredictionResult(Result):
    """analyses.entropy_prediction: does the first order predict the change of entropy, and up to what size of step?"""

    unit: Unit
    """Of all changes."""
    rows: Rows[PredictionRow]
    """One entry a scale, ascending."""
    first_order: FirstOrderRange
    """Where the first order stops being enough."""


# ---- higher_order


class FirstOrder(Estimate):
    """D, the slope along the step."""

    fitted: Number
    """The slope of the fitted curve."""
    source: Literal["split estimator", "fit"]
    """What value is."""


class SecondOrder(Record):
    """Q, half the curvature along the step."""

    value: Number
    """Q."""
    standard_error: Nonnegative
    """A jackknife over prompts."""
    fit_error: Nonnegative
    """How far Q moves when only the nearer half of the pairs is fitted."""
    total_error: Nonnegative
    """Both in quadrature."""
    low: Number = None
    """Lower end of the 95% interval of both; absent without an error over prompts."""
    high: Number = None
    """Upper end."""
    degrees_of_freedom: Nonnegative
    """Behind the standard error."""

    def shown(self) -> str:
        """Q with the interval of both errors, as text; Student's where its ends are not stored."""
        total = StudentEstimate(
            value=self.value,
            standard_error=self.total_error,
            low=self.low,
            high=self.high,
            degrees_of_freedom=self.degrees_of_freedom,
        )
        return total.shown()


class EqualAt(Record):
    """s*, the scale at which both orders are equal in size."""

    value: Nonnegative
    """s*."""
    low: Nonnegative
    """From the ends of both 95% intervals."""
    high: Nonnegative
    """null: any larger one."""


class CurvePoint(Record):
    """One scale that was measured."""

    scale: Finite
    """Times the step; negative: backwards."""
    change: Finite
    """Measured change."""
    standard_error: Nonnegative
    """Its standard error."""
    first_order: Number
    """D s."""
    second_order: Number
    """D s + Q s^2."""
    effective_sample_size: Nonnegative
    """Of the importance weights."""
    used: bool
    """Whether it was fitted."""


class HigherOrderResult(Result):
    """analyses.higher_order: how large is the second order of the step's effect on entropy?"""

    unit: Unit
    """Of all changes."""
    first_order: FirstOrder
    """D."""
    second_order: SecondOrder
    """Q."""
    third: Number
    """C; null with too few pairs."""
    fourth: Number
    """R; null with too few pairs."""
    residual: Nonnegative
    """Root mean square of what the fit leaves."""
    ratio: Number
    """Q / D."""
    equal_at: EqualAt
    """Where both orders are equal."""
    pairs: Count
    """Pairs +-s that were used."""
    reason: str
    """Why numbers are null, or ""."""
    points: Rows[CurvePoint]
    """Every measured scale, ascending."""


# ---- intervention


class ShareScore(Record):
    """How well sums of shares predict real steps over subsets."""

    predicted: Rows[Finite]
    """One change a subset."""
    spearman: Number
    """Rank correlation with the measured ones: the linear datamodelling score."""
    interval: Pair | None
    """Its 95% interval, a percentile bootstrap over subsets."""
    pearson: Number
    """Correlation."""
    slope: Number
    """Of measured on predicted."""
    slope_interval: Pair | None
    """Its 95% interval, a jackknife over subsets."""
    intercept: Number
    """Of measured on predicted."""
    intercept_interval: Pair | None
    """Its 95% interval."""
    predicted_spread: Nonnegative
    """Standard deviation over subsets."""
    measured_spread: Nonnegative
    """Standard deviation over subsets."""
    root_mean_square_error: Nonnegative
    """Of measured - predicted."""
    reason: str
    """Why numbers are null, or ""."""


class FullStep(Record):
    """The step with all sequences."""

    measured: Finite
    """Measured change."""
    predicted: dict[str, Finite]
    """By kind of shares."""


class Removal(Record):
    """The step without the sequences of the most extreme shares."""

    sequences: Rows[Count]
    """Training indices that were left out."""
    measured: Finite
    """Measured change of the step without them."""
    difference: Finite
    """That minus the change with all."""
    predicted_difference: dict[str, Finite]
    """By kind of shares."""


class RandomRemoval(Record):
    """Steps without as many random sequences."""

    sequences: Count
    """How many were left out."""
    differences: Rows[Finite]
    """Changes minus that with all."""
    spread: Nonnegative
    """Their standard deviation."""


class Removals(Record):
    """Steps without some sequences."""

    lowering: Removal | None
    """Without those that lower entropy most; null where none does."""
    raising: Removal | None
    """Without those that raise it most."""
    random: RandomRemoval | None
    """Without random ones."""


class InterventionResult(Result):
    """analyses.intervention: do the shares say what happens when sequences are really left out of the step?"""

    unit: Unit
    """Of all changes."""
    by: Literal["sequence", "prompt"]
    """What was halved."""
    count: Count
    """Subsets."""
    size: Nonnegative
    """Sequences in a subset, on average."""
    subsets: Rows[Rows[Count]]
    """Training indices in each."""
    measured: Rows[Finite]
    """Measured change of each subset's step."""
    clip_ratios: Rows[Finite] | None
    """Clip coefficient of each subset's step over that of the whole."""
    scores: dict[str, ShareScore]
    """By kind of shares: split, rao_blackwell, fixed_prefix, response."""
    headline: str
    """The kind that the measurement is the derivative of."""
    full_step: FullStep
    """With all sequences."""
    removals: Removals
    """Without some."""
    effective_part: Number = None
    """Smallest effective sample of the halves' and removals' measurements, in parts of the evaluation sequences."""

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        predictions = {f"scores.{name}.predicted": score.predicted for name, score in self.scores.items()}
        same_length(subsets=self.subsets, measured=self.measured, clip_ratios=self.clip_ratios, **predictions)
        if self.headline not in self.scores:
            raise ValueError(f"headline is {self.headline[:40]!r}, which has no score")
        return self


# ---- baselines


class BaselineRow(Record):
    """One predictor of the step's change of entropy."""

    name: str
    """Its name."""
    label: str
    """Its name in words."""
    predicted: Number
    """What it predicts."""
    standard_error: Nonnegative
    """Of that."""
    degrees_of_freedom: Nonnegative
    """Behind that error."""
    low: Number = None
    """Lower end of the prediction's 95% interval."""
    high: Number = None
    """Upper end."""
    actual: Number
    """The measured change it is compared with."""
    actual_standard_error: Nonnegative
    """Of that."""
    actual_low: Number = None
    """Lower end of the measurement's 95% interval."""
    actual_high: Number = None
    """Upper end."""
    ratio: Number
    """Measured over predicted; null for a step of another length."""
    z: Nonnegative
    """|difference| over its standard error."""
    agrees: bool | None
    """Whether the 95% interval of the difference holds 0."""
    comparable_in_scale: bool
    """Whether it predicts a change by this step, and not by one of another length."""
    sign_agrees: bool | None
    """Whether signs agree; null where a sign is not known."""
    reason: str
    """Why numbers are null, or ""."""


class BaselinesResult(Result):
    """analyses.baselines: how near does each predictor come to the measured change?"""

    rows: Rows[BaselineRow]
    """One entry a predictor."""
    measured: Estimate
    """The measured change."""
