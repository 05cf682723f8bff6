"""Several processes that hold the same model and share the work of one question. One process is the
ordinary case.

Work is dealt out by number (block, shard, chunk or prompt k belongs to process k mod size), so that
nothing depends on how many processes there are but who computes it. Numbers that are sums over
sequences are summed over processes. A sum of inner products with a direction that all processes
share is the inner product of the summed vector, so gradients themselves need not travel.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Processes:
    """Process `rank` of `size`. Every member must make the same calls in the same order.

    Args:
        group: the process group that tensors travel through; None: this process is alone.
        waiting: the group in which they wait for one another; tensors on the CPU travel through it
            as well. Its timeout bounds how long one process may work while the others wait. None:
            `group`.
        explaining: a context manager entered around every exchange. It may replace an error of the
            communication library.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        waiting: dist.ProcessGroup | None = None,
        explaining: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._group, self._waiting, self._explaining = group, waiting, explaining
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def world(cls) -> Processes:
        """All processes of the default group of torch.distributed; alone where there is none."""
        return cls(dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def mine(self, numbers: Sequence[int]) -> list[int]:
        """Those of these numbers (of blocks, shards, chunks) that belong to this process."""
        return [number for number in numbers if number % self.size == self.rank]

    def my_sequences(self, prompt_index: Tensor) -> Tensor:
        """Indices of the sequences whose prompts this process computes.

        Args:
            prompt_index: (N,) integers, which prompt a sequence belongs to; any numbers.

        Returns:
            (n,) ascending: every `size`-th prompt's sequences; all N if alone.
        """
        if self.size == 1:
            return torch.arange(len(prompt_index), device=prompt_index.device)
        _, place = prompt_index.unique(return_inverse=True)  # dense, so that prompts are dealt evenly
        return (place % self.size == self.rank).nonzero()[:, 0]

    def meet(self) -> None:
        """Wait for all others."""
        if self.size > 1:
            with self._explaining():
                dist.barrier(self._waiting or self._group)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes of a tensor of the same shape in each; the tensor itself if alone."""
        if self.size == 1:
            return values
        total = values.clone()
        if self._waiting is not None:
            self.meet()  # `group` may have no patience
        with self._explaining():
            dist.all_reduce(total, group=self._carrier(total))
        return total

    def any(self, condition: bool, device: torch.device) -> bool:
        """Whether `condition` holds in any process. device: where the group can send from."""
        return bool(self.sum(torch.tensor(float(condition), device=device)) > 0)

    def gather(self, items: Sequence[T]) -> list[T]:
        """Those of all processes, in the order of their ranks; each may have any number."""
        if self.size == 1:
            return list(items)
        own = pickle.dumps(list(items))  # what cannot be sent fails before the others wait for it
        found = [b""] * self.size
        with self._explaining():
            dist.all_gather_object(found, own, group=self._waiting or self._group)
        return [item for some in found for item in pickle.loads(some)]

    def send_around(self, values: Tensor, owner: int) -> None:
        """Fill `values` in every process with what stands in it in process `owner`.

        Call `meet` first: this may not be waited for long.
        """
        if self.size > 1:
            with self._explaining():
                dist.broadcast(values, group_src=owner, group=self._carrier(values))

    def from_root(self, make: Callable[[], T]) -> T:
        """What `make` returns in process 0, in every process.

        An error that it raises there is raised in all of them.
        """
        if self.size == 1:
            return make()
        box: list = [None, None]
        error: Exception | None = None
        if self.is_root:
            try:
                box[0] = make()
            except Exception as raised:
                error, box[1] = raised, _portable(raised)
        with self._explaining():
            dist.broadcast_object_list(box, group_src=0, group=self._waiting or self._group)
        if error is not None:
            raise error
        if box[1] is not None:
            raise box[1]
        return box[0]

    def _carrier(self, values: Tensor) -> dist.ProcessGroup | None:
        return self._waiting if self._waiting is not None and values.device.type == "cpu" else self._group


ALONE = Processes()
"""One process."""


def _portable(error: Exception) -> Exception:
    """The error as another process can have it: itself, or its words where it cannot be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # an error's own constructor may ask for anything
        return RuntimeError(f"{type(error).__name__}: {error}")
