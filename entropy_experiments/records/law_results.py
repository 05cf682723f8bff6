"""Stored result of the law R = -a e^H + b over training: its fit, and what the first third of the run predicted."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Discriminator, Tag, model_validator

from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.record import (
    Count,
    Finite,
    Nonnegative,
    NotKnown,
    Number,
    Record,
    Rows,
    kind_of_known,
    same_length,
)


class LawPoints(Record):
    """Training steps that have both entropy and reward, in order."""

    step: Rows[Finite]
    """Training steps."""
    entropy: Rows[Finite]
    """Entropy, nats per token."""
    reward: Rows[Finite]
    """Mean reward."""

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        same_length(step=self.step, entropy=self.entropy, reward=self.reward)
        return self


class LawCurve(Record):
    """The fitted curve with its pointwise 95% band."""

    entropy: Rows[Finite]
    """Nats per token."""
    reward: Rows[Finite]
    """Mean reward of the curve."""
    low: Rows[Finite]
    """Lower end of the band."""
    high: Rows[Finite]
    """Upper end."""

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        same_length(entropy=self.entropy, reward=self.reward, low=self.low, high=self.high)
        return self


class FittedLaw(Record):
    """Least squares of R = -a e^H + b."""

    n: Count
    """Steps."""
    a: Estimate
    """Slope against e^H."""
    b: Estimate
    """Intercept."""
    at_zero_entropy: Estimate
    """b - a: the reward once all entropy is spent."""
    residual_deviation: Nonnegative
    """Standard deviation of the residuals."""
    r_squared: Number
    """Explained part of the variance; null where reward does not vary."""
    autocorrelation: Finite
    """Of neighbouring steps' noise, its mean; intervals and band allow for it."""
    curve: LawCurve
    """The curve."""


class HeldOut(Record):
    """The forecast against the steps that came after it."""

    n: Count
    """Steps that came."""
    predicted: Rows[Finite]
    """Forecast of each one's reward."""
    low: Rows[Finite]
    """Lower end of the 95% band of a single point."""
    high: Rows[Finite]
    """Upper end."""
    inside: Finite
    """Part of the steps inside it."""
    mean_error: Estimate
    """Mean of what came minus its forecast."""
    mean_error_inside: bool
    """Whether that lies in the 95% band of a mean of so many."""
    root_mean_square_error: Finite
    """Of the forecast."""
    constant_root_mean_square_error: Finite
    """Of the first part's mean reward as the forecast."""


class Forecast(FittedLaw):
    """The law fitted to the first third of the steps alone."""

    held_out: HeldOut
    """What the later steps say of it."""


class LawResult(Record):
    """Does reward follow entropy by R = -a e^H + b?"""

    level: Finite
    """Of the bands."""
    band: str
    """How the bands were made."""
    points: LawPoints
    """The steps."""
    fit: Annotated[
        Annotated[FittedLaw, Tag("known")] | Annotated[NotKnown, Tag("unknown")], Discriminator(kind_of_known)
    ]
    """Of all steps, or why there is none."""
    forecast: Annotated[
        Annotated[Forecast, Tag("known")] | Annotated[NotKnown, Tag("unknown")], Discriminator(kind_of_known)
    ]
    """Of the first third, or why there is none."""
