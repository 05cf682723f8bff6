"""Gradients that a module stops by design, or gets wrong: autograd's are then not the derivatives of the policy.

    W' = m (W + s BA) / |W + s BA|          DoRA: peft's gradient takes |W + s BA| for a constant (section 4.3 of its paper)
    y_k = sum_p x_(k+p) w_p                 C3A: peft's backward pass gives sum_k y'_k w_(l+k) for x'_l in place of w_(l-k)

A step moves DoRA's norm too, and entropy with it; C3A's error reaches every parameter in front of its layer. In a
`PassState` with true_derivatives, gradients that are not asked for `as_trained` are the true ones; what a training step is
made of keeps to the rule that it was trained by. Other gradients that a model stops or approximates (VeLoRA's,
straight-through rounding) stay as they are, and an analysis finds them by finite differences.
Source: docs/theory/fisher-kernel.md, "As trained, and true".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DORA, _C3A, _CONVOLUTION = "peft.tuners.lora.dora", "peft.tuners.c3a.layer", "BlockCircularConvolution"


class AttachedNorms(TorchFunctionMode):
    """Inside, `Tensor.detach` returns the tensor itself."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return args[0] if func is torch.Tensor.detach else func(*args, **(kwargs or {}))


class _Convolution:
    """C3A's product of (..., n b) inputs with (m, n, b) kernels, by operations that autograd differentiates itself."""

    @staticmethod
    def apply(x: Tensor, w: Tensor) -> Tensor:
        blocks = x.reshape(*x.shape[:-1], *w.shape[1:])
        product = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(blocks), torch.fft.fft(w))
        return torch.fft.fft(product).real.flatten(-2)


@contextmanager
def true_gradients(module: nn.Module) -> Iterator[None]:
    """Inside, a forward pass of one of the `stopping_modules` is differentiated as what it computes."""
    layer = sys.modules.get(type(module).__module__)
    if layer is None or layer.__name__ != _C3A:
        with AttachedNorms():
            yield
        return
    own = vars(layer)[_CONVOLUTION]
    vars(layer)[_CONVOLUTION] = _Convolution
    try:
        yield
    finally:
        vars(layer)[_CONVOLUTION] = own


def stopping_modules(model: nn.Module) -> list[nn.Module]:
    """DoRA's modules, and C3A's layers. (A model has peft's modules only where they are loaded.)"""
    kinds = {name for name in (_DORA, _C3A) if name in sys.modules}
    if _C3A in kinds and _CONVOLUTION not in vars(sys.modules[_C3A]):
        kinds.remove(_C3A)
    return [m for m in model.modules() if type(m).__module__ in kinds] if kinds else []
