"""The processes of one `accelerate launch`: who does what, and how they meet. One process is the ordinary case.

Work is dealt out by number (block, shard or chunk k belongs to process k mod size), so that nothing depends on how many
processes there are but who computes it. Results travel through the results folder, which all processes must see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rl_training.errors import ResumableError, UserError

# One process may draw completions for hours while the others wait.
_PATIENCE = timedelta(hours=24)


class Processes:
    """rank of size. Every member must make the same calls in the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, on_cpu: bool = False) -> Processes:
        """The group that `accelerate launch` or `torchrun` described in the environment; alone where there is none."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            from accelerate import PartialState

            if "RANK" in os.environ:
                with _others_explained():
                    PartialState(cpu=on_cpu, timeout=_PATIENCE)
            if not dist.is_initialized():
                raise UserError(
                    f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that several processes work together, but there is no group of "
                    "them: start it by accelerate launch or torchrun, or unset WORLD_SIZE"
                )
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def mine(self, numbers: Sequence[int]) -> list[int]:
        """Those of these numbers (of blocks, shards, chunks) that belong to this process."""
        return [number for number in numbers if number % self.size == self.rank]

    def meet(self) -> None:
        """Wait for all others."""
        if self.size > 1:
            with _others_explained():
                dist.barrier()

    def from_root(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in process 0, in every process. An error of process 0 is raised in all of them."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_root:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = str(error)
        with _others_explained():
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor of the same shape in each process; the tensor itself if alone."""
        if self.size == 1:
            return values
        total = values.clone()
        with _others_explained():
            dist.all_reduce(total)
        return total

    def send_around(self, values: Tensor, owner: int) -> None:
        """Fill `values` in every process with what stands in it in process `owner`."""
        if self.size > 1:
            with _others_explained():
                dist.broadcast(values, src=owner)


@contextmanager
def _others_explained() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, torch.distributed.DistBackendError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ResumableError(
            f"another process of this run stopped answering ({reason[:200]}): look at its output; what is finished is kept, "
            "start the same command with --resume to go on"
        ) from error
