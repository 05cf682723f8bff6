"""What a step is predicted to do, part by part, from a gradient of entropy in folds and from token statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from entropy_core.adamw import AdamWUpdate
from entropy_core.batch import SequenceBatch
from entropy_core.entropy import Estimator, TokenCoefficients, entropy_coefficients
from entropy_core.fold_gradients import FoldGradients, fold_estimate
from entropy_core.predictors import covariance_predictor, steer_predictor
from entropy_core.scores import TokenStatistics
from entropy_core.token_ratios import change_coefficients
from entropy_core.uncertainty import Estimate
from rl_training.config import EntropyProbeConfig
from rl_training.probe.change import StepParts
from rl_training.probe.observation import Observation
from rl_training.probe.step_errors import Along, disagreement, over_prompts, prompt_names

_MANY_WEIGHTS = 50_000_000

PER_TOKEN, PER_COMPLETION, SCORE_FUNCTION, SCORE_TERM = "token", "completion", "score function", "score term"
"""Names of the gradients that predictions are made with; the last comes out of the training backward pass."""

Wanted = tuple[Estimator | Literal["critic"], bool]
"""An estimator, and whether the gradient is that of h (per token) or H."""

Objective = Callable[[TokenStatistics, SequenceBatch, Tensor | None], TokenCoefficients]
"""Statistics under today's policy, their batch, weights of its sequences -> what is differentiated."""

NO_CHANGE = StepParts(*[Estimate(0.0, 0.0)] * 4)
"""Of a step that was not taken."""


def folds_of(config: EntropyProbeConfig, trained_weights: int) -> int:
    """How many folds of prompts gradients are kept in: fewer by default where there are very many weights."""
    if config.standard_error_folds is not None:
        return config.standard_error_folds
    if config.errors_over_prompts:
        return 1
    return 4 if trained_weights <= _MANY_WEIGHTS else 2


def of_completions(config: EntropyProbeConfig) -> Estimator:
    """The estimator of H (nats per completion); a critic is of h."""
    return "rao_blackwell" if config.estimator == "critic" else config.estimator


def objectives_of(config: EntropyProbeConfig) -> dict[str, Wanted]:
    """By name of each gradient that is taken."""
    wanted: dict[str, Wanted] = {PER_TOKEN: ("fixed_prefix" if config.fused else config.estimator, True)}
    if config.per_completion:
        wanted[PER_COMPLETION] = (of_completions(config), False)
    if config.predictors:
        wanted[SCORE_FUNCTION] = ("score_function", True)
    return wanted


def without_critic(statistics: TokenStatistics, batch: SequenceBatch, weights: Tensor | None) -> TokenCoefficients:
    """What `estimator: critic` differentiates where there is none: Rao-Blackwell's without each token's own entropy."""
    return change_coefficients(statistics, batch, weights=weights)


def coefficients_of(
    wanted: Iterable[Wanted],
    statistics: TokenStatistics,
    batch: SequenceBatch,
    weights: Tensor | None,
    critic: Objective,
) -> list[TokenCoefficients]:
    """Of each gradient that is wanted. weights: (N,) of mean 1."""
    return [
        critic(statistics, batch, weights)
        if estimator == "critic"
        else entropy_coefficients(statistics, batch, estimator, per_token, weights)
        for estimator, per_token in wanted
    ]


@dataclass(frozen=True)
class StepPrediction:
    """What was predicted before a step, and what the step is checked against.

    before: weights, name -> tensor. parts: by objective; step: their sum, name -> tensor; both empty where the step has no
    known parts, and the prediction is made afterwards. along: derivatives under the policy before the step, where errors are
    made of them; left_out: (B,) the sum of the parts with each prompt left out.
    """

    before: dict[str, Tensor]
    predictors: dict[str, float]
    parts: dict[str, StepParts] = field(default_factory=dict)
    step: dict[str, Tensor] = field(default_factory=dict)
    same_tokens: float = math.nan
    shares: Tensor | None = None
    effects: Tensor | None = None
    along: Along | None = None
    left_out: Tensor | None = None


def token_predictors(
    statistics: TokenStatistics, batch: SequenceBatch, advantages: Tensor, learning_rate: float
) -> dict[str, float]:
    """Rivals that need token statistics of the training sequences alone (entropy_core.predictors)."""
    mask = batch.completion_mask
    return {
        "covariance": covariance_predictor(statistics.logprobs, mask, advantages, learning_rate),
        "steer": steer_predictor(statistics.logprobs, statistics.entropies, mask, advantages, learning_rate),
    }


def predicted_parts(gradient: FoldGradients, update: AdamWUpdate, of_batch: Tensor | None = None) -> StepParts:
    """Each part of the step along the gradient, with its error; of_batch: (F,) that of the batch part from elsewhere."""
    batch = gradient.along(update.batch) if of_batch is None else of_batch
    momentum, decay = gradient.along(update.momentum), gradient.along(update.weight_decay)
    shares = gradient.shares
    of_sum = shares if len(batch) == len(momentum) else None
    estimates = [fold_estimate(batch, of_sum), fold_estimate(momentum, shares), fold_estimate(decay, shares)]
    if len(batch) == len(momentum):
        return StepParts(fold_estimate(batch + momentum + decay, shares), *estimates)
    return StepParts(estimates[0] + fold_estimate(momentum + decay, shares), *estimates)


def add_errors(
    parts: dict[str, StepParts],
    update: AdamWUpdate | None,
    taken: Mapping[str, Tensor],
    along: Along | None,
    seen: Observation | None,
    say: Callable[[str], None],
) -> Tensor | None:
    """Give the change per token errors over prompts, in place, where there are derivatives to make them of.

    Args:
        parts: by objective, with their values.
        update: the step that they are of; None where the total alone is known.
        taken: that total, name -> tensor.
        along: derivatives under the policy before the step.
        seen: what they are of.
        say: takes a sentence where the gradient and the derivatives are not of one policy.

    Returns:
        (B,) the total with each prompt left out; None without derivatives.
    """
    if along is None or seen is None:
        return None
    units, values = prompt_names(seen.batch), parts[PER_TOKEN]
    pieces = [along(p) for p in ([taken] if update is None else [update.batch, update.momentum, update.weight_decay])]
    left_out = torch.stack([piece.left_out for piece in pieces]).sum(0)
    total = over_prompts(values.total.value, left_out, units)
    if update is None:
        parts[PER_TOKEN] = StepParts.only_total(total)
    else:
        each = zip((values.batch, values.momentum, values.decay), pieces, strict=True)
        parts[PER_TOKEN] = StepParts(total, *(over_prompts(e.value, piece.left_out, units) for e, piece in each))
    why = disagreement(total, sum(piece.change for piece in pieces))
    if why is not None:
        say(why)
    return left_out
