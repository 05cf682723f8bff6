"""Random projections of gradient rows, module by module, that keep inner products on average.

    G (o, i)  ->  A G B^T  (p, q),      A, B with independent entries +-1/sqrt(p), +-1/sqrt(q):   E <A R B^T, A S B^T> = <R, S>

A row over millions of parameters becomes a few numbers a module, so that kernels of 10^5 sequences fit into memory. With P the
rows of both sides are multiplied by sqrt(P) first: P then stands in the product once. The error of an entry is of the order of
|R| |S| sqrt((1/p + 1/q) / modules), whatever the entry's own size: large entries are good, small ones are noise. Measure it
(`KernelEngine` holds the sketch against exact entries of the same run).

Vectors, and matrices no larger than the sketch, are kept as they are. Source: Johnson and
Lindenstrauss (1984); the two-sided form keeps A and B small. docs/guides/large-kernels.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class ModuleSketch:
    """Random projections of per-sequence gradients, one for each parameter.

    Args:
        shapes: parameter -> shape.
        dim: numbers a parameter becomes, at most.
        seed: of the projections; the same everywhere.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], dim: int, seed: int = 0) -> None:
        if dim < 1:
            raise ValueError(f"a sketch needs at least one number a parameter, not {dim}")
        generator = torch.Generator().manual_seed(seed)
        self._sides: dict[str, tuple[Tensor, Tensor] | None] = {}
        self._at: dict[str, slice] = {}
        start = 0
        for name, shape in shapes.items():
            rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
            if rows * columns <= dim:
                self._sides[name], size = None, rows * columns
            else:
                # as square as the matrix allows
                p = min(rows, max(1, round(math.sqrt(dim))))
                q = min(columns, max(1, dim // p))
                p = min(rows, max(1, dim // q))
                self._sides[name] = (_signs(p, rows, generator), _signs(q, columns, generator))
                size = p * q
            self._at[name] = slice(start, start + size)
            start += size
        self.size = start

    def add(self, out: Tensor, name: str, rows: Tensor) -> None:
        """Add the sketch of (n, *shape) rows of one parameter to (n, size) `out`."""
        sides, flat = self._sides[name], rows.flatten(1)
        if sides is not None:
            a, b = (side.to(rows) for side in sides)
            matrices = rows.reshape(len(rows), a.shape[1], b.shape[1])
            flat = (a @ matrices @ b.T).flatten(1)  # Kronecker-structured: (b (x) a) is never formed
        out[:, self._at[name]] += flat.to(out)


def _signs(small: int, large: int, generator: torch.Generator) -> Tensor:
    """(small, large) of +-1/sqrt(small); the identity where nothing is saved."""
    if small == large:
        return torch.eye(large)
    return (torch.randint(0, 2, (small, large), generator=generator) * 2 - 1).float() / math.sqrt(small)
