"""What leaving one training sequence out of the next AdamW step does to entropy, exact to first order.

    r_i = c w_i <d, dS_i>,      d = q - [clipped] gh <q, gh> / |gh|^2
    q   = lr/(1 - beta1^t)  dh P_t [ (1 - beta1) - (1 - beta2)/(1 - beta2^t)  P_t gh m_t / sqrt(vh_t) ]        elementwise

r_i is the change of entropy with sequence i less the change without it. Its accounting share (entropy_experiments.step.shares)
holds P_t fixed and adds up to the step; but P_t holds this gradient's square, and so does the clip coefficient its norm: early in
training leaving i out makes P_t larger and the rest of the step longer. r_i counts that, and does not add up.

    gh = c g the clipped gradient, g = -sum_i w_i dS_i; m_t, v_t the moments of the step, vh_t = v_t/(1 - beta2^t)
    P_t = 1/(sqrt(vh_t) + eps); dh the gradient of entropy; the second term of d only where c < 1

Derivation: -d(step)/d(gh) along c w_i dS_i, with dP/dgh = -P^2 (1 - beta2)/(1 - beta2^t) gh/sqrt(vh) and, where c = M/|g|,
dgh = (1 - gh gh^T/|gh|^2) c dg. Source: docs/theory/fisher-kernel.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_core.adamw import AdamWParameterState, after_gradient


def leaving_out_direction(
    state_before: Mapping[str, AdamWParameterState],
    gradient: Mapping[str, Tensor],
    entropy_gradient: Mapping[str, Tensor],
    clip: float = 1.0,
) -> dict[str, Tensor]:
    """Name -> d, so that r_i = clip * w_i <d, dS_i>, nats per token for an entropy gradient of h.

    state_before: moments before the step, with the lr that it uses. gradient: the loss gradient *before* clipping, clip: c.

    Raises ValueError when names differ.
    """
    if not state_before.keys() == gradient.keys() == entropy_gradient.keys():
        raise ValueError("state, gradient and gradient of entropy name different parameters")
    clipped = {name: clip * g for name, g in gradient.items()}
    found = {}
    for name, before in state_before.items():
        own, after = clipped[name], after_gradient(before, clipped[name])
        root = (after.exp_avg_sq / (1 - after.beta2**after.step)).sqrt()
        p = 1 / (root + after.eps)
        # where v is 0 so is the gradient, and P does not move to first order
        bend = torch.where(root > 0, own * after.exp_avg / root.clamp(min=torch.finfo(root.dtype).tiny), 0.0)
        bend = (1 - after.beta2) / (1 - after.beta2**after.step) * p * bend
        factor = after.lr / (1 - after.beta1**after.step)
        found[name] = factor * entropy_gradient[name] * p * ((1 - after.beta1) - bend)
    if clip >= 1.0:
        return found
    along = sum(float((found[name] * g).double().sum()) for name, g in clipped.items())
    size = sum(float(g.double().square().sum()) for g in clipped.values())
    return {name: d - along / size * clipped[name] for name, d in found.items()} if size > 0 else found
