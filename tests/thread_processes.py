"""`Processes` of threads: several members of one question without process groups, each with a model of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from entropy_core.processes import Processes

T = TypeVar("T")


class _Table:
    """Where the members lay down what they send, and wait for one another."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=300)


class ThreadProcesses(Processes):
    """Member `rank`; sums are in the order of ranks, the same in all."""

    def __init__(self, rank: int, table: _Table) -> None:
        super().__init__()
        self.rank, self.size, self._table = rank, len(table.slots), table

    def _exchanged(self, value: Any) -> list[Any]:
        self._table.slots[self.rank] = value
        self._table.barrier.wait()
        found = list(self._table.slots)
        self._table.barrier.wait()
        return found

    def meet(self) -> None:
        self._exchanged(None)

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self._exchanged(values.clone())).sum(0)

    def from_root(self, make: Callable[[], T]) -> T:
        return self._exchanged(make() if self.is_root else None)[0]


def in_threads(work: Sequence[Callable[[Processes], T]]) -> list[T]:
    """What each of the members returns; one of them alone is `Processes()`."""
    if len(work) == 1:
        return [work[0](Processes())]
    table = _Table(len(work))
    with ThreadPoolExecutor(len(work)) as pool:
        started = [pool.submit(one, ThreadProcesses(rank, table)) for rank, one in enumerate(work)]
        return [task.result() for task in started]
