"""What one analysis computes: kernels, predictions with standard errors, measurements, shares, self-checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from entropy_core.measurement import EntropyMeasurement
from entropy_core.scores import TokenStatistics
from entropy_experiments.run.self_checks import SelfCheck
from entropy_experiments.step.effects_of_leaving_out import HeadlineProducts
from entropy_experiments.step.training_noise import TrainingNoise

PARTS = ("total", "batch", "momentum", "weight_decay")


@dataclass(frozen=True)
class Estimate:
    """A value with the standard error of it (not the spread of its summands).

    left_out: (B,) the value with each evaluation prompt left out, prompts in ascending order of index.
    """

    value: float
    standard_error: float
    left_out: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class MeasuredScale:
    """Measured changes at `scale` times the step, on the evaluation tokens. snis: None where these were not drawn."""

    scale: float
    snis: EntropyMeasurement | None
    fixed_prefix: EntropyMeasurement


@dataclass
class AnalysisNumbers:
    """Everything computed. Kernels are (n_eval, n_train) float32, train_* (n_train, n_train); the rest float64.

    rows_drawn: whether the evaluation sequences come from the policy. Where they are given instead, they say nothing of its
    entropy: E_t, predictions, shares and measurements are then those of the fixed-prefix estimand alone.
    predicted[estimator][part]: nats per token, predicted_per_completion: nats per completion; empty without weights, as are
    all numbers of the step. shares: (n_train,) dH_i of this step, nats per token, adding up to batch_change and equal to
    step_factor * weights * products, products = <grad h, P_t dS_i>; split_shares: the same with the split estimator's
    gradient, whose total is the derivative of the reweighted measurement. contributions: (n_eval,) each evaluation
    sequence's part of the predicted total; without_preconditioner: what -lr c g in place of the step is predicted to do, by
    the kernel's own estimator, nats per token; own_changes: (n_eval,) the predicted change of sum_k H_k on its own tokens, nats
    per completion. left_out: the share of the predicted total that comes from parameters which the kernel leaves out
    (filter_modules), None where it leaves out none.

    effects: (n_train,) r_i, what leaving each sequence out of the step does, nats per token
    (entropy_experiments.step.effects_of_leaving_out); own_part_of_second_moment: (1 - beta2)/(1 - beta2^t), by which effects or
    shares decide who is named first; headline: that number by evaluation sequence, None where training rows are not kept.
    training_noise: what another training buffer would change.
    """

    eval_statistics: TokenStatistics
    train_statistics: TokenStatistics
    rows_drawn: bool = True
    fisher: Tensor | None = None
    entropy_fisher: Tensor | None = None
    train_fisher: Tensor | None = None
    train_entropy_fisher: Tensor | None = None
    predicted: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    predicted_per_completion: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    without_preconditioner: Estimate | None = None
    contributions: Tensor | None = None
    own_changes: Tensor | None = None
    shares: Tensor | None = None
    split_shares: Tensor | None = None
    products: Tensor | None = None
    step_factor: float | None = None
    horizon_factor: float | None = None
    batch_change: float | None = None
    left_out: float | None = None
    effects: Tensor | None = None
    own_part_of_second_moment: float | None = None
    headline: HeadlineProducts | None = None
    training_noise: TrainingNoise | None = None
    measured: list[MeasuredScale] = field(default_factory=list)
    gradient_norm: float | None = None
    clip: float | None = None
    checks: list[SelfCheck] = field(default_factory=list)
