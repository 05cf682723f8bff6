"""The sandbox's first process: clean, single-threaded, with the scorers imported. It meets no text;
it forks servers.

Started once by the parent as `python -c` with an empty environment, in an empty folder which it
removes when the parent is gone. Orders: {"serve": modules} with the server's socket attached ->
{"pid": ...} or {"missing": module}; {"reap": pid} -> {}.
"""

from __future__ import annotations

import importlib
import os
import socket
from contextlib import suppress

from rl_training.tasks.sandbox import messages

MODULES = frozenset({"reasoning_gym", "math_verify", "transformers.utils.chat_template_utils"})


def main(control_descriptor: int) -> None:
    """Serve orders until the parent closes its end, which it also does by dying."""
    folder = os.getcwd()
    control = socket.socket(fileno=control_descriptor)
    messages.send(control.fileno(), {"ready": True})
    _leave_the_terminal()
    try:
        while True:
            data, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
            if not data:
                break
            order = messages.receive(control.fileno(), first=data)
            if "serve" in order:
                messages.send(control.fileno(), _serve(control, descriptors[0], order["serve"]))
            else:
                with suppress(ChildProcessError):
                    os.waitpid(int(order["reap"]), 0)
                messages.send(control.fileno(), {})
    except (messages.Closed, OSError):
        pass  # the parent is gone
    os.chdir("/")
    with suppress(OSError):
        os.rmdir(folder)


def _leave_the_terminal() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _serve(control: socket.socket, descriptor: int, modules: list[str]) -> dict[str, object]:
    try:
        for name in modules:
            if name not in MODULES:
                return {"missing": name}
            try:
                importlib.import_module(name)
            except ImportError as error:
                return {"missing": name, "why": str(error)}
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            control.close()
            _run_server(descriptor)
        with suppress(OSError):
            os.setpgid(pid, pid)  # whoever comes first; the parent ends the whole group
        return {"pid": pid}
    finally:
        os.close(descriptor)


def _run_server(descriptor: int) -> None:
    from rl_training.tasks.sandbox.server import serve

    try:
        serve(descriptor)
    finally:
        os._exit(0)
