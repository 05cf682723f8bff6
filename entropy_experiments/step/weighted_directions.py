"""What other weights of the training sequences do along evaluation rows, without rows or kernels: derivatives along each.

    g(w) = -sum_i w_i dS_i           <E_t, -P g> = sum_i KH(t, i) w_i        <dS_t, -P g> = sum_i K1(t, i) w_i
                                     <g, P g> = w^T K w                      K = K1 of the training side with itself

A gradient and a pass in forward mode over the evaluation sequences for every w.
Source: docs/theory/fisher-kernel.md, "Properties that are checked".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from entropy_core.directional import entropy_derivatives, token_derivatives
from entropy_core.formed import Formed, dot
from entropy_core.passes.settings import PassSettings
from entropy_experiments.step.evaluation_products import EvaluationSide
from entropy_experiments.step.gradient_rows import TrainingRows


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
    found: list[tuple[Tensor, Tensor, float, float]] = []
    for number, weights in enumerate(weightings):
        gradient = run if number == 0 else rows.weighted_gradient(weights)
        under = Formed(gradient, lambda name, g=gradient: -g[name] if p is None else -p[name] * g[name])
        squares, with_run = -dot(gradient, under), -dot(run, under)
        along = token_derivatives(model, side.batch, under, passes)
        entropy = entropy_derivatives(side.statistics, along, side.batch, side.estimand.gradient, per_token=True)
        found.append((entropy, along.scores(), squares, with_run))
        del gradient, under
    entropies, scores, *numbers = zip(*found, strict=True)
    squared, crossed = (torch.tensor(values, dtype=torch.float64) for values in numbers)
    return WeightedProducts(torch.stack(entropies, 1), torch.stack(scores, 1), squared, crossed)
