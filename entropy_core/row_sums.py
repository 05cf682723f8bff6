"""The check that rows add up: sum_t row_t = d objective / dtheta, beside autograd's own gradient of one backward pass.

It finds parameters that are used in a way which no tap sees (a functional call of a weight, say), and arithmetic in less than
float32. Source: docs/theory/fisher-kernel.md, "Rows".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

ROW_SUM_TOLERANCE = 1e-4


class RowSums:
    """Sums of the rows of every parameter over one backward pass, minus autograd's gradient of that pass.

    Memory: the trainable parameters once, and their gradient.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = list(parameters.values())
        self._differences = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._largest: list[Tensor] = []  # number of each piece of rows

    def add(self, name: str, rows: Tensor) -> None:
        """rows: (n, *shape) of one use of a parameter."""
        difference = self._differences[name]
        difference += rows.sum(0).to(difference)
        self._largest.append(torch.linalg.vector_norm(rows, math.inf))

    def errors(self, gradients: Sequence[Tensor | None]) -> dict[str, float]:
        """name -> |sum of rows - gradient| / |gradient of everything|, or the largest numbers of rows where that is zero;
        empty where both are zero or one is not finite, which says nothing of taps.

        gradients: of all parameters in order, None for those that were not used.

        Raises ValueError above ROW_SUM_TOLERANCE, naming the worst parameter.
        """
        scale = math.hypot(*(_norm(g) for g in gradients if g is not None))
        scale = scale or math.hypot(*(float(number) for number in self._largest))
        if not 0.0 < scale < math.inf:
            return {}
        for difference, gradient in zip(self._differences.values(), gradients, strict=True):
            if gradient is not None:
                difference -= gradient
        errors = {name: _norm(difference) / scale for name, difference in self._differences.items()}
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= ROW_SUM_TOLERANCE:
            raise ValueError(
                f"per-sequence gradients of {worst!r} do not add up to the batch gradient (off by {errors[worst]:.1e} of its "
                "norm): the model uses this parameter other than by calling its module (use method='loop', or freeze it), or "
                "it computes in less than float32 (load it in float32)"
            )
        return errors


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
