"""Several processes on one sweep: which checkpoints are whose, without a word between them.

Process i of n takes checkpoints i, i + n, i + 2n, ... of the plan. Where i and n come from, in this order:

    --shard 2/8                                          the second of eight
    RANK, WORLD_SIZE                                     accelerate launch, torchrun
    SLURM_ARRAY_TASK_ID, _COUNT, _MIN, _STEP             a job array

The launcher's variables are taken out of the environment while a sweep runs: every analysis is a single-process one, and no
library below may take them for a process group to join.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from rl_training.errors import UserError
from rl_training.run.launched import launcher_number, world_size

Item = TypeVar("Item")
_LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_ARRAY = {"ID": 0, "MIN": 0, "STEP": 1}
"""A job array's variables and what they are where they are not set."""


@dataclass(frozen=True)
class Shard:
    """Process `index` (from 0) of `count`. kind: how it was started; local_rank: its number on this machine."""

    index: int = 0
    count: int = 1
    kind: Literal["alone", "shard", "rank", "array"] = "alone"
    local_rank: int | None = None

    def of(self, items: Sequence[Item]) -> list[Item]:
        """What of `items` is this process's."""
        return list(items[self.index :: self.count])

    def describe(self) -> str:
        """For a person: `process 2 of 8 (SLURM array)`."""
        source = {"alone": "", "shard": " (--shard)", "rank": " (launched)", "array": " (SLURM array)"}[self.kind]
        return f"process {self.index + 1} of {self.count}{source}"


def shard_of_process(shard: str | None, environ: Mapping[str, str] | None = None) -> Shard:
    """The shard that `shard` ("2/8") or the environment gives this process. Raises UserError where they make no sense."""
    env = os.environ if environ is None else environ
    world, tasks = world_size(env), launcher_number("SLURM_ARRAY_TASK_COUNT", 1, env)
    if shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", shard.strip())
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard {shard} is not i/n with 1 <= i <= n, e.g. --shard 2/8 for the second of eight")
        if world > 1:
            raise UserError(
                "--shard and a launcher (accelerate launch, torchrun) both deal out checkpoints: use one of them"
            )
        return Shard(int(match[1]) - 1, int(match[2]), "shard") if int(match[2]) > 1 else Shard()
    if world > 1:
        rank = launcher_number("RANK", 0, env)
        if rank >= world:
            raise UserError(f"RANK={rank} is not below WORLD_SIZE={world}: the launcher's variables are broken")
        return Shard(rank, world, "rank", launcher_number("LOCAL_RANK", rank, env))
    if tasks > 1:
        number, first, stride = (launcher_number(f"SLURM_ARRAY_TASK_{n}", d, env) for n, d in _ARRAY.items())
        index, off = divmod(number - first, max(1, stride))
        if off or not 0 <= index < tasks:
            raise UserError(
                "the SLURM array's task numbers have gaps, so the shards cannot be derived from them: use --array=0-7 or give "
                "--shard i/n"
            )
        return Shard(index, tasks, "array")
    return Shard()


@contextmanager
def single_process() -> Iterator[None]:
    """The environment without a launcher's variables; they are back afterwards."""
    kept = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
