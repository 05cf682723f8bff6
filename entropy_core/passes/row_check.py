"""The check that rows add up: sum_t row_t = d objective / dtheta, beside autograd's own gradient of one backward pass.

It finds parameters that are used in a way which no hook sees (a functional call of a weight, say), and arithmetic in less than
float32. A parameter counts as checked once its gradient was not zero (the embedding of a token that does not occur, an expert
without tokens say nothing), and everything is checked again in buckets that are twice as large as any before, where a model
may take another path. Source: docs/theory/fisher-kernel.md, "Rows".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from entropy_core.batch import Bucket
from entropy_core.cut_weights import norm_of_parts, total_of
from entropy_core.passes.factors import RowFactors

ROW_SUM_TOLERANCE = 1e-4  # of the gradient of everything
# A parameter whose gradient is a small part of the whole (P may give it a large part of a kernel) must agree by itself, to
# this; below this part of the whole rounding alone may make the difference.
_OWN_TOLERANCE, _OWN_FLOOR = 0.05, 2e-5


class RowSumsDifferError(ValueError):
    """parameter: the worst; message: by how much it is off."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class RowCheck:
    """What has been checked against autograd so far, over any number of streams of one model's rows."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._rows = self._length = 0
        self.scale = 0.0
        self.apart = False

    def due(self, parameters: Mapping[str, nn.Parameter], bucket: Bucket) -> dict[str, nn.Parameter]:
        """The parameters to check in a pass over this bucket."""
        rows, length = bucket.input_ids.shape
        if rows >= 2 * self._rows or length >= 2 * self._length:
            return dict(parameters)
        return {name: p for name, p in parameters.items() if name not in self._known}

    def passed(self, bucket: Bucket, norms: Mapping[str, float], whole: bool) -> None:
        """norms: name -> of the gradient, where rows agreed. whole: whether all parameters were checked in this bucket."""
        self._known.update(name for name, norm in norms.items() if norm > 0)
        if whole and any(norms.values()):
            rows, length = bucket.input_ids.shape
            self._rows, self._length = max(self._rows, rows), max(self._length, length)


class RowSums:
    """Sums of the rows of parameters over one backward pass, minus autograd's gradient of that pass.

    least_scale: a norm of the gradient of everything that is known from elsewhere, where only some parameters are checked.
    Memory: the parameters once, and their gradient.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], least_scale: float = 0.0) -> None:
        self.parameters = list(parameters.values())
        self.scale = least_scale
        self._differences = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._largest: dict[str, list[Tensor]] = {name: [] for name in parameters}  # number of each piece of rows

    def add(self, name: str, rows: Tensor | RowFactors) -> None:
        """rows: (n, *shape) of one use of a parameter, or their factors; of others than those to check nothing is kept."""
        if name in self._differences:
            difference = self._differences[name]
            total = rows.sum() if isinstance(rows, RowFactors) else rows.sum(0)
            difference += total.view_as(difference).to(difference)
            largest = total if isinstance(rows, RowFactors) else rows
            if largest.numel():  # of a model that is cut over processes one may have nothing of a small parameter
                self._largest[name].append(torch.linalg.vector_norm(largest, math.inf))

    def errors(self, gradients: Sequence[Tensor | None]) -> dict[str, float]:
        """name -> |sum of rows - gradient| / |gradient of everything|, or the largest numbers of rows where that is zero;
        empty where both are zero or one is not finite, which says nothing of hooks.

        gradients: of all parameters in order, None for those that were not used.

        Raises RowSumsDifferError above ROW_SUM_TOLERANCE, and for a parameter that is off by much of its own gradient.
        """
        own = self.norms(gradients)
        found = math.hypot(*own.values())
        largest = math.hypot(*(float(number) for numbers in self._largest.values() for number in numbers))
        largest = norm_of_parts(largest)
        if not math.isfinite(found) or not math.isfinite(largest) or not found + largest > 0.0:
            return {}
        self.scale = scale = max(found, self.scale) or largest
        for difference, gradient in zip(self._differences.values(), gradients, strict=True):
            if gradient is not None:
                difference -= gradient.to_dense() if gradient.is_sparse else gradient
        off = _norms(self._differences)
        errors = {name: value / scale for name, value in off.items()}
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= ROW_SUM_TOLERANCE:
            raise self._differ(worst, errors[worst], "the batch gradient's")
        for name, value in off.items():
            if own[name] > _OWN_FLOOR * scale and not value <= _OWN_TOLERANCE * own[name]:
                raise self._differ(name, value / own[name], "its own")
        return errors

    def norms(self, gradients: Sequence[Tensor | None]) -> dict[str, float]:
        """name -> norm of the gradient, 0 for a parameter that was not used."""
        return _norms(dict(zip(self._differences, gradients, strict=True)))

    def _differ(self, name: str, error: float, norm: str) -> RowSumsDifferError:
        return RowSumsDifferError(name, f"do not add up to the batch gradient (off by {error:.1e} of {norm} norm)")


def _norms(tensors: Mapping[str, Tensor | None]) -> dict[str, float]:
    """name -> norm, 0 for None; of a model that is cut over processes, of everybody's stretches together."""
    squares = total_of(*(0.0 if tensor is None else _norm(tensor) ** 2 for tensor in tensors.values()))
    return {name: square**0.5 for name, square in zip(tensors, squares, strict=True)}


def _norm(tensor: Tensor) -> float:
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
