"""What an AdamW step does, taken apart exactly. The only home of the preconditioner P.

At step t (the count after the update), with g the *clipped* loss gradient and decoupled decay
lambda:

    m_t = beta1 m_{t-1} + (1 - beta1) g            v_t = beta2 v_{t-1} + (1 - beta2) g^2
    P_t = 1 / (sqrt(v_t / (1 - beta2^t)) + eps)                          elementwise
    dtheta = -lr P_t m_t / (1 - beta1^t) - lr lambda theta
           = -lr (1 - beta1)/(1 - beta1^t) P_t g                          batch: this step's gradient
             -lr beta1/(1 - beta1^t)       P_t m_{t-1}                    momentum: earlier gradients
             -lr lambda theta                                             weight decay

A measured dtheta holds P already: it is never to be multiplied by P again. Hyper-parameters are
those of each parameter's own group. Source: Loshchilov & Hutter 2019 (AdamW);
docs/theory/adamw-step.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from entropy_core.cut_weights import open_cut
from entropy_core.formed import Formed, elementwise


@dataclass(frozen=True)
class AdamWParameterState:
    """One parameter's optimizer state and the hyper-parameters of its group.

    Attributes:
        exp_avg, exp_avg_sq: m and v, of the parameter's shape.
        step: how many steps they have seen.
        max_exp_avg_sq: the largest v so far, which amsgrad divides by in place of v, and None
            without it.
        fused: whether the step is taken by torch's fused kernel, which computes in float32 what
            is stored below it.

    Examples:
        >>> state = read_adamw_state(optimizer, model.named_parameters())["head.weight"]
        >>> state.step, state.beta1, tuple(state.exp_avg.shape)
        (1, 0.9, (8, 4))
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_exp_avg_sq: Tensor | None = None
    fused: bool = False


@dataclass(frozen=True)
class AdamWUpdate:
    """dtheta in three parts, each name -> tensor of the parameter's shape; they add up to the step.

    Examples:
        >>> states = read_adamw_state(optimizer, model.named_parameters())
        >>> update = split_adamw_update(states, gradients, dict(model.named_parameters()))
        >>> sorted(update.momentum) == sorted(name for name, _ in model.named_parameters())
        True
    """

    batch: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]
    weight_decay: Mapping[str, Tensor]

    def total(self) -> Mapping[str, Tensor]:
        """Their sum, formed when it is read."""
        return Formed(self.batch, lambda name: self.batch[name] + self.momentum[name] + self.weight_decay[name])


Moments = torch.optim.Optimizer | Mapping[str, AdamWParameterState]
"""AdamW's state of a model's parameters: an optimizer that trains them, or their states by name."""


def read_adamw_state(
    optimizer: Moments,
    named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
    others: bool = False,
) -> Mapping[str, AdamWParameterState]:
    """Name -> state, mapped by identity of the parameters; tensors are shared with the optimizer,
    not copied.

    A parameter without state yet (before its first step) gets zero moments and step 0. Wrappers
    with an `.optimizer` (accelerate's) are opened.

    Args:
        optimizer: states by name are given back as they are.
        others: the optimizer may hold further parameters, and may lack some of the names, which
            then are in no entry.

    Raises:
        TypeError: an optimizer that is not Adam or AdamW by its hyper-parameters.
        ValueError: maximize or coupled decay (plain Adam's), quantised state, or names and
            parameters that do not cover each other.

    Examples:
        >>> states = read_adamw_state(optimizer, model.named_parameters())
        >>> {name: state.step for name, state in states.items()}
        {'embed.weight': 1, 'head.weight': 1, 'head.bias': 1}
    """
    pairs = _pairs(named_parameters)
    if isinstance(optimizer, Mapping):
        return _covering(optimizer, pairs, others)
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    names = {id(p): name for name, p in pairs}
    states: dict[str, AdamWParameterState] = {}
    for group in inner.param_groups:
        _check_group(inner, group)
        for p in group["params"]:
            name = names.get(id(p))
            if name is None and others:
                continue
            if name is None:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} that is not among the given names: pass "
                    "the named parameters of the model that it trains"
                )
            states[name] = _parameter_state(name, p, inner.state.get(p, {}), group)
    missing = [name for name, p in pairs if p.requires_grad and name not in states]
    if missing and not others:
        raise ValueError(
            f"the optimizer does not train {missing[0]!r} ({len(missing)} such): it would not be predicted"
        )
    return states


def _covering(
    states: Mapping[str, AdamWParameterState], pairs: list[tuple[str, Tensor]], others: bool
) -> Mapping[str, AdamWParameterState]:
    wanted = {name: p for name, p in pairs if p.requires_grad}
    if not others and (odd := sorted(states.keys() ^ wanted.keys())):
        raise ValueError(f"states and trainable parameters name different things ({len(odd)}, e.g. {odd[0]!r})")
    return states


def _pairs(named: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    pairs = named.items() if isinstance(named, Mapping) else named
    return list(cast(Iterable[tuple[str, Tensor]], pairs))


def _check_group(optimizer: torch.optim.Optimizer, group: dict) -> None:
    kind = type(optimizer).__name__
    # Relatives keep the same keys but take another step; RAdam's state looks like Adam's
    # but by its class.
    relative = isinstance(optimizer, torch.optim.NAdam | torch.optim.RAdam | torch.optim.Adamax)
    if relative or not {"betas", "eps", "lr", "weight_decay"} <= group.keys():
        raise TypeError(f"{kind} is not Adam or AdamW: its step cannot be split into these parts")
    if group.get("maximize"):
        raise ValueError("the optimizer runs with maximize=True, which changes its step: only plain AdamW is known")
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    if group["weight_decay"] and not decoupled:
        raise ValueError("the optimizer couples weight decay into the gradient (Adam): use AdamW, or weight_decay=0")


def _parameter_state(name: str, p: Tensor, state: Mapping, group: Mapping) -> AdamWParameterState:
    if state and (
        "exp_avg" not in state or state["exp_avg"].shape != p.shape or not state["exp_avg"].is_floating_point()
    ):
        raise ValueError(
            f"the optimizer state of {name!r} is quantised or sharded: only full AdamW moments can be read"
        )
    beta1, beta2 = group["betas"]
    largest = None
    if group.get("amsgrad"):
        largest = state["max_exp_avg_sq"] if state else torch.zeros_like(p)
    return AdamWParameterState(
        max_exp_avg_sq=largest,
        exp_avg=state["exp_avg"] if state else torch.zeros_like(p),
        exp_avg_sq=state["exp_avg_sq"] if state else torch.zeros_like(p),
        step=int(state["step"]) if state else 0,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        fused=bool(group.get("fused")),
    )


def whole_states(states: Mapping[str, AdamWParameterState]) -> Mapping[str, AdamWParameterState]:
    """Of a model that is cut over processes: each state whole, gathered when it is read, as `entropy_core.formed.whole`."""
    cut = open_cut()
    if cut is None:
        return states

    def gather(name: str) -> AdamWParameterState:
        state = states[name]
        moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        held = {key: moment for key in moments if (moment := getattr(state, key)) is not None}
        return replace(state, **{key: cut.gathered(name, moment) for key, moment in held.items()})

    return Formed(states, gather)


def preconditioner(state: AdamWParameterState) -> Tensor:
    """P = 1 / (sqrt(v / (1 - beta2^t)) + eps), the parameter's shape; with amsgrad the largest v so
    far stands for v.

    Raises ValueError before the first step (v is 0).
    """
    if state.step < 1:
        raise ValueError("Adam's state has seen no step yet, so its preconditioner is not defined: take a step first")
    v = state.exp_avg_sq if state.max_exp_avg_sq is None else state.max_exp_avg_sq
    return elementwise(lambda v: 1.0 / ((v / (1.0 - state.beta2**state.step)).sqrt() + state.eps), v)


def adam_preconditioner(
    optimizer: Moments,
    named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Name -> P at the optimizer's current state.

    Args:
        named_parameters: the model's; may be left out where the optimizer was built from named
            parameters.

    Examples:
        >>> p = adam_preconditioner(optimizer, model.named_parameters())
        >>> tuple(p["head.weight"].shape), bool((p["head.weight"] > 0).all())
        ((8, 4), True)
    """
    if isinstance(optimizer, Mapping):
        return {name: preconditioner(state) for name, state in optimizer.items()}
    if named_parameters is None:
        groups = getattr(optimizer, "optimizer", optimizer).param_groups
        if not all("param_names" in group for group in groups):
            raise ValueError("this optimizer does not know its parameters' names: pass model.named_parameters()")
        named_parameters = [pair for g in groups for pair in zip(g["param_names"], g["params"], strict=True)]
    return {name: preconditioner(s) for name, s in read_adamw_state(optimizer, named_parameters).items()}


def after_gradient(state: AdamWParameterState, gradient: Tensor) -> AdamWParameterState:
    """The state once `gradient` has entered both moments: m_t, v_t and t from m_{t-1}, v_{t-1} and
    t-1.
    """
    v = state.beta2 * state.exp_avg_sq + (1 - state.beta2) * gradient.square()
    return replace(
        state,
        exp_avg=state.beta1 * state.exp_avg + (1 - state.beta1) * gradient,
        exp_avg_sq=v,
        step=state.step + 1,
        max_exp_avg_sq=None if state.max_exp_avg_sq is None else torch.maximum(state.max_exp_avg_sq, v),
    )


def batch_step_factor(state_before: AdamWParameterState) -> float:
    """lr (1 - beta1)/(1 - beta1^t) of the next step: what multiplies P_t g in it."""
    t = state_before.step + 1
    return state_before.lr * (1 - state_before.beta1) / (1 - state_before.beta1**t)


def split_adamw_update(
    state_before: Mapping[str, AdamWParameterState],
    gradients: Mapping[str, Tensor | None],
    parameters: Mapping[str, Tensor],
) -> AdamWUpdate:
    """The next step's dtheta, in its three exact parts.

    Args:
        state_before: moments and step counts *before* the step, with the lr that the step uses.
        gradients: the loss gradients the optimizer sees, i.e. after clipping; None where a
            parameter got none (torch then skips it: no momentum, no decay).
        parameters: values before the step.

    Raises:
        ValueError: names differ.

    Examples:
        >>> states = read_adamw_state(optimizer, model.named_parameters())
        >>> before = {name: value.detach().clone() for name, value in model.named_parameters()}
        >>> update = split_adamw_update(states, gradients, before)
        >>> parts = update.batch, update.momentum, update.weight_decay
        >>> sum(part["head.weight"] for part in parts).shape
        torch.Size([8, 4])
    """
    if not state_before.keys() == gradients.keys() == parameters.keys():
        odd = sorted((state_before.keys() ^ gradients.keys()) | (state_before.keys() ^ parameters.keys()))
        raise ValueError(f"state, gradients and parameters name different things ({len(odd)}, e.g. {odd[0]!r})")
    parts: tuple[dict[str, Tensor], ...] = ({}, {}, {})
    for name, before in state_before.items():
        found = split_parameter_step(before, gradients[name], parameters[name])
        for part, tensor in zip(parts, found, strict=True):
            part[name] = tensor
    return AdamWUpdate(*parts)


def split_parameter_step(
    before: AdamWParameterState, gradient: Tensor | None, parameter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, momentum, weight decay) of one parameter's next step; arguments as in `split_adamw_update`."""
    theta = parameter.detach()
    if gradient is None:
        return torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros_like(theta)
    gradient = gradient.detach()
    p = preconditioner_after(before, gradient)
    bias_correction = 1 - before.beta1 ** (before.step + 1)
    batch = elementwise(lambda p, g: -batch_step_factor(before) * p * g, p, gradient)
    momentum = elementwise(lambda p, m: -before.lr * before.beta1 / bias_correction * p * m, p, before.exp_avg)
    return batch, momentum, -before.lr * before.weight_decay * theta


def changed_step(
    states: Mapping[str, AdamWParameterState],
    parameters: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor | None],
    learning_rate_factor: float = 1.0,
    keeps_momentum: bool = True,
) -> dict[str, Tensor]:
    """theta_after - theta_before of the step that AdamW takes with another gradient, rate or first moment.

    Args:
        states: before the step. gradient: as the optimizer would get it, clipped; None: passed over.
        keeps_momentum: False puts zeros in place of the first moments; step counts stay.
    """
    found = {}
    for name, state in states.items():
        first = state.exp_avg if keeps_momentum else torch.zeros_like(state.exp_avg)
        state = replace(state, exp_avg=first, lr=learning_rate_factor * state.lr)
        batch, momentum, decay = split_parameter_step(state, gradient[name], parameters[name])
        found[name] = batch + momentum + decay
    return found


def preconditioner_after(before: AdamWParameterState, gradient: Tensor) -> Tensor:
    """P_t of the step that takes `gradient`, the parameter's shape: `preconditioner` of `after_gradient`."""

    def form(gradient: Tensor, v: Tensor, largest: Tensor | None = None) -> Tensor:
        state = replace(before, exp_avg=gradient, exp_avg_sq=v, max_exp_avg_sq=largest)
        return preconditioner(after_gradient(state, gradient))

    return elementwise(form, gradient.detach(), *second_moments(before))


def second_moments(state: AdamWParameterState) -> tuple[Tensor, ...]:
    """v, and with amsgrad the largest v so far."""
    largest = state.max_exp_avg_sq
    return (state.exp_avg_sq,) if largest is None else (state.exp_avg_sq, largest)
