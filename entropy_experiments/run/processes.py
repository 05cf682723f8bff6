"""The processes of one `accelerate launch`: who does what, and how they meet. One process is the ordinary case.

Work is dealt out by number (block, shard or chunk k belongs to process k mod size), so that nothing depends on how many
processes there are but who computes it. Results travel through the results folder, which all processes must see.

A process that dies closes its connections, which ends the others' waiting at once (those that compute notice when they next
meet). Waiting as such says nothing: the first process may draw completions for hours. So they meet in a gloo group that is
patient, whatever the devices; tensors on GPUs travel through the launch's own group, once all are known to be there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rl_training.errors import ResumableError, UserError

# All are started at about the same time, and come here before they do anything.
JOINING = timedelta(minutes=10)
# One process may draw completions for hours while the others wait.
_PATIENCE = timedelta(hours=24)
_DIED = "another process of this run died or was stopped"
_NEVER_CAME = "the processes of this run did not come together"


class Processes:
    """rank of size. Every member must make the same calls in the same order.

    patient: the gloo group in which they wait for one another; None: the default group.
    """

    def __init__(self, rank: int = 0, size: int = 1, patient: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self._patient = rank, size, patient

    @classmethod
    def join(cls, on_cpu: bool = False) -> Processes:
        """The group that `accelerate launch` or `torchrun` described in the environment; alone where there is none.

        Raises UserError where the environment describes no group; ResumableError where not all come within `JOINING`.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            from accelerate import PartialState

            if "RANK" in os.environ:
                with _others_explained(_NEVER_CAME):
                    PartialState(cpu=on_cpu or not torch.cuda.is_available(), timeout=JOINING)
            if not dist.is_initialized():
                raise UserError(
                    f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that several processes work together, but there is no group of "
                    "them: start it by accelerate launch or torchrun, or unset WORLD_SIZE"
                )
        with _others_explained(_NEVER_CAME):
            dist.barrier()  # what follows waits patiently: all should be there
            return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=_PATIENCE, backend="gloo"))

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
                dist.barrier(self._patient)

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
            dist.broadcast_object_list(box, src=0, group=self._patient)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor of the same shape in each process; the tensor itself if alone."""
        if self.size == 1:
            return values
        total = values.clone()
        self.meet()
        with _others_explained():
            dist.all_reduce(total, group=self._group_for(total))
        return total

    def send_around(self, values: Tensor, owner: int) -> None:
        """Fill `values` in every process with what stands in it in process `owner`. After `meet`: nobody is waited for long."""
        if self.size > 1:
            with _others_explained():
                dist.broadcast(values, src=owner, group=self._group_for(values))

    def _group_for(self, values: Tensor) -> dist.ProcessGroup | None:
        return self._patient if values.device.type == "cpu" else None


@contextmanager
def _others_explained(what: str = _DIED) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, torch.distributed.DistBackendError) as error:
        raise ResumableError(
            f"{what} ({_reason(error)}): the others' own output says why. What is finished is kept: the same command with "
            "--resume goes on, with as many processes as you like"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of what the communication library says, without its source file and its advice."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^\[[^]]*\]\s*", "", line).split(" This is typically")[0].rstrip(". ")[:200]
