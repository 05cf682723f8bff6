"""The next AdamW step from a checkpoint: what it is made of, and what torch's optimizer makes of it.

Nothing of the parameters' size is held but the loss gradient and, beside it, what the checkpoint's file holds of moments. The
step, its parts and P are formed one parameter at a time, when they are read: they are valid as long as weights, gradient and
moments are as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from entropy_core.adamw import (
    AdamWParameterState,
    AdamWUpdate,
    Moments,
    batch_step_factor,
    preconditioner_after,
    read_adamw_state,
    second_moments,
    split_parameter_step,
)
from entropy_core.cut_weights import any_of, norm_of_parts
from entropy_core.formed import Formed, elementwise
from entropy_core.gradients import trainable_parameters
from entropy_experiments.kernel.contraction import PARTS
from rl_training.errors import UserError


@dataclass(frozen=True)
class NextStep:
    """The step that AdamW takes next with a given loss gradient.

    parameters: the weights before it. gradient: name -> loss gradient before clipping; clip: c in g_clipped = c g, with
    gradient_norm before clipping. state: the moments before it, with the rates of the step. idle: parameters that never had a
    gradient and have none now: torch passes over them, without moments and weight decay.
    """

    parameters: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    clip: float
    gradient_norm: float
    state: Mapping[str, AdamWParameterState]
    idle: frozenset[str]

    def clipped(self, name: str) -> Tensor | None:
        """The gradient that the optimizer sees."""
        return None if name in self.idle else (self.gradient[name] * self.clip).to(self.parameters[name].dtype)

    @cached_property
    def update(self) -> AdamWUpdate:
        """The step's exact parts."""

        def split(name: str) -> tuple[Tensor, Tensor, Tensor]:
            return split_parameter_step(self.state[name], self.clipped(name), self.parameters[name])

        return AdamWUpdate(*(Formed(self.parameters, lambda name, k=k: split(name)[k]) for k in range(3)))

    @cached_property
    def sum_of_parts(self) -> Mapping[str, Tensor]:
        """`update`'s total, its parts formed together."""

        def form(name: str) -> Tensor:
            batch, momentum, decay = split_parameter_step(self.state[name], self.clipped(name), self.parameters[name])
            return batch.add_(momentum).add_(decay)

        return Formed(self.parameters, form)

    @cached_property
    def parameter_delta(self) -> Mapping[str, Tensor]:
        """theta_after - theta_before of torch's own optimizer."""
        return Formed(
            self.parameters, lambda name: taken_step(self.state[name], self.clipped(name), self.parameters[name])
        )

    @cached_property
    def unrounded_delta(self) -> Mapping[str, Tensor]:
        """As `parameter_delta`, of weights in float64, which hold every step."""

        def form(name: str) -> Tensor:
            return taken_step(self.state[name], self.clipped(name), self.parameters[name], torch.float64)

        return Formed(self.parameters, form)

    @cached_property
    def step_preconditioner(self) -> Mapping[str, Tensor]:
        """The step's own P_t; next to nothing for what it passes over."""

        def form(name: str) -> Tensor:
            gradient = self.gradient[name]
            if name in self.idle:
                return torch.full_like(gradient, torch.finfo(gradient.dtype).tiny)
            return preconditioner_after(self.state[name], self.clip * gradient)

        return Formed(self.parameters, form)

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """The step and what it is made of, by the names in PARTS."""
        u = self.update
        return dict(zip(PARTS, (self.parameter_delta, u.batch, u.momentum, u.weight_decay), strict=True))

    def rates(self) -> dict[str, float]:
        """Learning rate of each parameter."""
        return {name: state.lr for name, state in self.state.items()}

    def share_factors(self) -> dict[str, float]:
        """What stands before P_t in the batch's part of each parameter's step."""
        return {name: batch_step_factor(state) for name, state in self.state.items()}

    def share_direction(self, gradient_of_h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """u with dh_i = c w_i <dS_i, u>: the step's rates and P_t times grad h."""
        factors, p = self.share_factors(), self.step_preconditioner
        return Formed(gradient_of_h, lambda name: factors[name] * p[name] * gradient_of_h[name])


@dataclass(frozen=True)
class PlainStep:
    """-lr c g, the step of a checkpoint without optimizer state, with the interface of NextStep.

    gradient: g, before clipping by c, with gradient_norm.
    """

    gradient: Mapping[str, Tensor]
    learning_rate: float
    clip: float
    gradient_norm: float

    @cached_property
    def parameter_delta(self) -> Mapping[str, Tensor]:
        """The step."""
        return Formed(self.gradient, lambda name: -self.learning_rate * self.clip * self.gradient[name])

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """As NextStep.parts; the batch makes all of the step."""
        nothing = Formed(self.gradient, lambda name: torch.zeros_like(self.gradient[name]))
        return dict(zip(PARTS, (self.parameter_delta, self.parameter_delta, nothing, nothing), strict=True))

    def rates(self) -> dict[str, float]:
        """Learning rate of each parameter."""
        return dict.fromkeys(self.gradient, self.learning_rate)

    def share_factors(self) -> dict[str, float]:
        """As NextStep.share_factors, with P_t = 1."""
        return self.rates()

    def share_direction(self, gradient_of_h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As NextStep.share_direction."""
        return Formed(gradient_of_h, lambda name: self.learning_rate * gradient_of_h[name])


AnalysedStep = NextStep | PlainStep


def clip_coefficient(gradient: Mapping[str, Tensor], max_norm: float | None) -> tuple[float, float]:
    """(c, norm before clipping) as torch's clip_grad_norm_ computes them; c = 1 without clipping."""
    first = next(iter(gradient.values()))
    norm = float(torch.stack([g.norm().to(first.device) for g in gradient.values()]).norm())
    norm = norm_of_parts(norm)
    if max_norm is None or max_norm <= 0:
        return 1.0, norm
    return min(1.0, max_norm / (norm + 1e-6)), norm


def take_next_step(
    model: nn.Module,
    optimizer: Moments,
    gradient: Mapping[str, Tensor],
    max_norm: float | None,
    learning_rate: float | None = None,
) -> NextStep:
    """The next step; model and optimizer stay as they are.

    Args:
        optimizer: torch's AdamW over the model's trainable parameters, or their stored states.
        gradient: name -> loss gradient before clipping.
        max_norm: of clipping; None: not clipped.
        learning_rate: in place of every group's own.

    Raises:
        UserError: where the step's rate is 0.
    """
    parameters = trainable_parameters(model)
    clip, norm = clip_coefficient(gradient, max_norm)
    stored = read_adamw_state(optimizer, parameters)
    state = stored if learning_rate is None else Formed(stored, lambda name: replace(stored[name], lr=learning_rate))
    moves, new = False, []
    for name, s in state.items():
        moves = moves or bool(s.lr)
        new += [] if s.step else [name]
    idle = without_gradient(gradient, new)
    if not moves:
        raise UserError(
            "the learning rate of the analysed step is 0 (end of a schedule, or first warm-up step): every change would be 0; "
            "give checkpoint.learning_rate=..."
        )
    return NextStep(parameters, gradient, clip, norm, state, frozenset(idle))


def without_gradient(gradient: Mapping[str, Tensor], names: Sequence[str]) -> set[str]:
    """Those of the names whose gradient is 0 everywhere."""
    found = any_of([bool(gradient[name].any()) for name in names])
    return {name for name, moved in zip(names, found, strict=True) if not moved}


def taken_step(
    before: AdamWParameterState, gradient: Tensor | None, parameter: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """theta_after - theta_before of one parameter, by torch's optimizer; dtype: that of weights, gradient and moments, None: each
    tensor's own. Below float32 the run's own kernel matters: the fused one rounds only what it stores.
    """
    if gradient is None:
        return torch.zeros_like(parameter.detach())

    def step(*tensors: Tensor) -> Tensor:
        theta, g, m, v, *more = (t if dtype is None else t.to(dtype) for t in tensors)
        largest = more[0] if more else None
        moved = nn.Parameter(theta.clone())
        moved.grad = g
        optimizer = torch.optim.AdamW(
            [moved],
            lr=before.lr,
            betas=(before.beta1, before.beta2),
            eps=before.eps,
            weight_decay=before.weight_decay,
            amsgrad=largest is not None,
            fused=before.fused and theta.itemsize < 4,
        )
        state = {"step": torch.tensor(float(before.step)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        optimizer.state[moved] = state if largest is None else {**state, "max_exp_avg_sq": largest.clone()}
        optimizer.step()
        return moved.detach() - theta

    return elementwise(step, parameter.detach(), gradient, before.exp_avg, *second_moments(before))


def plain_step(gradient: Mapping[str, Tensor], max_norm: float | None, learning_rate: float | None) -> PlainStep:
    """The step without optimizer state. Raises UserError without a learning rate."""
    if not learning_rate:
        raise UserError("without optimizer state the step's size is unknown: give checkpoint.learning_rate=...")
    clip, norm = clip_coefficient(gradient, max_norm)
    return PlainStep(gradient, learning_rate, clip, norm)
