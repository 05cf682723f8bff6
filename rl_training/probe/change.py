"""What the probe says of one step: predicted and measured changes of entropy, with their errors and their names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from entropy_core.measurement import EntropyMeasurement
from entropy_core.uncertainty import Estimate
from rl_training.probe.step_errors import difference

if TYPE_CHECKING:
    from rl_training.probe.observation import Observation
    from rl_training.probe.watch import WatchedChange

ESTIMANDS = {
    "critic": "entropy of the policy",
    "rao_blackwell": "entropy of the policy",
    "split": "entropy of the policy",
    "score_function": "entropy of the policy",
    "fixed_prefix": "entropy on given tokens",
    "token_ratios": "entropy of the policy",
}
"""What each estimator estimates. The last is blind to which prefixes become likelier: another quantity."""


@dataclass(frozen=True)
class StepParts:
    """A predicted change and its parts: this batch's gradient, the momentum of earlier ones, weight decay.

    They add up to `total`, up to rounding of the step itself. Where only a sum was given (a bare dtheta), parts are NaN.
    """

    total: Estimate
    batch: Estimate
    momentum: Estimate
    decay: Estimate

    def __add__(self, other: StepParts) -> StepParts:
        """Part by part, as of independent estimates."""
        return StepParts(
            self.total + other.total,
            self.batch + other.batch,
            self.momentum + other.momentum,
            self.decay + other.decay,
        )

    @classmethod
    def only_total(cls, total: Estimate) -> StepParts:
        unknown = Estimate(math.nan)
        return cls(total, unknown, unknown, unknown)


@dataclass(frozen=True)
class EntropyChange:
    """One step's change of entropy.

    per_token, per_completion: predicted, in nats per token and nats per completion (None where not asked for).
    estimator, estimand: how, and of what. sequences: behind the newest gradient; effective_sample_size: after importance
    weights. entropy: before the step, nats per token (NaN where nothing was observed at it); entropy_error: over prompts;
    degrees_of_freedom: behind that error and the measurement's, one less than there are prompts.
    same_tokens: the newest gradient alone along the step, nats per token; with the split estimator it is the derivative of
    `measured` on the same tokens. measured, measured_fixed_prefix: what the step did on those tokens, nats per token.
    predictors: rival predictions by name. shares: (n_train,) nats per token, each training sequence's accounting share
    of `batch`; effects: (n_train,) what leaving each out of the step does (entropy_core.leaving_out), under `actual` from the
    optimizer's second step on. watched: the measurement under `mode: watch`, in place of the other two; left_out: (B,) predicted
    with each prompt left out, difference: predicted minus measured with its paired error, where both are of one step.
    """

    per_token: StepParts
    per_completion: StepParts | None
    estimator: str
    estimand: str
    sequences: int
    effective_sample_size: float
    entropy: float
    entropy_error: float = math.nan
    degrees_of_freedom: float = math.nan
    same_tokens: float = math.nan
    measured: EntropyMeasurement | None = None
    measured_fixed_prefix: EntropyMeasurement | None = None
    predictors: dict[str, float] = field(default_factory=dict)
    shares: Tensor | None = None
    effects: Tensor | None = None
    watched: WatchedChange | None = None
    left_out: Tensor | None = field(default=None, compare=False, repr=False)
    difference: Estimate | None = None

    @classmethod
    def predicted(
        cls, estimator: str, seen: Observation | None, per_token: StepParts, per_completion: StepParts | None
    ) -> EntropyChange:
        """A prediction, beside what was seen of the policy before the step."""
        how = (per_token, per_completion, estimator, ESTIMANDS[estimator])
        if seen is None:
            return cls(*how, 0, math.nan, math.nan)
        h, size = seen.entropy(), (len(seen.batch), seen.effective_size())
        return cls(*how, *size, h.value, h.standard_error, h.degrees_of_freedom)

    @classmethod
    def only_watched(cls, seen: Observation, watched: WatchedChange) -> EntropyChange:
        """Of steps that were measured and not predicted."""
        nothing = StepParts.only_total(Estimate(math.nan))
        return cls.predicted("token_ratios", seen, nothing, None).with_watched(watched)

    def with_watched(self, watched: WatchedChange) -> EntropyChange:
        """The same step, measured by forward passes."""
        apart = None
        if self.left_out is not None and watched.steps == 1:
            apart = difference(self.total.value, self.left_out, watched.quiet)
        return replace(self, watched=watched, difference=apart)

    @property
    def measured_change(self) -> float | None:
        """The measured change of a step, nats per token, however it was measured; None where it was not."""
        if self.watched is not None:
            return self.watched.each.value
        return None if self.measured is None else self.measured.change

    @property
    def total(self) -> Estimate:
        return self.per_token.total

    @property
    def batch(self) -> Estimate:
        return self.per_token.batch

    @property
    def momentum(self) -> Estimate:
        return self.per_token.momentum

    @property
    def decay(self) -> Estimate:
        return self.per_token.decay
