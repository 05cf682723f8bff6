"""How the processes of one `accelerate launch` come together. Results travel through the results folder, which all must see.

A process that dies closes its connections, which ends the others' waiting at once (those that compute notice when they next
meet). Waiting as such says nothing: the first process may draw completions for hours. So they meet in a gloo group that is
patient, whatever the devices; tensors on GPUs travel through the launch's own group, once all are known to be there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from entropy_core.processes import Processes
from rl_training.errors import ResumableError, UserError
from rl_training.run.launched import world_size

# All are started at about the same time, and come here before they do anything.
JOINING = timedelta(minutes=10)
# One process may draw completions for hours while the others wait.
_PATIENCE = timedelta(hours=24)
_DIED = "another process of this run died or was stopped"
_NEVER_CAME = "the processes of this run did not come together"


def join_launch(on_cpu: bool = False) -> Processes:
    """The group that `accelerate launch` or `torchrun` described in the environment; alone where there is none.

    Args:
        on_cpu: whether the model is kept on the CPU, so that gloo carries everything.

    Raises:
        UserError: the environment describes several processes, but no group of them.
        ResumableError: not all come within `JOINING`; later, from the group's own calls: another process has died.
    """
    if world_size() == 1:
        return Processes()
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
        patient = dist.new_group(timeout=_PATIENCE, backend="gloo")
        return Processes(dist.group.WORLD, patient, _others_explained)


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
