"""Vectors over all trainable parameters that are formed one parameter at a time, when they are read, and never held whole.

A step, its parts, P and the directions made of them are elementwise functions of a few vectors that are at hand anyway (the
gradient, the moments). Of a model of which every weight is trained each would be as large as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from entropy_core.cut_weights import open_cut, total_of

Value = TypeVar("Value", covariant=True)

PIECE = 2**22
"""Elements of a parameter that elementwise functions are formed of at a time: what they need on the way stays this small."""


class Formed(Mapping[str, Value]):
    """name -> what `form` makes of it, anew at every access: valid as long as what it is made of is as it was.

    names: in the order of iteration.
    """

    def __init__(self, names: Iterable[str], form: Callable[[str], Value]) -> None:
        self._names = dict.fromkeys(names)
        self._form = form

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._form(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def elementwise(form: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """form(*tensors) of tensors of one shape, a piece at a time where they are large; `form` works element by element."""
    first = tensors[0]
    count = first.numel()
    if count <= PIECE:
        return form(*tensors)
    flat = [tensor.reshape(-1) for tensor in tensors]
    out: Tensor | None = None
    for start in range(0, count, PIECE):
        found = form(*(tensor[start : start + PIECE] for tensor in flat))
        if out is None:
            out = torch.empty(count, dtype=found.dtype, device=found.device)
        out[start : start + PIECE] = found
    assert out is not None
    return out.view(first.shape)


def dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """<left, right> over all parameters, summed in float64; of a model that is cut over processes, over everybody's stretches.

    Raises ValueError when the names differ.
    """
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        raise ValueError(f"the two gradients cover different parameters ({len(odd)} names, e.g. {odd[0]!r})")
    total = 0.0
    for name in left:
        pairs = zip(left[name].reshape(-1).split(PIECE), right[name].reshape(-1).split(PIECE), strict=True)
        total += sum(float(torch.dot(a.double(), b.double())) for a, b in pairs)
    return total_of(total)[0]


def whole(vectors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Vectors over the parameters of a model that is cut over processes, each parameter's tensor gathered when it is read (all
    must read the same in the same order); of other models as they are.
    """
    cut = open_cut()
    return vectors if cut is None else Formed(vectors, lambda name: cut.gathered(name, vectors[name]))
