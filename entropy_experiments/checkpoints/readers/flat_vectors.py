"""A tensor that lies in flat vectors, one of each process, laid end to end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_experiments.checkpoints.readers.inert_pickle import Damaged
from entropy_experiments.checkpoints.readers.stored_tensor import StoredTensor
from entropy_experiments.checkpoints.readers.trained_state import LazyTensor, reading


def cut(origin: str, vectors: Sequence[StoredTensor], offset: int, shape: tuple[int, ...]) -> LazyTensor:
    """Elements offset .. offset + (number of elements of `shape`) of the vectors laid end to end.

    Args:
        origin: What to name where reading fails.
        vectors: Of the processes, by rank; their lengths may differ.
        offset: Of the first element.
        shape: Of the tensor.

    Raises:
        Damaged: Where the vectors end before.
    """
    count = math.prod(shape)
    ends = list(itertools.accumulate(vector.shape[0] for vector in vectors))
    if not ends or offset + count > ends[-1]:
        raise Damaged("the flat vectors of the processes end before their last parameter")

    def read() -> Tensor:
        pieces = []
        for vector, end in zip(vectors, ends, strict=True):
            begin = end - vector.shape[0]
            start, stop = max(offset, begin) - begin, min(offset + count, end) - begin
            if start < stop:
                pieces.append(vector.read_part(start, stop))
        return torch.cat(pieces).reshape(shape) if pieces else torch.empty(shape, dtype=vectors[0].dtype)

    return reading(origin, shape, vectors[0].dtype, read)


def is_vector(value: object) -> bool:
    """Whether it is a stored tensor of one axis."""
    return isinstance(value, StoredTensor) and len(value.shape) == 1
