"""Each training sequence's accounting share of the change of entropy that the step's own batch makes, and the effect of
leaving it out of the step, while training.

    dh_i = c <sum_k w_ik grad log pi_ik, s g> ,    dtheta_batch = -s g_loss ,    g_loss = -c sum_ik w_ik grad log pi_ik

g the gradient of entropy, s what the optimizer multiplies the loss gradient by in its batch part
(rl_training.probe.step_parts),
c the coefficient of gradient clipping, w_ik the weight in the loss of token k of sequence i: one w_i for all of them while the
policy is the one that drew the sequences (entropy_core.weighting), times the ratio of the two policies, and 0 where it is
clipped, once it has moved. The shares add up to the batch part. The effects r_i (entropy_core.leaving_out) do not: in them P and
the clip answer. The loss gradient is rebuilt from the weights, and where it is
not the one that the optimizer got (other terms in the loss, other weights) there is an error instead of shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.formed import Formed
from entropy_core.gradients import batch_gradients, stream_rows, trainable_parameters
from entropy_core.leaving_out import clip_response
from entropy_core.passes.fold_rows import FoldRows
from entropy_core.passes.settings import PassSettings
from entropy_core.processes import Processes

# What of the real gradient may be left over, relative to its size, before the weights are not the loss's.
SAME_GRADIENT = 1e-3
# A coefficient of clipping this near to 1 is 1: it is found by comparing gradients, to rounding.
SAME_CLIP = 1e-3


@dataclass(frozen=True)
class TrainingSequences:
    """The sequences that the step trains on.

    advantages: (N,) A_i. weights: (N,) w_i, or (N, L) w_ik in the batch's layout, 0 off completions; None where they are not
    known. max_norm: what the step clips the gradient's norm to (0: not at all); None where only the gradient tells.
    """

    batch: SequenceBatch
    advantages: Tensor
    weights: Tensor | None = None
    max_norm: float | None = None


VECTORS = 8
"""Held over all trained parameters for shares: the gradient of entropy, scales of step and effects, the gradient rebuilt, 4 in
the check of rows; rows of one parameter at a time come on top.
"""


@dataclass(frozen=True)
class StepAttribution:
    """(N,) float64 shares dh_i and effects r_i of leaving out, nats per token; effects None where no metric was given, or where
    `no_effects` says why.
    """

    shares: Tensor
    effects: Tensor | None
    no_effects: str | None = None


def attribute_sequences(
    model: nn.Module,
    training: TrainingSequences,
    entropy_gradient: Mapping[str, Tensor],
    step_per_gradient: Mapping[str, Tensor],
    sharing: Processes,
    rows: FoldRows | None = None,
    tolerance: float = SAME_GRADIENT,
    metric: Mapping[str, Tensor] | None = None,
) -> StepAttribution:
    """Shares and effects from one forward and backward pass over the training sequences.

    rows: where `rows.failure` says that this model has no per-sequence rows, or becomes so here, one pass a sequence. `p.grad`
    must hold the loss gradient as the optimizer gets it. metric: of rl_training.probe.step_parts.effect_metric. Raises ValueError
    where the weights do not give the gradient, to a relative error of `tolerance`.
    """
    if training.weights is None:
        raise ValueError("shares need each sequence's weight in the loss, which is not known for this loss")
    parameters, rows = trainable_parameters(model), rows or FoldRows()
    mine = sharing.my_sequences(training.batch.prompt_index)
    coefficients, device = _coefficients(training.batch, training.weights), training.batch.device
    towards = Formed(
        entropy_gradient, lambda name: (g := entropy_gradient[name]) * step_per_gradient[name].to(g.device)
    )
    q, clipped = _effect_directions(parameters, entropy_gradient, metric)
    further = torch.zeros((len(training.batch), 2), dtype=torch.float64, device=device)

    def nothing() -> tuple[Tensor, dict[str, Tensor]]:
        zeros = {
            n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in parameters.items()
        }
        return torch.zeros(len(training.batch), dtype=torch.float64, device=device), zeros

    products, rebuilt = nothing()

    def sink(_number: int, name: str, indices: Tensor, some: Tensor) -> None:
        which = mine[indices.to(mine.device)]
        products.index_add_(0, which, (some.flatten(1) @ towards[name].flatten().to(some)).double().to(device))
        rebuilt[name] -= some.sum(0)
        for k, direction in enumerate((q, clipped)):
            if name in direction:
                found = some.flatten(1) @ direction[name].flatten().to(some)
                further[:, k].index_add_(0, which, found.double().to(device))

    part = training.batch.select(mine) if len(mine) else None
    rows.begin(parameters)
    if rows.failure is None:
        trouble = None
        try:
            if part is not None:
                stream_rows(model, part, [_of(coefficients, mine)], sink, PassSettings(method="hooks"), as_trained=True)
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            trouble = str(error)
        if sharing.any(trouble is not None, device):
            rows.fail(trouble or "another process could not form per-sequence gradients")
            products, rebuilt = nothing()
            further.zero_()
    if rows.failure is not None and part is not None:
        for n in range(len(part)):
            one = part.select([n])
            alone = batch_gradients(model, one, [_of(coefficients, mine[n : n + 1])], as_trained=True)[0]
            for name, gradient in alone.items():
                sink(0, name, torch.tensor([n]), gradient[None])
    clip = clip_coefficient(parameters, {name: sharing.sum(g) for name, g in rebuilt.items()}, tolerance)
    shares = clip * sharing.sum(products)
    if metric is None:
        return StepAttribution(shares, None)
    if (scaled := scaled_otherwise(parameters, clip, training.max_norm, tolerance)) is not None:
        why = (
            f"{scaled}: training sequences have shares, and no effects of leaving them out, in which that would answer"
        )
        return StepAttribution(shares, None, why)
    along, answer = sharing.sum(further).unbind(1)
    if clip < 1 - SAME_CLIP:  # along the clipped gradient the step is shorter by as much as the norm grows
        size = sum(float(g.double().square().sum()) for g in clipped.values())
        of_clip = sum(float((q[name] * clipped[name]).double().sum()) for name in q)
        along = along - clip_response(size**0.5, clip) * of_clip * answer
    return StepAttribution(shares, clip * along)


def _effect_directions(
    parameters: Mapping[str, nn.Parameter],
    entropy_gradient: Mapping[str, Tensor],
    metric: Mapping[str, Tensor] | None,
) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """(q, formed when it is read; clipped gradient) of what moves; empty without a metric."""
    moving = [] if metric is None else [name for name, p in parameters.items() if p.grad is not None and name in metric]
    q = Formed(moving, lambda name: (metric or {})[name] * entropy_gradient[name])
    return q, {name: g.detach() for name in moving if (g := parameters[name].grad) is not None}


def _of(coefficients: TokenCoefficients, sequences: Tensor) -> TokenCoefficients:
    return TokenCoefficients(coefficients.entropy[sequences], coefficients.logprob[sequences])


def _coefficients(batch: SequenceBatch, weights: Tensor) -> TokenCoefficients:
    if weights.dim() == 1:
        return score_coefficients(batch, weights)
    return TokenCoefficients(torch.zeros_like(weights, dtype=torch.float64), weights.double() * batch.completion_mask)


def clip_coefficient(
    parameters: Mapping[str, nn.Parameter], rebuilt: Mapping[str, Tensor], tolerance: float = SAME_GRADIENT
) -> float:
    """c with p.grad = c * rebuilt over all parameters. Raises ValueError where more than `tolerance` of p.grad is left over."""
    both = own = real = 0.0
    for name, p in parameters.items():
        if p.grad is None:
            continue
        g, r = p.grad.detach().double().flatten(), rebuilt[name].double().flatten()
        both, own, real = both + float(g @ r), own + float(r @ r), real + float(g @ g)
    if real == 0.0:
        return 0.0
    coefficient = both / own if own > 0 else 0.0
    left = sum(_left_over(p, rebuilt[name], coefficient) for name, p in parameters.items()) ** 0.5 / real**0.5
    if not (left <= tolerance and coefficient > 0):
        raise ValueError(
            f"the loss gradient is not the weighted sum of scores that it was rebuilt as ({left:.2%} of it is left over): the "
            "loss holds another term, weights sequences otherwise, or was computed on another forward pass, or a callback or "
            "hook changes the gradient before the step (clips it by value or by group, adds to it); use mode=simple"
        )
    return coefficient


def scaled_otherwise(
    parameters: Mapping[str, nn.Parameter], clip: float, max_norm: float | None, tolerance: float = SAME_GRADIENT
) -> str | None:
    """A sentence where `clip`, the real gradient relative to the loss's, is not of clipping its norm to `max_norm`, as of a
    callback that scales, normalises or clips by a limit of its own; None where it is, or may be if max_norm is None.
    """
    expected = min(1.0, clip)
    if max_norm is not None:  # norm / clip is that of the loss's own gradient
        expected = min(1.0, max_norm * clip / _norm(parameters)) if max_norm and clip else 1.0
    if clip == 0.0 or abs(clip - expected) <= max(SAME_CLIP, tolerance) * expected:
        return None
    return (
        f"the optimizer gets {clip:.4g} times the loss's gradient, where clipping its norm makes it {expected:.4g} times: "
        "something else (a callback, a hook) scales or clips it"
    )


def _norm(parameters: Mapping[str, nn.Parameter]) -> float:
    return sum(float(p.grad.double().square().sum()) for p in parameters.values() if p.grad is not None) ** 0.5


def _left_over(p: nn.Parameter, rebuilt: Tensor, coefficient: float) -> float:
    """|p.grad - coefficient * rebuilt|^2; not from inner products, in which a small remainder would drown."""
    if p.grad is None:
        return 0.0
    return float((p.grad.detach().double() - coefficient * rebuilt.to(p.grad.device).double()).square().sum())
