"""One function in two gloo processes, forked from a server that has the libraries and nothing of this process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.warm_python import WarmProcess


def in_two_processes(function: Callable[[], Any], size: int = 2, patience: float = 500) -> list[Any]:
    """What `function`, of a module's top level, returns in each of `size` processes that form one process group.

    Args:
        patience: seconds that one waits for another at most.
    """
    module, name = function.__module__, function.__qualname__
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"{module}.{name}, {size}, {folder!r}, {patience}"
        work = f"import {module}; from tests.two_processes import work; work({{}}, {arguments})"
        started = [WarmProcess("-c", work.format(rank)) for rank in range(size)]
        try:
            ended = [process.communicate(500)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == [0] * size, "\n".join(ended)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def work(rank: int, function: Callable[[], Any], size: int, folder: str, patience: float) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/meeting-point", timedelta(seconds=patience)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    try:
        torch.save(function(), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
