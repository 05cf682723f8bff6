"""How a process of a launch ends: by itself, before the interpreter takes its libraries apart.

Threads of the communication library outlive the last exchange. Where the interpreter is taken apart under them they now and
then abort a process that had finished its work ("terminate called without an active exception"), and the launcher takes the
whole run for failed.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rl_training.errors import ShareDone


@contextmanager
def ending_the_launch() -> Iterator[None]:
    """Around a command. Where it succeeds as one process of several, the process ends with code 0 as soon as the exit
    functions of all libraries have run (W&B finishes its run in one). A `ShareDone` is a success.

    Nothing changes for a process that is alone, or for a command that fails.
    """
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    succeeded = False

    def end() -> None:
        if succeeded:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    if several:
        atexit.register(end)  # the first to be registered is the last to be called
    try:
        yield
    except ShareDone:  # the first process of the launch writes the results, and says so
        pass
    except SystemExit as ending:
        if ending.code not in (None, 0):
            raise
    succeeded = True
