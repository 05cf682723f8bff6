"""What leaving one training sequence out of the next AdamW step does to entropy, exact to first
order.

    r_i = c w_i <d, dS_i>,      d = q - [clipped] gh <q, gh> / (|gh| (|gh| + c 1e-6)),      q = a dh          elementwise
    a   = lr/(1 - beta1^t)  P_t [ (1 - beta1) - (1 - beta2)/(1 - beta2^t)  P_t gh m_t / sqrt(vh_t) ]

r_i is the change of entropy with sequence i less the change without it. Its accounting share
(entropy_experiments.step.shares) holds P_t fixed and adds up to the step; but P_t holds this
gradient's square, and so does the clip coefficient its norm: early in training leaving i out makes
P_t larger and the rest of the step longer. r_i counts that, and does not add up. The effect of
leaving out several sequences at once is, to first order, the sum of theirs.

    gh = c g the clipped gradient, g = -sum_i w_i dS_i; m_t, v_t the moments of the step, vh_t = v_t/(1 - beta2^t)
    P_t = 1/(sqrt(vh_t) + eps); dh the gradient of entropy; the second term of d only where c < 1

Derivation: -d(step)/d(gh) along c w_i dS_i, with dP/dgh = -P^2 (1 - beta2)/(1 - beta2^t)
gh/sqrt(vh) and, where c = M/(|g| + 1e-6), dgh = c dg - gh <gh, dg> / (|gh| (|g| + 1e-6)). At the
first step of all, v_1 = (1 - beta2) gh^2 makes the step the gradient's sign and every r_i next to
nothing: what leaving a sequence out does there is of higher order.
Source: docs/theory/fisher-kernel.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from entropy_core.adamw import AdamWParameterState, after_gradient, preconditioner, second_moments
from entropy_core.formed import Formed, dot, elementwise

_CLIP_EPSILON = 1e-6  # what torch's clip_grad_norm_ adds to the norm that it divides by


def gradient_weight(state_before: AdamWParameterState) -> float:
    """(1 - beta2)/(1 - beta2^t): the part of the step's second moment that is this gradient's own
    square; 1 at the first step.
    """
    return (1 - state_before.beta2) / (1 - state_before.beta2 ** (state_before.step + 1))


def leaving_out_metric(state_before: AdamWParameterState, clipped: Tensor) -> Tensor:
    """a, of the parameter's shape: what stands between gradient of entropy and rows while the clip
    coefficient is held.

    Args:
        state_before: moments before the step, with the lr that it uses.
        clipped: the gradient that the optimizer sees.
    """

    def form(clipped: Tensor, m: Tensor, v: Tensor, largest: Tensor | None = None) -> Tensor:
        before = replace(state_before, exp_avg=m, exp_avg_sq=v, max_exp_avg_sq=largest)
        after = after_gradient(before, clipped)
        p = preconditioner(after)
        v = after.exp_avg_sq if after.max_exp_avg_sq is None else after.max_exp_avg_sq
        root = (v / (1 - after.beta2**after.step)).sqrt()
        # Where v is 0 so is the gradient, and P does not move to first order; nor does it where amsgrad holds an older v.
        moves = (root > 0) & (v == after.exp_avg_sq)
        bend = torch.where(moves, clipped * after.exp_avg / root.clamp(min=torch.finfo(root.dtype).tiny), 0.0)
        bend = gradient_weight(state_before) * p * bend
        return after.lr / (1 - after.beta1**after.step) * p * ((1 - after.beta1) - bend)

    return elementwise(form, clipped, state_before.exp_avg, *second_moments(state_before))


def clip_response(clipped_norm: float, clip: float) -> float:
    """k in  dgh = c (dg - k gh <gh, dg>),  1/nats^2 of the gradient's units; 0 where nothing was clipped."""
    if clip >= 1.0 or clipped_norm <= 0.0:
        return 0.0
    return 1.0 / (clipped_norm * (clipped_norm + clip * _CLIP_EPSILON))


def leaving_out_direction(
    state_before: Mapping[str, AdamWParameterState],
    gradient: Mapping[str, Tensor],
    entropy_gradient: Mapping[str, Tensor],
    clip: float = 1.0,
) -> dict[str, Tensor]:
    """Name -> d, so that r_i = clip * w_i <d, dS_i>, nats per token for an entropy gradient of h.

    Args:
        state_before: moments before the step, with the lr that it uses.
        gradient: the loss gradient *before* clipping, clip: c.

    Raises:
        ValueError: names differ.
    """
    if not state_before.keys() == gradient.keys() == entropy_gradient.keys():
        raise ValueError("state, gradient and gradient of entropy name different parameters")
    clipped = Formed(gradient, lambda name: clip * gradient[name])
    q = Formed(gradient, lambda name: leaving_out_metric(state_before[name], clipped[name]) * entropy_gradient[name])
    return dict(answering_clip(q, clipped, clip))


def answering_clip(q: Mapping[str, Tensor], clipped: Mapping[str, Tensor], clip: float) -> Mapping[str, Tensor]:
    """Name -> d of q, with the clip coefficient's answer where c < 1; formed when it is read."""
    if clip >= 1.0:
        return q
    along = clip_response(dot(clipped, clipped) ** 0.5, clip) * dot(q, clipped)
    return Formed(q, lambda name: q[name] - along * clipped[name])
