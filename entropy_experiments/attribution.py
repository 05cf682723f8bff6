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
    """Shares (n_train,) float64 dH_i = step_factor * w_i * products, nats per token, products = <grad h, P_t dS_i>.

    Where groups of parameters have different rates, step_factor is the first group's, and the others' ratios to it are in
    the products.
    """

    shares: Tensor
    products: Tensor
    step_factor: float


def attribute(
    gradient: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    weights: Tensor,
    step: NextStep | None,
    kernel_preconditioner: Mapping[str, Tensor] | None,
    clip: float,
    learning_rate: float,
) -> Attribution:
    """Shares of all training sequences.

    gradient: name -> gradient of entropy per token. columns: name -> (n_train, *shape) rows dS_i, multiplied by
    kernel_preconditioner already (None: 1). step: the AdamW step, or None for the plain gradient step of `learning_rate`.
    """
    factors = {
        name: learning_rate if step is None else batch_step_factor(step.state[name]) for name in columns
    }  # of which at least one is not 0: such a step is refused
    first = next(f for f in factors.values() if f)
    products = torch.zeros(len(weights), dtype=torch.float64)
    for name, rows in columns.items():
        towards = gradient[name]
        if step is not None:
            towards = towards * step.preconditioner[name]
        if kernel_preconditioner is not None:
            towards = towards / kernel_preconditioner[name]
        products += factors[name] / first * (rows.flatten(1) @ towards.flatten()).double().cpu()
    factor = first * clip
    return Attribution(factor * weights.double().cpu() * products, products, factor)


def kernel_products(gradient: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Tensor:
    """(n_train,) float64 <gradient, P dS_i> under the kernel's own P, which is in `columns` already."""
    products = [(rows.flatten(1) @ gradient[name].flatten()).double().cpu() for name, rows in columns.items()]
    return torch.stack(products).sum(0)


def horizon_factor(state_before: AdamWParameterState) -> float:
    """A batch's change over the life of the momentum buffer, relative to its change in its own step."""
    t, beta = state_before.step + 1, state_before.beta1
    return sum(beta**j * (1 - beta**t) / (1 - beta ** (t + j)) for j in range(2000))
