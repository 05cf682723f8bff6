"""One function in two gloo processes: started afresh, importing no more than the function's own module does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(function: Callable[[], Any], size: int = 2) -> list[Any]:
    """What `function`, of a module's top level, returns in each of `size` processes that form one process group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (function, size, folder), nprocs=size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _work(rank: int, function: Callable[[], Any], size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=size)
    try:
        torch.save(function(), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
