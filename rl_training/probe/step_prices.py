"""What a few interventions would do to entropy and reward in the step that is about to be taken: the price list, while training.

    dh' - dh = D dh along dtheta' - dtheta          dJ' - dJ = D J along it          on the pool's held-out sequences

dtheta' is the exact step of AdamW with the intervention's loss, rate or moment: clipping and P answer. The list and its losses
are entropy_core.interventions', the derivative of entropy is that of the probe's own measurement, with its error over prompts.
`entropy-experiments price` has the whole list, on more sequences. Source: docs/analyses/prices.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_core.adamw import AdamWParameterState, changed_step, read_adamw_state
from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients
from entropy_core.gradients import batch_gradients, trainable_parameters
from entropy_core.interventions import Intervention, TrainingTokens, interventions, loss_coefficients
from entropy_core.processes import Processes
from entropy_core.reward import reward_derivative, reward_derivative_left_out
from entropy_core.scores import TokenStatistics
from entropy_core.token_ratios import TokenRatioChange
from entropy_core.uncertainty import Estimate
from rl_training.probe.shares import SAME_GRADIENT, TrainingSequences, clip_coefficient, scaled_otherwise
from rl_training.probe.step_errors import over_prompts

PRICED = (
    "lower_rate",
    "positives_only",
    "negatives_only",
    "clip_cov",
    "steer",
    "stare",
    "repo_r",
    "entropy_bonus_0.01",
)
"""Of the whole list: what trainers have a setting or a paper for."""
PRICE_VECTORS = 8
"""Held over all trained parameters: three gradients at a time, the loss's own, both steps and their difference, one to spare."""
_AT_A_TIME = 3
_SAME_WEIGHT = 1e-3
_CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_

Derivatives = Callable[[Mapping[str, Tensor]], tuple[TokenRatioChange, Tensor]]
"""A direction -> the derivative of h, and (N,) of log-probabilities, of the held-out sequences."""


@dataclass(frozen=True)
class StepPrice:
    """Of an intervention less the step as trained: change of h (nats per token) and of mean reward (None: no rewards)."""

    entropy: Estimate
    reward: Estimate | None


@dataclass(frozen=True)
class HeldOut:
    """along: derivatives of its sequences. rewards: (N,), None where unknown. weights: (N,) of today's policy. prompts: (N,)."""

    along: Derivatives
    rewards: Tensor | None
    weights: Tensor
    prompts: Tensor


def price_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: TrainingSequences,
    statistics: TokenStatistics,
    held_out: HeldOut,
    max_norm: float | None,
    sharing: Processes,
    tolerance: float = SAME_GRADIENT,
) -> dict[str, StepPrice]:
    """Name of each intervention of PRICED that changes something here -> its price.

    Args:
        optimizer: AdamW, about to step; `p.grad` as it gets it. statistics: of the training batch.
        max_norm: of clipping; None, 0: none. tolerance: relative error of the loss gradient that the run's precision explains.

    Raises:
        ValueError: where the weights of the loss are not known, not those of its gradient, or differ within a sequence (a step
            on sequences of an earlier policy); where something other than clipping to `max_norm` scales the gradient.
    """
    parameters = trainable_parameters(model)
    states = {n: s for n, s in read_adamw_state(optimizer, parameters, others=True).items() if _moves(parameters[n])}
    tokens = _training_tokens(training, statistics)
    mine = sharing.my_sequences(training.batch.prompt_index)

    def gradients(losses: list[TokenCoefficients]) -> list[dict[str, Tensor]]:
        return _loss_gradients(model, training.batch, losses, mine, sharing)

    own = gradients([loss_coefficients(tokens.weights, training.batch, tokens.weights)])[0]
    clip = clip_coefficient(parameters, own, tolerance)
    if (scaled := scaled_otherwise(parameters, clip, max_norm or 0.0, tolerance)) is not None:
        raise ValueError(f"{scaled}, which the interventions' gradients would have to pass too")
    as_trained = _step(states, parameters, own, max_norm)
    found = {}
    for one, gradient in _each(tokens, own, gradients):
        delta = _step(states, parameters, gradient, max_norm, one.learning_rate_factor, one.keeps_momentum)
        moved = {n: delta[n] - as_trained[n] if n in delta else torch.zeros_like(p) for n, p in parameters.items()}
        found[one.name] = _price(held_out, moved)
    return found


def metrics_of_prices(prices: Mapping[str, StepPrice]) -> dict[str, float]:
    """price/<name>/entropy, .../reward and their `_se`."""
    out = {}
    for name, price in prices.items():
        for kind, estimate in (("entropy", price.entropy), ("reward", price.reward)):
            if estimate is not None:
                out[f"price/{name}/{kind}"], out[f"price/{name}/{kind}_se"] = estimate.value, estimate.standard_error
    return out


def _moves(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None


def _training_tokens(training: TrainingSequences, statistics: TokenStatistics) -> TrainingTokens:
    batch, weights = training.batch, training.weights
    if weights is None:
        raise ValueError("prices need each sequence's weight in the loss, which is not known for this loss")
    if weights.dim() == 2:
        lengths = batch.completion_lengths.clamp(min=1)
        mean = (weights * batch.completion_mask).sum(1) / lengths
        apart = ((weights - mean[:, None]) * batch.completion_mask).abs().amax()
        if not apart <= _SAME_WEIGHT * mean.abs().amax():
            raise ValueError(
                "the loss weighs the tokens of a sequence apart: prices are of steps on the policy's own sequences"
            )
        weights = mean
    unknown = torch.full_like(training.advantages, torch.nan)
    return TrainingTokens(batch, statistics, weights, training.advantages, unknown, weights != weights, None)


def _each(
    tokens: TrainingTokens,
    own: dict[str, Tensor],
    gradients: Callable[[list[TokenCoefficients]], list[dict[str, Tensor]]],
) -> Iterator[tuple[Intervention, dict[str, Tensor]]]:
    """Interventions with their loss gradients, a few at a time."""
    listed = [one for one in interventions(tokens, "not priced while training") if one.name in PRICED]
    for one in listed:
        if one.objective is tokens.weights:
            yield one, own
    others = [
        (one, one.objective) for one in listed if one.objective is not None and one.objective is not tokens.weights
    ]
    for start in range(0, len(others), _AT_A_TIME):
        some = others[start : start + _AT_A_TIME]
        made = gradients([loss_coefficients(objective, tokens.batch, tokens.weights) for _, objective in some])
        yield from zip((one for one, _ in some), made, strict=True)


def _loss_gradients(
    model: nn.Module, batch: SequenceBatch, losses: list[TokenCoefficients], mine: Tensor, sharing: Processes
) -> list[dict[str, Tensor]]:
    """Minus the gradient of each sum, the sequences shared out over processes. Raises ValueError in all of them or in none."""
    found, trouble = [{n: torch.zeros_like(p) for n, p in trainable_parameters(model).items()} for _ in losses], None
    if len(mine):
        some = [TokenCoefficients(-loss.entropy[mine], -loss.logprob[mine]) for loss in losses]
        try:
            found = batch_gradients(model, batch.select(mine), some, as_trained=True)
        except ValueError as error:
            trouble = str(error)
    if sharing.any(trouble is not None, batch.device):
        raise ValueError(trouble or "another process could not take the gradient of its sequences' losses")
    return [{name: sharing.sum(g) for name, g in gradient.items()} for gradient in found]


def _step(
    states: Mapping[str, AdamWParameterState],
    parameters: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    max_norm: float | None,
    learning_rate_factor: float = 1.0,
    keeps_momentum: bool = True,
) -> dict[str, Tensor]:
    norm = float(torch.stack([gradient[name].norm() for name in states]).norm())
    clip = min(1.0, max_norm / (norm + _CLIP_EPSILON)) if max_norm else 1.0
    seen = {name: (clip * gradient[name]).to(parameters[name].dtype) for name in states}
    return changed_step(states, parameters, seen, learning_rate_factor, keeps_momentum)


def _price(held_out: HeldOut, moved: Mapping[str, Tensor]) -> StepPrice:
    change, scores = held_out.along(moved)
    entropy = over_prompts(change.change, change.left_out, [])
    if held_out.rewards is None:
        return StepPrice(entropy, None)
    columns, weights = scores[:, None], held_out.weights
    value = float(reward_derivative(held_out.rewards, columns, weights)[0])
    left_out = reward_derivative_left_out(held_out.rewards, columns, held_out.prompts, weights)
    return StepPrice(entropy, over_prompts(value, left_out[:, 0], []))
