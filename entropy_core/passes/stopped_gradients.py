"""Gradients that a module stops by design: DoRA holds the norm of its weight fixed in the backward pass.

    W' = m (W + s BA) / |W + s BA|          peft's gradient takes |W + s BA| for a constant (section 4.3 of DoRA's paper)

Autograd's gradient is then not the derivative of the policy: a step moves the norm too, and entropy with it. In a
`PassState` with true_derivatives, gradients that are not asked for `as_trained` go through the norm; what a training step is
made of keeps to the rule that it was trained by. Other gradients that a model stops or approximates (VeLoRA's,
straight-through rounding) stay as they are, and an analysis finds them by finite differences.
Source: docs/theory/fisher-kernel.md, "As trained, and true".
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class AttachedNorms(TorchFunctionMode):
    """Inside, `Tensor.detach` returns the tensor itself."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return args[0] if func is torch.Tensor.detach else func(*args, **(kwargs or {}))


def stopping_modules(model: nn.Module) -> list[nn.Module]:
    """DoRA's modules with trained magnitudes or factors."""
    dora = sys.modules.get("peft.tuners.lora.dora")  # a model has its modules only where it is loaded
    return [] if dora is None else [m for m in model.modules() if type(m).__module__ == dora.__name__]
