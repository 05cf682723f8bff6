"""Each training sequence's share of the change of entropy that the step's own batch makes, while training.

    dh_i = c w_i <dS_i, s g> ,    dtheta_batch = -s g_loss ,    g_loss = -c sum_i w_i dS_i

g the gradient of entropy, s what the optimizer multiplies the loss gradient by in its batch part
(rl_training.algs.step_parts),
c the coefficient of gradient clipping, w_i the weight of sequence i in the loss (entropy_core.weighting). The shares add up
to the batch part. The loss must be linear in the scores: its gradient is rebuilt from the weights, and where it is not the one
that the optimizer got (ratio clipping, KL, an entropy bonus, other weights) there is an error instead of shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import score_coefficients
from entropy_core.fold_rows import FoldRows
from entropy_core.gradients import batch_gradients, stream_rows, trainable_parameters
from entropy_core.work_sharing import WorkSharing

# Cosine of the rebuilt with the real gradient below which the weights are not the loss's.
_SAME_GRADIENT = 0.9999


@dataclass(frozen=True)
class TrainingSequences:
    """The sequences that the step trains on. advantages, weights: (N,) A_i, and w_i where the loss is linear in scores."""

    batch: SequenceBatch
    advantages: Tensor
    weights: Tensor | None = None


def step_shares(
    model: nn.Module,
    training: TrainingSequences,
    entropy_gradient: Mapping[str, Tensor],
    step_per_gradient: Mapping[str, Tensor],
    sharing: WorkSharing,
    rows: FoldRows | None = None,
) -> Tensor:
    """(N,) float64 dh_i, nats per token, from one forward and backward pass over the training sequences.

    rows: where `rows.failure` says that this model has no per-sequence rows, or becomes so here, one pass a sequence. `p.grad`
    must hold the loss gradient as the optimizer gets it. Raises ValueError where it is not linear in the scores.
    """
    if training.weights is None:
        raise ValueError("shares need each sequence's weight in the loss, which is not known for this loss")
    parameters, rows = trainable_parameters(model), rows or FoldRows()
    mine = sharing.mine(training.batch.prompt_index)
    weights, device = training.weights.double(), training.batch.device
    towards = {name: (g * step_per_gradient[name].to(g.device)).flatten() for name, g in entropy_gradient.items()}

    def nothing() -> tuple[Tensor, dict[str, Tensor]]:
        zeros = {
            n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in parameters.items()
        }
        return torch.zeros(len(training.batch), dtype=torch.float64, device=device), zeros

    products, rebuilt = nothing()

    def sink(_number: int, name: str, indices: Tensor, some: Tensor) -> None:
        which = mine[indices.to(mine.device)]
        products.index_add_(0, which, (some.flatten(1) @ towards[name].to(some)).double().to(device))
        rebuilt[name] -= torch.einsum("n,n...->...", weights[which].to(some), some)

    part = training.batch.select(mine) if len(mine) else None
    rows.begin(parameters)
    if rows.failure is None:
        trouble = None
        try:
            if part is not None:
                stream_rows(model, part, [score_coefficients(part)], sink)
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            trouble = str(error)
        if sharing.any(trouble is not None, device):
            rows.fail(trouble or "another process could not form per-sequence gradients")
            products, rebuilt = nothing()
    if rows.failure is not None and part is not None:
        for n in range(len(part)):
            one = part.select([n])
            for name, gradient in batch_gradients(model, one, [score_coefficients(one)])[0].items():
                sink(0, name, torch.tensor([n]), gradient[None])
    products = sharing.sum(products)
    clip = clip_coefficient(parameters, {name: sharing.sum(g) for name, g in rebuilt.items()})
    return clip * weights * products


def clip_coefficient(parameters: Mapping[str, nn.Parameter], rebuilt: Mapping[str, Tensor]) -> float:
    """c with p.grad = c * rebuilt over all parameters. Raises ValueError where they point in different directions."""
    both = own = real = 0.0
    for name, p in parameters.items():
        if p.grad is None:
            continue
        g, r = p.grad.detach().double().flatten(), rebuilt[name].double().flatten()
        both, own, real = both + float(g @ r), own + float(r @ r), real + float(g @ g)
    if real == 0.0:
        return 0.0
    cosine = both / (own * real) ** 0.5 if own > 0 else 0.0
    if cosine < _SAME_GRADIENT:
        raise ValueError(
            f"the loss gradient is not the weighted sum of scores that it was rebuilt as (cosine {cosine:.4f}): ratio clipping, "
            "a KL or entropy term, reused completions or another loss; use mode=simple"
        )
    return both / own
