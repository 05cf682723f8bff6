"""What leaving a training sequence out of the analysed step would do to entropy, beside its accounting share.

    accounting share            dh_i = c w_i <dh * share metric, dS_i>     P_t and c held: adds up to the step's batch part
    effect of leaving out       r_i  = c w_i <d, dS_i>                     P_t and c answer: entropy with i less without

Both are linear in the gradient of entropy dh, elementwise but for the clip's answer, so that one more column block with another
metric, E_t^T diag(a) dS_i, says how either depends on each evaluation sequence: what a bootstrap over evaluation prompts needs.
Early in training, while this gradient's own square is more than a tenth of the second moment, the two differ and the effect
decides who is named first; later the share does.

Symbols and derivation: entropy_core.leaving_out. Source: docs/theory/fisher-kernel.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_core.formed import Formed, dot
from entropy_core.leaving_out import answering_clip, clip_response, gradient_weight, leaving_out_metric
from entropy_experiments.step.gradient_rows import TrainingRows
from entropy_experiments.step.optimizer_step import AnalysedStep, PlainStep
from entropy_experiments.step.shares import first_share_factor

EARLY = 0.1
"""While (1 - beta2)/(1 - beta2^t) is above it, the effect of leaving out decides who is named first."""


def decided_by_effect(own_part: float) -> bool:
    """Whether the effect of leaving out, rather than the accounting share, says who moved entropy most.

    Not at the optimizer's first step (own part 1): its step is the gradient's sign, and no derivative says what leaving out does.
    """
    return EARLY < own_part < 1.0


def own_part_of_second_moment(step: AnalysedStep) -> float:
    """The largest (1 - beta2)/(1 - beta2^t) of all groups that move; 0 for a plain gradient step, which has no second moment."""
    if isinstance(step, PlainStep):
        return 0.0
    return max(gradient_weight(state) for state in step.state.values() if state.lr)


def effect_metric(loss_gradient: Mapping[str, Tensor], step: AnalysedStep) -> Mapping[str, Tensor]:
    """Name -> a: the effect's metric while the clip coefficient is held. loss_gradient: before clipping."""
    if isinstance(step, PlainStep):
        return Formed(loss_gradient, lambda name: torch.full_like(loss_gradient[name], step.learning_rate))
    return Formed(loss_gradient, lambda name: leaving_out_metric(step.state[name], step.clip * loss_gradient[name]))


def effects_of_leaving_out(
    entropy_gradient: Mapping[str, Tensor],
    loss_gradient: Mapping[str, Tensor],
    rows: TrainingRows,
    weights: Tensor,
    step: AnalysedStep,
    metric: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What leaving each training sequence out of the step does: one more direction of products.

    Args:
        entropy_gradient: name -> gradient of h.
        loss_gradient: name -> g before clipping.
        weights: (n_train,) w_i.
        metric: that of `effect_metric`, where it is at hand.

    Returns:
        (n_train,) float64 r_i, nats per token.
    """
    metric, clip = effect_metric(loss_gradient, step) if metric is None else metric, step.clip
    q = Formed(metric, lambda name: metric[name] * entropy_gradient[name])
    direction = answering_clip(q, Formed(loss_gradient, lambda name: clip * loss_gradient[name]), clip)
    return clip * weights.double().cpu() * rows.products(direction)


@dataclass(frozen=True)
class Contributions:
    """(n_eval, n_train) float64 contributions of evaluation sequences to a number of each training sequence, whose combination is
    the number of *any* set of evaluation sequences (entropy_experiments.step.evaluation_products).

    per_completion: nats per completion; per_token: with this buffer's own entropy taken off, None where evaluation sequences are
    given texts.
    """

    per_completion: Tensor
    per_token: Tensor | None


@dataclass(frozen=True)
class NumbersByEvaluation:
    """What accounting shares and effects are made of, by evaluation sequence.

    products: <E_t, P_t dS_i>, of which shares are step_factor * weights * products; effects: of leaving out.
    """

    products: Contributions
    effects: Contributions


def metrics_by_evaluation(
    loss_gradient: Mapping[str, Tensor], step: AnalysedStep
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Name -> what stands between E_t and dS_i: of accounting shares, and of effects while the clip coefficient is held."""
    ones = Formed(loss_gradient, lambda name: torch.ones_like(loss_gradient[name]))
    return step.share_direction(ones), effect_metric(loss_gradient, step)


def numbers_by_evaluation(
    kernels: tuple[list[Tensor], list[Tensor]],
    loss_gradient: Mapping[str, Tensor],
    rows: TrainingRows,
    weights: Tensor,
    step: AnalysedStep,
) -> NumbersByEvaluation:
    """Out of products of evaluation rows with the training rows.

    Args:
        kernels: for each of `metrics_by_evaluation`, (n_eval, n_train) E_t^T diag(a) dS_i: per token and per completion, in this
            order, or those of given tokens alone.
        loss_gradient: name -> g before clipping.
        weights: (n_train,) w_i.
    """
    shares, effects = ([k.double() for k in found] for found in kernels)
    clip = step.clip
    scale = clip * weights.double().to(effects[0].device)
    effects = [scale * k for k in effects]
    if clip < 1.0:
        clipped = Formed(loss_gradient, lambda name: clip * loss_gradient[name])
        norm = dot(clipped, clipped) ** 0.5
        along = rows.products(clipped).to(scale.device) * scale * clip_response(norm, clip)
        # <E_t, a gh>, with gh = -sum_i c w_i dS_i, is minus the sum of a row
        effects = [k + k.sum(1, keepdim=True) * along for k in effects]
    first = first_share_factor(step)
    return NumbersByEvaluation(_contributions([k / first for k in shares]), _contributions(effects))


def _contributions(found: list[Tensor]) -> Contributions:
    return Contributions(found[-1], found[0] if len(found) == 2 else None)
