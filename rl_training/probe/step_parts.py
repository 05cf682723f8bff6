"""The parts of the step that an optimizer is about to take, and whether it took them.

    actual          AdamW's own step in its exact parts (entropy_core.adamw); of another optimizer the difference that
                    the step made to the weights, theta_after - theta_before, which has no parts
    previous_step   -lr P_{t-1} g: P from the moments before the step, no momentum; known as soon as the gradient is
    none            -lr g: what a plain gradient step would be

g is the gradient that the optimizer will see, after clipping. P is applied once: an update that was measured holds it already.
A parameter that is in no group of the optimizer, or has no gradient, does not move.
Source: docs/theory/adamw-step.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_core.adamw import (
    AdamWUpdate,
    after_gradient,
    batch_step_factor,
    preconditioner,
    read_adamw_state,
    split_adamw_update,
)
from entropy_core.leaving_out import leaving_out_metric
from rl_training.errors import UserError

Preconditioning = Literal["actual", "previous_step", "none"]

# Relative size of what the split leaves over that rounding of float32 weights may explain, beside the rounding itself.
_UNEXPLAINED = 1e-2

# The classes whose step is known, and what their groups and states may hold: relatives share most of it and take another step.
_ADAMW = (torch.optim.AdamW, torch.optim.Adam)
_GROUP_KEYS = {
    "params", "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable", "differentiable",
    "fused", "decoupled_weight_decay", "param_names",
    # of torch's schedules, which move the rate and the betas
    "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr",
}  # fmt: skip
_STATE_KEYS = {"step", "exp_avg", "exp_avg_sq"}


def opened(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def takes_hooks(optimizer: Any) -> bool:
    """Whether hooks can be put on its steps. A wrapper that never began as an optimizer of torch's (many a Lookahead) has the
    methods, and nowhere to keep a hook.
    """
    return isinstance(getattr(optimizer, "_optimizer_step_pre_hooks", None), dict)


def why_not_split(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> str | None:
    """Why this optimizer's step has no known parts; None for AdamW (and Adam without coupled weight decay)."""
    inner = opened(optimizer)
    if type(inner) not in _ADAMW:
        return f"{type(inner).__name__} is not AdamW, so its step has no known parts"
    for group in inner.param_groups:
        odd = [key for key, value in group.items() if key not in _GROUP_KEYS and not isinstance(value, str)]
        if odd:
            return f"a group of the optimizer has a setting {odd[0]!r}, which AdamW does not have"
    for p in parameters.values():
        odd = sorted(inner.state.get(p, {}).keys() - _STATE_KEYS)
        if odd and not any(group.get("amsgrad") for group in inner.param_groups):
            return f"the optimizer keeps {odd[0]!r} of a parameter, which AdamW does not"
    try:
        read_adamw_state(inner, parameters, others=True)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def moved_unseen(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """A sentence where the coming step moves weights of the model that are no longer trained, which no derivative sees; or None.

    torch's optimizers pass over a parameter that has no gradient, not one that requires none: a gradient left over, or set to
    zeros, lets momentum and decay go on.
    """
    held = {id(p) for group in opened(optimizer).param_groups for p in group["params"]}
    moved = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None and id(p) in held]
    if not moved:
        return None
    return (
        f"the optimizer moves {moved[0]!r} ({len(moved)} such), which requires no gradient any more but still has one: "
        "`predicted` leaves that out, and `measured` holds it; set its .grad to None when you freeze it "
        "(zero_grad(set_to_none=True))"
    )


def is_plain_descent(optimizer: torch.optim.Optimizer) -> bool:
    """Whether -lr g is the step that is taken: SGD without momentum and decay."""
    inner = opened(optimizer)
    return type(inner) is torch.optim.SGD and not any(
        group["momentum"] or group["weight_decay"] or group["maximize"] for group in inner.param_groups
    )


def counterfactual(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, preconditioning: Preconditioning
) -> str | None:
    """A sentence on what is predicted where that is not the step which the optimizer takes; None where it is.

    Raises UserError where such a step would pass for one of another optimizer's.
    """
    if preconditioning == "actual" or (preconditioning == "none" and is_plain_descent(optimizer)):
        return None
    why, kind = why_not_split(parameters, optimizer), type(opened(optimizer)).__name__
    if why is not None:
        raise UserError(
            f"preconditioning={preconditioning} predicts a step that {kind} does not take ({why}): use preconditioning=actual, "
            "whose total is right for any optimizer"
        )
    step = "-lr g" if preconditioning == "none" else "-lr P g with the P before it"
    return f"preconditioning={preconditioning} predicts a step {step}, not the one that {kind} takes"


def upcoming_step(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, preconditioning: Preconditioning
) -> AdamWUpdate | None:
    """The parts of the next step; gradients must be final (clipped), the optimizer not yet stepped.

    None for `previous_step` before the optimizer's first step: there is no P yet.

    Raises UserError where the step has no known parts (`why_not_split`, `counterfactual`).
    """
    counterfactual(parameters, optimizer, preconditioning)
    if preconditioning == "none":
        return _plain_step(parameters, optimizer)
    if (why := why_not_split(parameters, optimizer)) is not None:
        raise UserError(why)
    state = read_adamw_state(optimizer, parameters, others=True)
    held = {name: parameters[name] for name in state}
    gradients = {name: None if p.grad is None else p.grad.detach() for name, p in held.items()}
    if preconditioning == "actual":
        parts = split_adamw_update(state, gradients, held)
        return AdamWUpdate(
            *(_everywhere(part, parameters) for part in (parts.batch, parts.momentum, parts.weight_decay))
        )
    if any(s.step == 0 for s in state.values()):
        return None
    moving = {n: -state[n].lr * preconditioner(state[n]) * g for n, g in gradients.items() if g is not None}
    return _batch_only(_everywhere(moving, parameters))


def _plain_step(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> AdamWUpdate:
    rates = _learning_rates(parameters, optimizer)
    moving = {n: -rate * parameters[n].grad for n, rate in rates.items() if parameters[n].grad is not None}
    return _batch_only(_everywhere(moving, parameters))


def _everywhere(some: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with zeros for parameters that do not move, in the order of `parameters`."""
    return {n: some[n].detach() if n in some else torch.zeros_like(p.detach()) for n, p in parameters.items()}


def step_per_gradient(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, preconditioning: Preconditioning
) -> dict[str, Tensor]:
    """Name -> s, of the parameter's shape or a scalar, with  dtheta_batch = -s g  in `upcoming_step` of the same arguments."""
    out = {name: torch.tensor(0.0, device=p.device) for name, p in parameters.items()}
    if preconditioning == "none":
        rates = _learning_rates(parameters, optimizer)
        return out | {name: torch.tensor(rate, dtype=torch.float64) for name, rate in rates.items()}
    for name, state in read_adamw_state(optimizer, parameters, others=True).items():
        g = parameters[name].grad
        if preconditioning == "previous_step":
            out[name] = state.lr * preconditioner(state)
        elif g is not None:
            out[name] = batch_step_factor(state) * preconditioner(after_gradient(state, g.detach()))
    return out


def effect_metric(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, preconditioning: Preconditioning
) -> dict[str, Tensor] | None:
    """Name -> a of entropy_core.leaving_out, for parameters that move; None where P is not the step's own, and at the optimizer's
    first step, which is the gradient's sign: no derivative says what leaving a sequence out of it does.
    """
    if preconditioning != "actual" or not has_stepped(parameters, optimizer):
        return None
    states = read_adamw_state(optimizer, parameters, others=True)
    grads = {name: parameters[name].grad for name in states}
    return {name: leaving_out_metric(states[name], g.detach()) for name, g in grads.items() if g is not None}


def has_stepped(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> bool:
    """Whether the moments of every parameter that moves have seen a step before the coming one."""
    states = read_adamw_state(optimizer, parameters, others=True)
    return all(s.step > 0 for name, s in states.items() if parameters[name].grad is not None)


def _batch_only(batch: dict[str, Tensor]) -> AdamWUpdate:
    nothing = {name: torch.zeros_like(d) for name, d in batch.items()}
    return AdamWUpdate(batch, nothing, nothing)


def _learning_rates(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    rates = {id(p): float(group["lr"]) for group in opened(optimizer).param_groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in parameters.items() if id(p) in rates}


def copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are now."""
    return {name: p.detach().clone() for name, p in parameters.items()}


def turn_into_difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Make of `before`, in its own memory, what was added to it; whether anything was."""
    moved = False
    for name, start in before.items():
        torch.sub(after[name].detach(), start, out=start)
        moved = moved or bool(start.any())
    return moved


def unexplained(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> float | None:
    """Hold the step that was taken against its parts' sum; all three name -> tensor.

    The relative difference where it is more than 1% and the rounding of float32 (float64) weights; None where the parts are
    the step. Weights of less precision round much of a step away, which is no longer the one that the parts are of.
    """
    left, size, rounding = 0.0, 0.0, 0.0
    for name, start in before.items():
        taken = after[name].detach() - start
        left += float(torch.linalg.vector_norm(taken - expected[name], dtype=torch.float64)) ** 2
        size += float(torch.linalg.vector_norm(expected[name], dtype=torch.float64)) ** 2
        if start.dtype in (torch.float32, torch.float64):
            rounding += (torch.finfo(start.dtype).eps * float(start.norm())) ** 2
    if left**0.5 <= _UNEXPLAINED * size**0.5 + rounding**0.5:
        return None
    return (left / max(size, 1e-300)) ** 0.5
