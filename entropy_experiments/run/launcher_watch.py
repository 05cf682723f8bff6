"""A process of a launch ends when its launcher is gone: the others may never come, and nobody would restart it.

Waiting for them happens inside a communication library, up to half an hour, where no signal handler of Python runs; a thread
ends the process from outside. Everything is written whole or not at all, so that nothing is lost.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_POLL_SECONDS = 2.0
STATUS = 143
_LINE = (
    "ended: the launcher of this process is gone; what is finished is kept: go on with the same command and --resume\n"
)


def end_with_the_launcher() -> None:
    """Watch the parent from here on, where torchrun or accelerate started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    gone_already = launcher == 1 and not _is_python(launcher)

    def watch() -> None:
        while not gone_already and os.getppid() == launcher:
            time.sleep(_POLL_SECONDS)
        os.write(2, _LINE.encode())
        os._exit(STATUS)

    threading.Thread(target=watch, daemon=True).start()


def _is_python(process: int) -> bool:
    """True where it cannot be told. Init adopts whoever has lost a parent, and may be a container's launcher itself."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return True
    return b"python" in words or b"torchrun" in words or b"accelerate" in words
