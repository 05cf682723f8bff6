"""What other weights of the training sequences do along evaluation rows, without rows or kernels: derivatives along each.

    g(w) = -sum_i w_i dS_i           <E_t, -P g> = sum_i KH(t, i) w_i        <dS_t, -P g> = sum_i K1(t, i) w_i
                                     <g, P g> = w^T K w                      K = K1 of the training side with itself

A gradient for every w, and a pass in forward mode over the evaluation sequences for as many as are independent: the others are
combinations of them, and so are their products.
Source: docs/theory/fisher-kernel.md, "Properties that are checked".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import qr
from torch import Tensor, nn

from entropy_core.directional import entropy_derivatives, token_derivatives
from entropy_core.formed import Formed, dot
from entropy_core.passes.settings import PassSettings
from entropy_experiments.step.evaluation_products import EvaluationSide
from entropy_experiments.step.gradient_rows import TrainingRows

# Weights are differences of rewards over lengths, in float64: what is a combination is one to rounding.
_DEPENDENT = 1e-9


class WeightedProducts(NamedTuple):
    """Of m weightings, float64. entropy, score: (n_eval, m) products of E_t and dS_t with -P g(w). squares: (m,) w^T K w.
    with_run: (m,) the same with the first weighting on the left.
    """

    entropy: Tensor
    score: Tensor
    squares: Tensor
    with_run: Tensor


def products_with_weightings(
    model: nn.Module,
    side: EvaluationSide,
    rows: TrainingRows,
    weightings: Sequence[Tensor],
    p: Mapping[str, Tensor] | None,
    passes: PassSettings,
) -> WeightedProducts:
    """All of them, one at a time: two vectors over the parameters are held beside a direction.

    Args:
        rows: of the training sequences.
        weightings: (n_train,) each, the run's own first.
        p: name -> P; None: 1.
    """
    run = rows.weighted_gradient(weightings[0])
    basis, combinations = independent(torch.stack(list(weightings), 1).double().cpu())
    entropies, scores, squares, with_run = list[Tensor](), list[Tensor](), list[float](), list[float]()
    for number, weights in enumerate(weightings):
        gradient = run if number == 0 else rows.weighted_gradient(weights)
        under = Formed(gradient, lambda name, g=gradient: -g[name] if p is None else -p[name] * g[name])
        squares.append(-dot(gradient, under))
        with_run.append(-dot(run, under))
        if number in basis:
            along = token_derivatives(model, side.batch, under, passes)
            entropies.append(
                entropy_derivatives(side.statistics, along, side.batch, side.estimand.gradient, per_token=True)
            )
            scores.append(along.scores())
        del gradient, under
    squared, crossed = (torch.tensor(values, dtype=torch.float64) for values in (squares, with_run))
    entropy, score = (torch.stack(found, 1) @ combinations.to(found[0]) for found in (entropies, scores))
    return WeightedProducts(entropy, score, squared, crossed)


def independent(columns: Tensor) -> tuple[list[int], Tensor]:
    """Numbers of columns of (n, m), one at least and ascending, whose combinations all are; and (as many, m) coefficients."""
    factors: Any = qr(columns.numpy(), mode="economic", pivoting=True)
    _, triangle, order = factors
    size = np.abs(np.diag(triangle))
    basis = sorted(order[: max(1, int((size > _DEPENDENT * size[0]).sum()))].tolist())
    return basis, torch.linalg.lstsq(columns[:, basis], columns, driver="gelsd").solution
