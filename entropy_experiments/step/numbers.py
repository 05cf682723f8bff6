"""What one analysis finds: kernels, and of the analysed step predictions, shares and measurements, with self-checks.

Every record is whole when it is made. What an analysis was not asked for, or cannot know, is None as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from entropy_core.measurement import EntropyMeasurement
from entropy_core.scores import TokenStatistics
from entropy_experiments.kernel.contraction import PARTS as PARTS
from entropy_experiments.run.self_checks import SelfCheck
from entropy_experiments.statistics.estimand import Estimand
from entropy_experiments.step.effects_of_leaving_out import NumbersByEvaluation


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error (not the spread of its summands).

    left_out: (B,) the value with each evaluation prompt left out, prompts in ascending order of index.
    """

    value: float
    standard_error: float
    left_out: Tensor | None = field(default=None, compare=False, repr=False)


PartsByEstimator = dict[str, dict[str, Estimate]]
"""estimator -> part of the step (PARTS) -> its predicted change."""


@dataclass(frozen=True)
class Kernels:
    """Float32; rows E_t are those of the estimand's own gradient estimator, per token.

    fisher: (n_eval, n_train) dS_t^T P dS_i; entropy_fisher: (n_eval, n_train) E_t^T P dS_i; train_fisher and
    train_entropy_fisher: the same with the training sequences on both sides, (n_train, n_train).
    """

    fisher: Tensor
    entropy_fisher: Tensor
    train_fisher: Tensor
    train_entropy_fisher: Tensor


@dataclass(frozen=True)
class Predictions:
    """First order of the change of entropy along the step.

    per_token: nats per token; per_completion: nats per completion. without_preconditioner: what -lr c g in the place of the step
    is predicted to do, by the estimand's own estimator, nats per token. contributions: (n_eval,) each evaluation sequence's part
    of the predicted total; own_changes: (n_eval,) predicted change of sum_k H_k on its own tokens, nats per completion.
    left_out: share of the predicted total that comes from parameters which the kernel leaves out (filter_modules); None where
    it leaves out none, or the total is 0.
    """

    per_token: PartsByEstimator
    per_completion: PartsByEstimator
    without_preconditioner: Estimate
    contributions: Tensor
    own_changes: Tensor
    left_out: float | None = None


@dataclass(frozen=True)
class StepShares:
    """Which training sequence moved entropy by how much; (n_train,) float64, nats per token.

    shares: dH_i, which add up to batch_change and are step_factor * weights * products, products = <grad h, P_t dS_i>.
    measurement_shares: the same with the gradient of the estimand's `derivative`, so that they add up to the derivative of what
    is measured. effects: what leaving each sequence out of the step does (entropy_experiments.step.effects_of_leaving_out);
    own_part_of_second_moment: (1 - beta2)/(1 - beta2^t), which decides whether effects or shares name who is first. tokens: as of
    entropy_experiments.step.shares.Attribution.
    """

    shares: Tensor
    measurement_shares: Tensor
    products: Tensor
    step_factor: float
    horizon_factor: float
    batch_change: float
    effects: Tensor
    own_part_of_second_moment: float
    tokens: Tensor | None = None


@dataclass(frozen=True)
class MeasuredScale:
    """Measured changes at `scale` times the step, on the evaluation tokens. snis: None where these were not drawn. after: their
    statistics there, for what else is asked of them.
    """

    scale: float
    snis: EntropyMeasurement | None
    fixed_prefix: EntropyMeasurement
    after: TokenStatistics | None = None


@dataclass(frozen=True)
class StepNumbers:
    """The analysed step.

    by_evaluation: what shares and effects are made of; None where training rows are not kept, or kernels were not asked for.
    measured: in ascending order of scale, 1 among them; empty where nothing was to be measured. gradient_norm: before
    clipping by `clip`.
    """

    predictions: Predictions
    attribution: StepShares
    by_evaluation: NumbersByEvaluation | None
    measured: tuple[MeasuredScale, ...]
    gradient_norm: float
    clip: float

    @property
    def measured_step(self) -> MeasuredScale | None:
        """The measurement at the whole step."""
        return next((m for m in self.measured if m.scale == 1.0), None)


@dataclass(frozen=True)
class AnalysisNumbers:
    """Everything that `analyze_batches` finds. kernels: None where they were not asked for; step: None without weights."""

    estimand: Estimand
    eval_statistics: TokenStatistics
    train_statistics: TokenStatistics
    kernels: Kernels | None
    step: StepNumbers | None
    checks: tuple[SelfCheck, ...]
