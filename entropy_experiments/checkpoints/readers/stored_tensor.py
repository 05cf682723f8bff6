"""A tensor that lies in a file and is read when it is asked for, whole or a part of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_experiments.checkpoints.readers.inert_pickle import Damaged


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's values lie.

    shape, stride: As torch has them. offset: Of its first element among the elements of the store.
    read_bytes(start, stop): Bytes of the store. length: Bytes of the store. Nothing is read before
    `read`.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    length: int
    read_bytes: Callable[[int, int], bytearray]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> StoredTensor:
        """Another tensor over the same store. Raises Damaged where it reaches beyond it."""
        if len(shape) != len(stride) or offset < 0:
            raise Damaged("a tensor of it has a shape and no strides")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if 0 not in shape and (last + 1) * self.dtype.itemsize > self.length:
            raise Damaged("a tensor of it reaches beyond its values: the file is damaged")
        # Strides of 0 repeat one value without end; no trainer saves such a tensor.
        if any(s == 0 and n > 1 for n, s in zip(shape, stride, strict=True)):
            raise Damaged("a tensor of it repeats its values")
        return replace(self, offset=offset, shape=shape, stride=stride)

    def as_dtype(self, dtype: torch.dtype) -> StoredTensor:
        """The same bytes as elements of another type."""
        return replace(self, dtype=dtype)

    def read(self) -> Tensor:
        """The values, on the CPU, in their own type.

        Returns:
            A tensor of `shape` with memory of its own.
        """
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        flat = self._elements(self.offset, self.offset + span)
        return flat.as_strided(self.shape, self.stride).contiguous()

    def read_part(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of a vector, without reading the others."""
        if len(self.shape) != 1 or self.stride != (1,) or not 0 <= start <= stop <= self.shape[0]:
            raise Damaged("a vector of it is shorter than what it should hold")
        return self._elements(self.offset + start, self.offset + stop)

    def _elements(self, start: int, stop: int) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=self.dtype)
        size = self.dtype.itemsize
        data = self.read_bytes(start * size, stop * size)
        if len(data) != (stop - start) * size:
            raise Damaged("it is shorter than its description says: it was cut short")
        return torch.frombuffer(data, dtype=self.dtype)
