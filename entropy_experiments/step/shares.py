"""Which training sequence moved entropy by how much in the analysed step.

    dH_i = sum over parameters of  lr (1 - beta1)/(1 - beta1^t) c w_i <grad h, P_t dS_i>

P_t is the step's own preconditioner (its second moments hold this batch's gradient already), so that the shares add up to
the batch part of the step exactly. Over the life of the momentum buffer the same sequence contributes the horizon factor
times as much,  sum_j beta1^j (1 - beta1^t)/(1 - beta1^(t+j)),  which is 1/(1 - beta1) late in training.
Source: docs/theory/fisher-kernel.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from entropy_core.adamw import AdamWParameterState
from entropy_core.formed import Formed
from entropy_experiments.step.gradient_rows import RecomputedRows, TrainingRows
from entropy_experiments.step.optimizer_step import AnalysedStep


@dataclass(frozen=True)
class Attribution:
    """Shares (n_train,) float64 dH_i = step_factor * w_i * products, nats per token, products = <grad h, P_t dS_i>.

    Where groups of parameters have different rates, step_factor is the first group's, and the others' ratios to it are in
    the products. tokens: (n_train, L) float64 parts of completion tokens, nats per token, which add up to shares; None where rows
    were kept.
    """

    shares: Tensor
    products: Tensor
    step_factor: float
    tokens: Tensor | None = None


def attribute(gradient: Mapping[str, Tensor], rows: TrainingRows, weights: Tensor, step: AnalysedStep) -> Attribution:
    """Shares of all training sequences.

    Args:
        gradient: name -> gradient of entropy per token.
        rows: the training sequences' dS_i.
        weights: (n_train,) w_i.
    """
    first = first_share_factor(step)
    direction = step.share_direction(gradient)
    towards, factor, tokens = Formed(direction, lambda name: direction[name] / first), first * step.clip, None
    if isinstance(rows, RecomputedRows):  # the one pass has both
        along = rows.along(towards)
        products = along.sequences.double().cpu()
        tokens = factor * weights.double().cpu()[:, None] * along.tokens.double().cpu()
    else:
        products = rows.products(towards)
    return Attribution(factor * weights.double().cpu() * products, products, factor, tokens)


def first_share_factor(step: AnalysedStep) -> float:
    """The first group's that moves; there is one, since a step without is refused."""
    return next(factor for factor in step.share_factors().values() if factor)


def horizon_factor(state_before: AdamWParameterState) -> float:
    """A batch's change over the life of the momentum buffer, relative to its change in its own step."""
    t, beta = state_before.step + 1, state_before.beta1
    return sum(beta**j * (1 - beta**t) / (1 - beta ** (t + j)) for j in range(2000))
