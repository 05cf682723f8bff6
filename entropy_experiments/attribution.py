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

import torch
from torch import Tensor

from entropy_core.adamw import AdamWParameterState, batch_step_factor
from entropy_experiments.optimizer_step import NextStep


@dataclass(frozen=True)
class Attribution:
    """shares: (n_train,) float64 dH_i, nats per token. entropy_products: (n_train,) <grad h, P dS_i> under the kernel's P."""

    shares: Tensor
    entropy_products: Tensor
    horizon_factor: float


def attribute(
    grad_h: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    weights: Tensor,
    step: NextStep | None,
    kernel_preconditioner: Mapping[str, Tensor] | None,
    clip: float,
    learning_rate: float,
) -> Attribution:
    """Shares of all training sequences.

    grad_h: name -> gradient of entropy per token. columns: name -> (n_train, *shape) rows dS_i, multiplied by
    kernel_preconditioner already (None: 1). step: the AdamW step, or None for the plain gradient step of `learning_rate`.
    """
    inner = torch.zeros(len(weights), dtype=torch.float64)
    products = torch.zeros_like(inner)
    for name, rows in columns.items():
        flat, towards = rows.flatten(1), grad_h[name]
        products += (flat @ towards.flatten()).double().cpu()
        factor = learning_rate
        if step is not None:
            factor = batch_step_factor(step.state[name])
            towards = towards * step.preconditioner[name]
        if kernel_preconditioner is not None:
            towards = towards / kernel_preconditioner[name]
        inner += factor * (flat @ towards.flatten()).double().cpu()
    horizon = 1.0 if step is None else horizon_factor(next(iter(step.state.values())))
    return Attribution(clip * weights.double().cpu() * inner, products, horizon)


def horizon_factor(state_before: AdamWParameterState) -> float:
    """A batch's change over the life of the momentum buffer, relative to its change in its own step."""
    t, beta = state_before.step + 1, state_before.beta1
    return sum(beta**j * (1 - beta**t) / (1 - beta ** (t + j)) for j in range(2000))
