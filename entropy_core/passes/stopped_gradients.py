"""Gradients that a module stops by design: DoRA holds the norm of its weight fixed in the backward pass.

    W' = m (W + s BA) / |W + s BA|          peft's gradient takes |W + s BA| for a constant (section 4.3 of DoRA's paper)

Autograd's gradient is then not the derivative of the policy: a step moves the norm too, and entropy with it. Inside
`true_derivatives` gradients that are not asked for `as_trained` go through the norm; what a training step is made of keeps
to the rule that it was trained by. Other gradients that a model stops or approximates (VeLoRA's, straight-through rounding)
stay as they are, and an analysis finds them by finite differences. Source: docs/theory/fisher-kernel.md, "As trained, and true".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_true: WeakSet[nn.Module] = WeakSet()


class _AttachedNorms(TorchFunctionMode):
    """Inside, `Tensor.detach` returns the tensor itself."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return args[0] if func is torch.Tensor.detach else func(*args, **(kwargs or {}))


@contextmanager
def true_derivatives(model: nn.Module) -> Iterator[None]:
    """Inside, gradients of this model are derivatives of what it computes (but for those asked for `as_trained`)."""
    added = [m for m in stopping_modules(model) if m not in _true]
    _true.update(added)
    try:
        yield
    finally:
        _true.difference_update(added)


def stopping_modules(model: nn.Module) -> list[nn.Module]:
    """DoRA's modules with trained magnitudes or factors."""
    dora = sys.modules.get("peft.tuners.lora.dora")  # a model has its modules only where it is loaded
    return [] if dora is None else [m for m in model.modules() if type(m).__module__ == dora.__name__]


@contextmanager
def attached_norms(model: nn.Module) -> Iterator[None]:
    """Inside, passes of a model that `true_derivatives` holds go through the norms; of others nothing changes."""
    held = [m for m in stopping_modules(model) if m in _true and "forward" not in vars(m)]

    def attached(module: nn.Module) -> Any:
        ordinary = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _AttachedNorms():
                return ordinary(*args, **kwargs)

        return forward

    for module in held:
        module.forward = attached(module)
    try:
        yield
    finally:
        for module in held:
            del module.forward


def stops_gradients(model: nn.Module) -> bool:
    """Whether gradients of this model are others as trained than true ones, inside `true_derivatives`."""
    return any(m in _true for m in stopping_modules(model))
