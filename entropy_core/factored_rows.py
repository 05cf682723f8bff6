"""Products of two sides' rows that are kept as factors: rows are formed block by block where they are multiplied.

    K(s, t) = sum over blocks of  <row_s[block], P[block] row_t[block]>

A block is some rows of one parameter, for all sequences of both sides at once, so that no more than BLOCK_BYTES of rows exist at
a time. Forming them costs about what a backward pass spends on weight gradients. Blocks of an embedding that nothing else uses go
over the tokens of the streamed side alone: its rows are zero elsewhere.

Source: docs/theory/fisher-kernel.md, "Rows as factors".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from entropy_core.kernel import products
from entropy_core.passes.factors import RowFactors, Some, matrix_shape

BLOCK_BYTES = 2**28
"""Of rows, both sides' together, that exist at a time."""


class FactoredSide(Protocol):
    """Sequences whose rows can be formed block by block, in an order of their own."""

    @property
    def order(self) -> Tensor:
        """(N,) which sequence of the batch each row is."""
        ...

    def form(self, number: int, name: str, some: Some, out: Tensor) -> bool:
        """Fill out (N, b, inner) with rows `some` of a parameter, of an objective; False, and `out` as it is, where all are 0."""
        ...

    def row(self, name: str, sequence: int) -> Tensor | None:
        """A parameter's row of one sequence of the batch, objective 0, in one of the parameter's shapes; None where it is 0."""
        ...


@dataclass
class _Pass:
    """Sequences that passed together. uses: (objective, parameter) -> its uses."""

    indices: Tensor
    uses: dict[tuple[int, str], list[RowFactors]] = field(default_factory=dict)


class StreamedSide(FactoredSide, Protocol):
    """A side of any number of objectives, whose products with another are wanted."""

    def device(self, name: str) -> torch.device | None:
        """Where a parameter's rows are formed; None where it was not used."""
        ...

    def reached(self, name: str) -> Tensor | None:
        """Ascending rows of the parameter that are not zero for all sequences and objectives; None: all may be other than 0."""
        ...


class KeptFactors:
    """Factors of a batch's rows in memory, of any number of objectives; `add` is a sink of factored streams.

    Inputs are the tensors that the graph holds: objectives share them, and layers that read the same one.
    """

    def __init__(self) -> None:
        self.passes: list[_Pass] = []

    def add(self, number: int, name: str, indices: Tensor, factors: RowFactors) -> None:
        """As entropy_core.row_stream.RowSink."""
        latest = self.passes[-1] if self.passes else None
        if latest is None or not torch.equal(latest.indices, indices.cpu()):
            self.passes.append(latest := _Pass(indices.cpu()))
        latest.uses.setdefault((number, name), []).append(factors)

    def clear(self) -> None:
        """Forget everything."""
        self.passes.clear()

    @property
    def order(self) -> Tensor:
        """As FactoredSide.order."""
        return torch.cat([one.indices for one in self.passes])

    def form(self, number: int, name: str, some: Some, out: Tensor) -> bool:
        """As FactoredSide.form."""
        if not any((number, name) in one.uses for one in self.passes):
            return False
        ends = list(accumulate(len(one.indices) for one in self.passes))
        for one, start, end in zip(self.passes, [0, *ends], ends, strict=False):
            add_uses(one.uses.get((number, name), []), some, out[start:end])
        return True

    def row(self, name: str, sequence: int) -> Tensor | None:
        """As FactoredSide.row."""
        one = next(one for one in self.passes if bool((one.indices == sequence).any()))
        return one_row(one.uses.get((0, name), []), int((one.indices == sequence).nonzero()[0, 0]))

    def device(self, name: str) -> torch.device | None:
        """As StreamedSide.device."""
        uses = (uses for one in self.passes for key, uses in one.uses.items() if key[1] == name)
        return next((use.device for some in uses for use in some), None)

    def reached(self, name: str) -> Tensor | None:
        """As StreamedSide.reached."""
        found = [
            use.reached() for one in self.passes for key, uses in one.uses.items() if key[1] == name for use in uses
        ]
        known = [some for some in found if some is not None]
        return torch.cat(known).unique() if known and len(known) == len(found) else None


def add_uses(uses: Sequence[RowFactors], some: Some, out: Tensor) -> None:
    """Fill out (n, b, inner) with the sum of the uses of a parameter."""
    if not uses:
        out.zero_()
    for place, use in enumerate(uses):
        use.add_to(out, some, fresh=place == 0)


def one_row(uses: Sequence[RowFactors], place: int) -> Tensor | None:
    """The row of the sequence at `place`, the uses added up; None where there are none."""
    total = None
    for use in uses:
        total = use.row(place) if total is None else total.add_(use.row(place))
    return total


def factored_products(
    rows: StreamedSide,
    kinds: int,
    columns: FactoredSide,
    numbers: Sequence[int],
    shapes: Mapping[str, torch.Size],
    metric: Mapping[str, Tensor] | None = None,
    vectors: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """(kinds, N, n + v) products, in the orders of both batches, on the CPU.

    Args:
        rows: of N sequences, objectives 0 … kinds - 1.
        columns: n sequences, objective 0.
        numbers: objectives whose products with the columns are wanted; those of others are 0.
        shapes: parameter -> shape, of all parameters.
        metric: the diagonal between rows and columns (P); None: 1.
        vectors: name -> (v, *shape) that all rows are multiplied with as they are; None: v = 0.
    """
    mine, theirs = rows.order, columns.order
    extra = 0 if vectors is None else len(next(iter(vectors.values())))
    out = torch.zeros((kinds, len(mine), len(theirs) + extra))
    rooms: dict[torch.device, tuple[_Room, _Room]] = {}
    for name, shape in shapes.items():
        device = rows.device(name)
        if device is None:  # not used: its rows are 0
            continue
        along = None if vectors is None else vectors[name].reshape(extra, *matrix_shape(shape))
        diagonal = None if metric is None else metric[name].reshape(matrix_shape(shape))
        room = rooms.setdefault(device, (_Room(device), _Room(device)))
        for some in blocks(shape, len(mine) + len(theirs), rows.reached(name)):
            width = some.stop - some.start if isinstance(some, slice) else len(some)
            own, other = (
                r.of(len(o), width, matrix_shape(shape)[1]) for r, o in zip(room, (mine, theirs), strict=True)
            )
            there = bool(numbers) and columns.form(0, name, some, other)
            for number in range(kinds):
                if not rows.form(number, name, some, own):
                    continue
                if there and number in numbers:
                    p = None if diagonal is None else diagonal[some]
                    out[number, :, : len(theirs)] += products(own, other, p).cpu()
                if along is not None:
                    out[number, :, len(theirs) :] += products(own, along[:, some].to(own)).cpu()
    found = torch.empty_like(out)
    at = torch.cat([theirs, torch.arange(len(theirs), len(theirs) + extra)])
    found[:, mine[:, None], at[None, :]] = out
    return found


def blocks(shape: torch.Size, count: int, reached: Tensor | None) -> Iterator[Some]:
    """Rows of a parameter, cut so that those of `count` sequences take BLOCK_BYTES at most (one row at least)."""
    outer, inner = matrix_shape(shape)
    step = max(1, BLOCK_BYTES // (4 * max(1, inner) * max(1, count)))
    if reached is not None:
        yield from reached.split(step)
        return
    for start in range(0, outer, step):
        yield slice(start, min(start + step, outer))


class _Room:
    """Memory for blocks of rows, taken once and used again."""

    def __init__(self, device: torch.device) -> None:
        self._flat = torch.empty(0, device=device)

    def of(self, *shape: int) -> Tensor:
        """Uninitialised (*shape) float32; what was given before is overwritten."""
        count = torch.Size(shape).numel()
        if self._flat.numel() < count:
            self._flat = torch.empty(count, device=self._flat.device)
        return self._flat[:count].view(shape)
