"""Estimates as results files hold them: a value, its standard error and the ends of its 95% interval.

The ends are stored, not made from the standard error: they are not symmetric about the value where few prompts are skewed
(entropy_experiments.statistics.jackknife_interval). They are null where nothing is known of the spread, and of a measurement
whose effective sample size is below half of its sequences.
"""

from __future__ import annotations

import math

from entropy_experiments.records.record import Count, Finite, Nonnegative, Number, Record
from entropy_experiments.statistics.confidence import Known, shown
from rl_training.intervals import interval


class StudentEstimate(Record):
    """An estimate whose interval, where its ends are not stored, is Student's: value -+ t(degrees of freedom) standard errors."""

    value: Number
    """The estimate."""
    standard_error: Nonnegative
    """Its standard error, a jackknife over prompts."""
    degrees_of_freedom: Nonnegative
    """Degrees of freedom behind the standard error; null: as many as it takes (a normal interval)."""
    low: Number = None
    """Lower end of the 95% interval; absent where two sets of prompts are behind the error."""
    high: Number = None
    """Upper end of the 95% interval."""
    reason: str | None = None
    """Why a number is null; absent where all are known."""

    def known(self) -> Known | None:
        """The value with its 95% interval; None where there is no value."""
        if self.value is None:
            return None
        if self.low is not None and self.high is not None:
            return Known(self.value, self.low, self.high)
        if self.standard_error is None:
            return Known(self.value)
        freedom = math.inf if self.degrees_of_freedom is None else self.degrees_of_freedom
        return Known(self.value, *interval(self.value, self.standard_error, freedom))

    def shown(self, plus: bool = True) -> str:
        """``-0.27 [-0.39, -0.14]``, or "not known"."""
        return shown(self.known(), plus)


class Estimate(Record):
    """An estimate with the ends of its 95% interval."""

    value: Number
    """The estimate."""
    standard_error: Nonnegative
    """Its standard error, a jackknife over evaluation prompts."""
    low: Number = None
    """Lower end of the 95% interval."""
    high: Number = None
    """Upper end of the 95% interval."""
    degrees_of_freedom: Nonnegative = None
    """Degrees of freedom behind the standard error."""

    def known(self) -> Known | None:
        """The value with its stored 95% interval; None where there is no value."""
        return None if self.value is None else Known(self.value, self.low, self.high)

    def shown(self, plus: bool = True) -> str:
        """``-0.27 [-0.39, -0.14]``, or "not known"."""
        return shown(self.known(), plus)


NO_ESTIMATE = Estimate(value=None, standard_error=None, low=None, high=None, degrees_of_freedom=None)
"""Of what is not known."""


class Mean(Record):
    """A number with its standard error, of which no interval is made."""

    value: Number
    """The number."""
    standard_error: Nonnegative
    """Its standard error, a jackknife over prompts."""


class Measurement(Estimate):
    """A measured change of entropy, nats per token."""

    trustworthy: bool
    """Whether the effective sample size is at least half of the sequences; without it there is no interval."""
    before: Number
    """Entropy before the step, nats per token."""
    after: Number
    """Entropy after the step, nats per token."""
    effective_sample_size: Nonnegative
    """Of the importance weights, in sequences."""
    n: Count
    """Sequences that were measured on."""


class NoiseOverBuffers(Estimate):
    """The predicted change with its spread over training buffers: what another draw of the buffer would have changed."""

    prompts: Count
    """Training prompts."""
    groups: Count
    """Groups of training prompts that were left out in turn."""


class LargestPartRecord(Record):
    """Which part of a predicted change is the largest in size, nats per token."""

    part: str
    """The part of the largest size."""
    beside: str
    """The part that comes nearest to it."""
    difference: Finite
    """By how much it is larger in size."""
    low: Finite
    """Lower end of the 95% interval of the difference."""
    high: Finite
    """Upper end."""
    certain: bool
    """Whether that interval lies above 0."""
