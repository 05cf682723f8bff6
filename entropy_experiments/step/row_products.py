"""What steps are along the gradient rows of evaluation sequences: a backward pass for many steps, or one in forward mode each.

    <row_t, dtheta_j>          t over sequences, j over steps; rows of the kinds that an estimator and the reward need
                               = sum_k [ alpha_k D H_k + gamma_k D log pi(a_k) ]  along dtheta_j  (entropy_core.directional)

Rows of a model of which all weights are trained are as large as the model: no row is formed there.

Source: docs/analyses/prices.md; what is made of them: evaluation_products.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from entropy_core.cut_weights import any_of, total
from entropy_core.directional import token_derivatives
from entropy_core.entropy import TokenCoefficients
from entropy_core.gradients import stream_rows, trainable_parameters
from entropy_core.passes.settings import PassSettings
from entropy_experiments.kernel.contraction import RowKind
from entropy_experiments.step.evaluation_products import EvaluationSide

LARGE_ROW = 2**27
"""Bytes of a row from which on none is formed: a step is a pass in forward mode."""


def rows_are_large(model: nn.Module) -> bool:
    """Whether steps take a pass each; the same in every process."""
    size = sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())
    return any(any_of([size > LARGE_ROW]))


def products_with_steps(
    model: nn.Module, side: EvaluationSide, steps: Sequence[Mapping[str, Tensor]], passes: PassSettings
) -> dict[RowKind, Tensor]:
    """kind -> (n_eval, len(steps)) float64, from one pass over the evaluation sequences, or one for each step.

    Args:
        side: its estimand's `gradient` says which kinds there are; `score` is always among them.
        steps: name -> tensor of the parameter's shape, each.
    """
    kinds: tuple[RowKind, ...] = ("score", *side.headline_kinds)
    wanted: dict[RowKind, TokenCoefficients] = {k: found for k, found in side.coefficients().items() if k in kinds}
    batch = side.batch
    if rows_are_large(model):
        along = [token_derivatives(model, batch, step, passes) for step in steps]
        return {
            kind: torch.stack(
                [(c.entropy * d.entropies.double() + c.logprob * d.logprobs.double()).sum(1) for d in along], 1
            )
            for kind, c in wanted.items()
        }
    vectors = {name: torch.stack([step[name].flatten() for step in steps], 1) for name in steps[0]}
    found = [torch.zeros(len(batch), len(steps), dtype=torch.float64, device=batch.device) for _ in wanted]

    def sink(number: int, name: str, indices: Tensor, part: Tensor) -> None:
        products = part.flatten(1) @ vectors[name].to(part)
        found[number].index_add_(0, indices.to(batch.device), products.double().to(batch.device))

    def restart() -> None:
        for products in found:
            products.zero_()

    stream_rows(model, batch, list(wanted.values()), sink, passes, restart)
    return dict(zip(wanted, map(total, found), strict=True))
