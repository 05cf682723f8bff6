"""Gradient rows as the factors that a backward pass makes them of: much smaller than the rows, which are formed of them block by
block.

    linear layer   y = x W^T      row_t(W) = sum_l dy_tl x_tl^T               inputs (n, T, in), cotangents (n, T, out)
    embedding      y = E[token]   row_t(E)[v] = sum_l [token_tl = v] dy_tl    tokens (n, T), cotangents (n, T, width)
    any other                     rows as they are                            (n, *shape)

A parameter is a matrix here, its first axis against all others; a block is some of its rows. Of a head over V tokens the rows of
n sequences would be n V d numbers: its factors are (V + d) a predicted token. Rows of an embedding are zero but at the
sequence's own tokens. A tied weight has one use of each kind, which add up. Source: docs/theory/fisher-kernel.md, "Rows as
factors".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

Some = slice | Tensor
"""Rows of a parameter: consecutive ones, or (b,) ascending numbers."""


class RowFactors(ABC):
    """What one use of a parameter contributes to the rows of n sequences."""

    device: torch.device

    @abstractmethod
    def add_to(self, out: Tensor, some: Some, fresh: bool) -> None:
        """Add the sequences' rows of the parameter's rows `some` to out (n, b, inner); fresh: `out` holds nothing yet."""

    @abstractmethod
    def sum(self) -> Tensor:
        """(outer, inner), the sum of the rows."""

    @abstractmethod
    def row(self, place: int) -> Tensor:
        """(outer, inner), the row of one of the sequences."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name, each with the n sequences first."""

    def reached(self) -> Tensor | None:
        """Ascending numbers of the parameter's rows that are not zero for every sequence; None: all may be."""
        return None


class LinearFactors(RowFactors):
    """inputs (n, T, in), cotangents (n, T, out). start: the first of the parameter's rows that the cotangents are of."""

    def __init__(self, inputs: Tensor, cotangents: Tensor, start: int = 0) -> None:
        self.inputs, self.cotangents = inputs.detach(), cotangents.detach()  # a graph would live as long
        self.device, self._start = cotangents.device, start

    def add_to(self, out: Tensor, some: Some, fresh: bool) -> None:
        some = _from(self._start, some)
        left, right = self.cotangents[..., some].transpose(1, 2), self.inputs.to(self.cotangents.dtype)
        if out.dtype != right.dtype:
            found = torch.bmm(left, right)
            out.copy_(found) if fresh else out.add_(found)
        elif fresh:
            torch.bmm(left, right, out=out)
        else:
            out.baddbmm_(left, right)

    def sum(self) -> Tensor:
        return self.cotangents.flatten(0, 1).T @ self.inputs.flatten(0, 1).to(self.cotangents.dtype)

    def row(self, place: int) -> Tensor:
        return self.cotangents[place].T @ self.inputs[place].to(self.cotangents.dtype)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "cotangents": self.cotangents}


class EmbeddingFactors(RowFactors):
    """tokens (n, T), cotangents (n, T, width); count: of the embedding's rows."""

    def __init__(self, tokens: Tensor, cotangents: Tensor, count: int) -> None:
        self.tokens, self.cotangents, self.count, self.device = tokens, cotangents.detach(), count, cotangents.device

    def add_to(self, out: Tensor, some: Some, fresh: bool) -> None:
        if fresh:
            out.zero_()
        if isinstance(some, slice):
            start, stop, _ = some.indices(self.count)
            places, inside = self.tokens - start, (self.tokens >= start) & (self.tokens < stop)
        else:
            places = torch.searchsorted(some, self.tokens).clamp_(max=len(some) - 1)
            inside = some[places] == self.tokens
        sequences = inside.nonzero()[:, 0]
        if len(sequences):
            at = (sequences, places[inside])
            out.index_put_(at, self.cotangents[inside].to(out.dtype), accumulate=True)

    def sum(self) -> Tensor:
        total = self.cotangents.new_zeros((self.count, self.cotangents.shape[-1]))
        return total.index_add_(0, self.tokens.flatten(), self.cotangents.flatten(0, 1))

    def row(self, place: int) -> Tensor:
        total = self.cotangents.new_zeros((self.count, self.cotangents.shape[-1]))
        return total.index_add_(0, self.tokens[place], self.cotangents[place])

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"tokens": self.tokens, "cotangents": self.cotangents}

    def reached(self) -> Tensor:
        return self.tokens.unique()


class PlainRows(RowFactors):
    """rows (n, *shape) as they are: of norms, biases, and modules that have no factors. start: as of LinearFactors."""

    def __init__(self, rows: Tensor, start: int = 0) -> None:
        self.rows, self.device, self._start = rows.detach(), rows.device, start

    def add_to(self, out: Tensor, some: Some, fresh: bool) -> None:
        found = as_matrices(self.rows)[:, _from(self._start, some)]
        out.copy_(found) if fresh else out.add_(found)

    def sum(self) -> Tensor:
        return self.rows.sum(0)

    def row(self, place: int) -> Tensor:
        return self.rows[place].clone()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}


def from_tensors(tensors: Mapping[str, Tensor], outer: int, start: int = 0) -> RowFactors:
    """The factors whose `tensors` these are, of a parameter with `outer` rows; of them from `start` on."""
    if "rows" in tensors:
        return PlainRows(tensors["rows"], start)
    if "tokens" in tensors:
        return EmbeddingFactors(tensors["tokens"], tensors["cotangents"], outer)
    return LinearFactors(tensors["inputs"], tensors["cotangents"], start)


def _from(start: int, some: Some) -> Some:
    """`some` numbered from `start` on."""
    if start == 0:
        return some
    return slice(some.start - start, some.stop - start) if isinstance(some, slice) else some - start


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(outer, inner) of a parameter."""
    outer = shape[0] if len(shape) else 1
    return outer, torch.Size(shape[1:]).numel()


def as_matrices(rows: Tensor) -> Tensor:
    """(n, *shape) -> (n, outer, inner), a view."""
    return rows.reshape(len(rows), *matrix_shape(rows.shape[1:]))
