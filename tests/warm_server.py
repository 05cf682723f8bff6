"""`python -m tests.warm_server DESCRIPTOR`: forks the processes of `tests.warm_python`, once the libraries are imported.

It forks while it has a single thread: a fork takes no other thread along, and what another has locked stays locked.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress

from entropy_experiments.run.quiet_libraries import quiet_libraries

# Otherwise pyarrow's allocator starts a thread as soon as it is loaded.
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"

LIBRARIES = (
    "torch", "torch.distributed", "transformers.models.llama.modeling_llama", "transformers.generation", "peft", "trl",
    "pandas", "pyarrow.parquet", "scipy.stats", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "rl_training.train", "entropy_experiments.cli", "entropy_experiments.entropy_runner",
)  # fmt: skip


def serve(control: socket.socket) -> dict | None:
    """Fork for every order. Returns in the forked processes, with what to do, and in the server at its end, with None."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 4)
        if not data:
            return None
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"importing has left {len(threads)} threads: they do not survive a fork"
        if os.fork() == 0:
            control.close()
            return _keep(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(answers: int, letter: int, out: int, errors: int) -> dict:
    """Fork the process, tell its id, wait for it and tell how it ended. Returns in the process alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with os.fdopen(letter, "rb", closefd=True) as file:
        file.seek(0)
        order = json.load(file)
    process = os.fork()
    if process:
        with suppress(OSError):  # who asked for it may be gone
            os.write(answers, f"{process}\n".encode())
            _, status, used = os.wait4(process, 0)
            seconds = used.ru_utime + used.ru_stime
            os.write(answers, f"{os.waitstatus_to_exitcode(status)} {seconds}\n".encode())
        os._exit(0)
    os.close(answers)
    os.dup2(out, 1)
    os.dup2(errors, 2)
    os.close(out)
    os.close(errors)
    return order


def become(order: dict) -> None:
    """What `python ARGUMENTS` does once it has started."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    if order["prelude"]:
        module, _, function = order["prelude"].partition(":")
        getattr(importlib.import_module(module), function)()
    kind, what, *arguments = order["arguments"]
    with contextlib.suppress(FileNotFoundError):  # a working folder that is gone
        sys.path[0] = "" if kind == "-c" else os.getcwd()
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


def end_of(order: dict) -> int:
    """Do it and all that Python does at its end but to take itself apart, which takes seconds where memory was forked."""
    code: object = None
    try:
        become(order)
    except SystemExit as ending:
        code = ending.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    quiet_libraries()  # as the command line, before it imports them
    for name in LIBRARIES:
        importlib.import_module(name)
    os.fsync = lambda descriptor: None  # as in tests/conftest.py
    gc.freeze()  # what all processes share is not to be copied by their garbage collections
    order = serve(control)
    if order is not None:
        os._exit(end_of(order))


if __name__ == "__main__":
    main()
