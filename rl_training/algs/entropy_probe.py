"""The entropy probe: first-order prediction of what an optimizer step does to entropy, beside what it did.

    predicted   dh = <grad h, dtheta>,    dtheta = theta_after - theta_before as measured (it holds P already)
    split       dh = <grad h, dtheta_batch> + <grad h, dtheta_momentum> + <grad h, dtheta_decay>       (entropy_core.adamw)
    measured    h(theta_after) - h(theta_before) on the same tokens, reweighted (entropy_core.measurement)

on unfiltered rollouts of the policy before the step. h is entropy per token (nats per token). Knows no trainer: a model, a
batch, an optimizer. It reads parameters and gradients and writes nothing that training uses.

The standard error of the prediction is a jackknife over prompts of each sequence's own contribution; the directional
derivatives in it are taken as the finite differences that the measurement has computed anyway.
Source: docs/theory/adamw-step.md, docs/theory/entropy-gradient.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from entropy_core.adamw import AdamWParameterState, AdamWUpdate, read_adamw_state, split_adamw_update
from entropy_core.batch import DEFAULT_TOKEN_BATCH_SIZE, SequenceBatch
from entropy_core.entropy import Estimator, entropy_coefficients
from entropy_core.gradients import dot, entropy_gradient_and_statistics, trainable_parameters
from entropy_core.measurement import EntropyMeasurement, snis_entropy_change
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.uncertainty import jackknife_over_prompts


@dataclass(frozen=True)
class EntropyChange:
    """One step's change of entropy per token, nats per token.

    total: predicted; batch + momentum + weight_decay add up to it up to float32 rounding of the step itself. Under
    preconditioning "none" the prediction is that of the plain gradient step, all of it `batch`.
    measured: on the same tokens, with its effective sample size. entropy: h before the step.
    """

    total: float
    batch: float
    momentum: float
    weight_decay: float
    standard_error: float
    entropy: float
    measured: EntropyMeasurement
    estimator: str
    sequences: int


@dataclass(frozen=True)
class _Observation:
    batch: SequenceBatch
    statistics: TokenStatistics
    gradient: dict[str, Tensor]


@dataclass(frozen=True)
class _StepInputs:
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    state: dict[str, AdamWParameterState]


class SimpleEntropyProbe:
    """Call `observe` with rollouts of the current policy, `before_step` once gradients are clipped, `after_step` after it.

    model: the policy in training. preconditioning: "actual" predicts the step really taken; "none" the plain gradient step
    -lr g. Memory: five tensors of the size of the trainable parameters between `observe` and `after_step`, none afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: Estimator = "rao_blackwell",
        preconditioning: Literal["actual", "none"] = "actual",
        token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE,
    ) -> None:
        self._model = model
        self._estimator: Estimator = estimator
        self._preconditioning = preconditioning
        self._token_batch_size = token_batch_size
        self._observation: _Observation | None = None
        self._inputs: _StepInputs | None = None

    def observe(self, batch: SequenceBatch) -> None:
        """Entropy and its gradient on `batch`, drawn from the policy as it is now."""
        gradient, statistics = entropy_gradient_and_statistics(
            self._model, batch, self._estimator, True, self._token_batch_size
        )
        self._observation = _Observation(batch, statistics, gradient)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy what the step will be made of: parameters, (clipped) gradients, moments."""
        if self._observation is None:
            return
        parameters = trainable_parameters(self._model)
        state = {
            name: replace(s, exp_avg=s.exp_avg.clone(), exp_avg_sq=s.exp_avg_sq.clone())
            for name, s in read_adamw_state(optimizer, parameters).items()
        }
        self._inputs = _StepInputs(
            parameters={name: p.detach().clone() for name, p in parameters.items()},
            gradients={name: None if p.grad is None else p.grad.detach().clone() for name, p in parameters.items()},
            state=state,
        )

    def after_step(self) -> EntropyChange | None:
        """Predicted and measured change of the step just taken; None where nothing was observed before it."""
        if self._observation is None or self._inputs is None:
            return None
        seen, inputs = self._observation, self._inputs
        self._observation = self._inputs = None
        update = split_adamw_update(inputs.state, inputs.gradients, inputs.parameters)
        now = trainable_parameters(self._model)
        taken = {name: now[name].detach() - before for name, before in inputs.parameters.items()}
        after = token_statistics(self._model, seen.batch, self._token_batch_size)
        measured = snis_entropy_change(seen.statistics, after, seen.batch)
        parts, total = self._predict(seen.gradient, update, taken, inputs)
        return EntropyChange(
            total=total,
            batch=parts[0],
            momentum=parts[1],
            weight_decay=parts[2],
            standard_error=prediction_standard_error(seen.statistics, after, seen.batch, self._estimator),
            entropy=measured.before,
            measured=measured,
            estimator=self._estimator,
            sequences=len(seen.batch),
        )

    def _predict(
        self, gradient: dict[str, Tensor], update: AdamWUpdate, taken: dict[str, Tensor], inputs: _StepInputs
    ) -> tuple[tuple[float, float, float], float]:
        if self._preconditioning == "none":
            plain = {
                name: torch.zeros_like(inputs.parameters[name]) if g is None else -inputs.state[name].lr * g
                for name, g in inputs.gradients.items()
            }
            total = dot(gradient, plain)
            return (total, 0.0, 0.0), total
        parts = (dot(gradient, update.batch), dot(gradient, update.momentum), dot(gradient, update.weight_decay))
        return parts, dot(gradient, taken)


def prediction_standard_error(
    before: TokenStatistics, after: TokenStatistics, batch: SequenceBatch, estimator: Estimator
) -> float:
    """Jackknife over prompts of <grad h, dtheta>, nats per token.

    Sequence t contributes sum_k [alpha_k dH_k + gamma_k dlog pi_k] with the estimator's coefficients; dH and dlog pi are
    the differences of the token statistics across the step, which is their directional derivative to first order.
    """
    c = entropy_coefficients(before, batch, estimator)
    contributions = (
        c.entropy * (after.entropies.double() - before.entropies.double())
        + c.logprob * (after.logprobs.double() - before.logprobs.double())
    ).sum(1)
    return jackknife_over_prompts(contributions, batch.prompt_index)
