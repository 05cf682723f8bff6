"""The parts of the step that an optimizer is about to take, and whether it took them.

    actual          AdamW's own step in its exact parts (entropy_core.adamw)
    previous_step   -lr P_{t-1} g: P from the moments before the step, no momentum; known as soon as the gradient is
    none            -lr g: what a plain gradient step would be

g is the gradient that the optimizer will see, after clipping. P is applied once: an update that was measured holds it already.
Source: docs/theory/adamw-step.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

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

Preconditioning = Literal["actual", "previous_step", "none"]

# Relative size of what the split leaves over that rounding of float32 weights may explain, beside the rounding itself.
_UNEXPLAINED = 1e-2


def upcoming_step(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, preconditioning: Preconditioning
) -> AdamWUpdate | None:
    """The parts of the next step; gradients must be final (clipped), the optimizer not yet stepped.

    None for `previous_step` before the optimizer's first step: there is no P yet.

    Raises TypeError or ValueError for an optimizer that is not AdamW (entropy_core.adamw), except that `none` asks for
    learning rates alone.
    """
    gradients = {name: None if p.grad is None else p.grad.detach() for name, p in parameters.items()}
    if preconditioning == "none":
        rates = _learning_rates(parameters, optimizer)
        return _batch_only(
            {n: torch.zeros_like(parameters[n]) if g is None else -rates[n] * g for n, g in gradients.items()}
        )
    state = read_adamw_state(optimizer, parameters)
    if preconditioning == "actual":
        return split_adamw_update(state, gradients, parameters)
    if any(s.step == 0 for s in state.values()):
        return None
    return _batch_only(
        {
            n: torch.zeros_like(parameters[n]) if g is None else -state[n].lr * preconditioner(state[n]) * g
            for n, g in gradients.items()
        }
    )


def step_per_gradient(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, preconditioning: Preconditioning
) -> dict[str, Tensor]:
    """Name -> s, of the parameter's shape or a scalar, with  dtheta_batch = -s g  in `upcoming_step` of the same arguments."""
    if preconditioning == "none":
        rates = _learning_rates(parameters, optimizer)
        return {name: torch.tensor(rate, dtype=torch.float64) for name, rate in rates.items()}
    out = {}
    for name, state in read_adamw_state(optimizer, parameters).items():
        g = parameters[name].grad
        if preconditioning == "previous_step":
            out[name] = state.lr * preconditioner(state)
        elif g is None:
            out[name] = torch.tensor(0.0)
        else:
            out[name] = batch_step_factor(state) * preconditioner(after_gradient(state, g.detach()))
    return out


def has_stepped(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> bool:
    """Whether every parameter's moments have seen a step before the coming one."""
    return all(state.step > 0 for state in read_adamw_state(optimizer, parameters).values())


def _batch_only(batch: dict[str, Tensor]) -> AdamWUpdate:
    nothing = {name: torch.zeros_like(d) for name, d in batch.items()}
    return AdamWUpdate(batch, nothing, nothing)


def _learning_rates(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in rates]
    if missing:
        raise ValueError(
            f"the optimizer does not train {missing[0]!r} ({len(missing)} such): it would not be predicted"
        )
    return {name: rates[id(p)] for name, p in parameters.items()}


def check_step_taken(before: Mapping[str, Tensor], after: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Hold the step that was taken against its parts' sum; all three name -> tensor.

    Raises ValueError where they differ by more than 1% of the step and the rounding of the weights. Weights below float32
    round most of a step away, so nothing is asked of them.
    """
    left, size, rounding = 0.0, 0.0, 0.0
    for name, start in before.items():
        if start.dtype not in (torch.float32, torch.float64):
            return
        taken = after[name].detach() - start
        left += float((taken - expected[name]).norm()) ** 2
        size += float(expected[name].norm()) ** 2
        rounding += (torch.finfo(start.dtype).eps * float(start.norm())) ** 2
    if left**0.5 > _UNEXPLAINED * size**0.5 + rounding**0.5:
        raise ValueError(
            f"the optimizer did not take the AdamW step that its state and gradients give (relative difference "
            f"{(left / max(size, 1e-300)) ** 0.5:.2g}): another optimizer, or gradients that changed after they were read"
        )
