"""Whether the optimizer took the step that was foretold of it, seen on some elements of every parameter.

What is tried before a step (rl_training.probe.watch) has the parts of the step that AdamW's state and gradients give. A callback
or a hook that changes gradients afterwards, a gradient scaler that has not divided by its scale yet, or a step that is skipped
make it another one, and the parts those of a step that was never taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_core.adamw import AdamWUpdate

_ELEMENTS = 256  # of a parameter
_DIFFERENT = 1e-2  # relative, beside the rounding of weights


class ForetoldStep:
    """Made before the step; `off` after it.

    Args:
        parameters: name -> trained parameter, as it is before the step.
        update: the step's parts, over the same names.
    """

    def __init__(self, parameters: Mapping[str, Tensor], update: AdamWUpdate) -> None:
        self._before = {name: some_elements(p).double() for name, p in parameters.items()}
        parts = (update.batch, update.momentum, update.weight_decay)
        self._step = {
            name: torch.stack([some_elements(part[name]).double() for part in parts]).sum(0) for name in self._before
        }

    def off(self, parameters: Mapping[str, Tensor]) -> float | None:
        """By how much the step taken differs from it, relative; None within 1% and the rounding of weights."""
        left = size = rounding = 0.0
        for name, before in self._before.items():
            taken, expected = some_elements(parameters[name]).double() - before, self._step[name].to(before.device)
            left += float((taken - expected).square().sum())
            size += float(expected.square().sum())
            rounding += float((before * torch.finfo(parameters[name].dtype).eps).square().sum())
        if left**0.5 <= _DIFFERENT * size**0.5 + rounding**0.5:
            return None
        return (left / max(size, 1e-300)) ** 0.5


def some_elements(tensor: Tensor) -> Tensor:
    """(n,) copy of some of a tensor's elements, all of them where they are few: of such a copy, all."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // _ELEMENTS)].clone()
