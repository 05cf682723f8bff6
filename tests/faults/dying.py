"""The prelude of a process that fails at a counted point of its work, for tests.faults.interruptions.

A point is a call of os.fsync, os.replace or torch.save: before and after everything that is written. FAULT_POINT says at which
(from 1; 0: never), FAULT what happens there: "kill" (SIGKILL), "full" (every write from there on fails with ENOSPC), "torch" (as
"full", in torch's words), "term" (SIGTERM). FAULT_COUNT names a file that gets the number of points. FAULT_SIZE: no file may have
more bytes.
"""

from __future__ import annotations

import atexit
import errno
import os
import resource
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.unpainted import paint_nothing

_reached = [0]


def arm() -> None:
    """Count points in this process, and fail at the one that the environment names."""
    import torch

    from entropy_experiments.run import launch
    from entropy_experiments.sweep import run as sweep

    launch.JOINING = sweep.JOINING = timedelta(seconds=60)  # all are on this machine: nobody comes later
    paint_nothing()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    point, fault, owner = int(os.environ.get("FAULT_POINT", "0")), os.environ.get("FAULT", ""), os.getpid()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def reached(*arguments: Any, **options: Any) -> Any:
            if os.getpid() == owner:
                _reached[0] += 1
                if point and _reached[0] >= point:
                    _fail(fault, _reached[0] == point)
            return call(*arguments, **options)

        return reached

    os.fsync, os.replace, torch.save = counted(os.fsync), counted(os.replace), counted(torch.save)
    if "FAULT_SIZE" in os.environ:
        size = int(os.environ["FAULT_SIZE"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if "FAULT_COUNT" in os.environ:
        atexit.register(lambda: Path(os.environ["FAULT_COUNT"]).write_text(str(_reached[0])))


def _fail(fault: str, first: bool) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "term" and first:
        os.kill(os.getpid(), signal.SIGTERM)
    if fault == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault == "torch":
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
