"""The next AdamW step from a checkpoint, and the policy put anywhere along it and back again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from entropy_core.adamw import (
    AdamWParameterState,
    AdamWUpdate,
    after_gradient,
    batch_step_factor,
    preconditioner,
    read_adamw_state,
    split_adamw_update,
)
from entropy_core.gradients import trainable_parameters
from entropy_experiments.kernel.contraction import PARTS
from rl_training.errors import UserError


@dataclass(frozen=True)
class NextStep:
    """The step that AdamW takes next with a given loss gradient.

    update: its exact parts; parameter_delta: theta_after - theta_before of the real optimizer; clip: c in g_clipped = c g, with
    gradient_norm before clipping; state: the moments before it; step_preconditioner: the step's own P_t.
    """

    update: AdamWUpdate
    parameter_delta: dict[str, Tensor]
    clip: float
    gradient_norm: float
    state: dict[str, AdamWParameterState]
    step_preconditioner: dict[str, Tensor]

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The step and what it is made of, by the names in PARTS."""
        u = self.update
        return dict(zip(PARTS, (self.parameter_delta, u.batch, u.momentum, u.weight_decay), strict=True))

    def rates(self) -> dict[str, float]:
        """Learning rate of each parameter."""
        return {name: state.lr for name, state in self.state.items()}

    def share_factors(self) -> dict[str, float]:
        """What stands before P_t in the batch's part of each parameter's step."""
        return {name: batch_step_factor(state) for name, state in self.state.items()}

    def share_direction(self, gradient_of_h: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """u with dh_i = c w_i <dS_i, u>: the step's rates and P_t times grad h."""
        factors, p = self.share_factors(), self.step_preconditioner
        return {name: factors[name] * p[name] * g for name, g in gradient_of_h.items()}


@dataclass(frozen=True)
class PlainStep:
    """-lr c g, the step of a checkpoint without optimizer state, with the interface of NextStep.

    parameter_delta: the step; clip: c, with gradient_norm before clipping.
    """

    parameter_delta: dict[str, Tensor]
    learning_rate: float
    clip: float
    gradient_norm: float

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """As NextStep.parts; the batch makes all of the step."""
        nothing = {name: torch.zeros_like(part) for name, part in self.parameter_delta.items()}
        return dict(zip(PARTS, (self.parameter_delta, self.parameter_delta, nothing, nothing), strict=True))

    def rates(self) -> dict[str, float]:
        """Learning rate of each parameter."""
        return dict.fromkeys(self.parameter_delta, self.learning_rate)

    def share_factors(self) -> dict[str, float]:
        """As NextStep.share_factors, with P_t = 1."""
        return self.rates()

    def share_direction(self, gradient_of_h: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As NextStep.share_direction."""
        return {name: self.learning_rate * g for name, g in gradient_of_h.items()}


AnalysedStep = NextStep | PlainStep


def clip_coefficient(gradient: Mapping[str, Tensor], max_norm: float | None) -> tuple[float, float]:
    """(c, norm before clipping) as torch's clip_grad_norm_ computes them; c = 1 without clipping."""
    first = next(iter(gradient.values()))
    norm = float(torch.stack([g.norm().to(first.device) for g in gradient.values()]).norm())
    if max_norm is None or max_norm <= 0:
        return 1.0, norm
    return min(1.0, max_norm / (norm + 1e-6)), norm


def take_next_step(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    gradient: Mapping[str, Tensor],
    max_norm: float | None,
    learning_rate: float | None = None,
) -> NextStep:
    """Split the next step exactly, and let the real optimizer take it; model and optimizer are put back afterwards.

    Args:
        gradient: name -> loss gradient before clipping.
        max_norm: of clipping; None: not clipped.
        learning_rate: in place of every group's own.

    Raises:
        UserError: where the step's rate is 0.
    """
    parameters = trainable_parameters(model)
    clip, norm = clip_coefficient(gradient, max_norm)
    saved = copy.deepcopy(optimizer.state_dict())
    state = {
        name: s if learning_rate is None else replace(s, lr=learning_rate)
        for name, s in read_adamw_state(optimizer, parameters).items()
    }
    if not any(s.lr for s in state.values()):
        raise UserError(
            "the learning rate of the analysed step is 0 (end of a schedule, or first warm-up step): every change would be 0; "
            "give checkpoint.learning_rate=..."
        )
    # What never had a gradient and has none now is passed over, as torch does: no moments, no weight decay.
    idle = {name for name, s in state.items() if not s.step and not bool(gradient[name].any())}
    clipped: dict[str, Tensor | None] = {
        name: None if name in idle else (g * clip).to(parameters[name].dtype) for name, g in gradient.items()
    }
    update = split_adamw_update(state, clipped, parameters)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for name, p in parameters.items():
        p.grad = clipped[name]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if learning_rate is None else learning_rate
    try:
        optimizer.step()
        delta = {name: p.detach() - before[name] for name, p in parameters.items()}
    finally:
        optimizer.zero_grad(set_to_none=True)
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
    # The step has changed the moments in place; those from before it are the ones that were put back.
    restored = read_adamw_state(optimizer, parameters)
    state = {name: replace(restored[name], lr=s.lr) for name, s in state.items()}
    own_p = {
        name: torch.full_like(gradient[name], torch.finfo(gradient[name].dtype).tiny)
        if name in idle
        else preconditioner(after_gradient(s, clip * gradient[name]))
        for name, s in state.items()
    }
    return NextStep(update, delta, clip, norm, state, own_p)


def plain_step(gradient: Mapping[str, Tensor], max_norm: float | None, learning_rate: float | None) -> PlainStep:
    """The step without optimizer state. Raises UserError without a learning rate."""
    if not learning_rate:
        raise UserError("without optimizer state the step's size is unknown: give checkpoint.learning_rate=...")
    clip, norm = clip_coefficient(gradient, max_norm)
    return PlainStep({name: -learning_rate * clip * g for name, g in gradient.items()}, learning_rate, clip, norm)
