"""Processes of tests without the wait for imports: forked from a server that has loaded the libraries and done nothing else.

`warm_run` and `WarmProcess` stand where `subprocess.run` and `subprocess.Popen` would start `python -m MODULE ...` or
`python -c CODE ...`. Such a process has an environment, a working folder, standard streams and an end of its own: exit
functions run, but the interpreter is not taken apart. What libraries read while they are imported (OMP_NUM_THREADS,
PYTHONPATH) is the server's. Tests of imports, of start-up, of ends and of launchers start a real interpreter.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
UNPAINTED = "tests.unpainted:paint_nothing"
"""The prelude of processes whose reports nobody looks at."""

cpu_seconds = [0.0]
"""What all warm processes of this process have used, in seconds: they are no children of it, so no other clock counts them."""


class WarmProcess:
    """One forked process, with the attributes and methods of `subprocess.Popen` that tests use; its streams are files."""

    def __init__(
        self, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, prelude: str = ""
    ) -> None:
        """Start it.

        Args:
            arguments: "-m", module, ... or "-c", code, ..., as after `python`.
            env: Its environment; by default that of this process.
            cwd: Its working folder; by default that of this process.
            prelude: "module:function", called in the process before anything else.
        """
        self.args, self.returncode = [str(argument) for argument in arguments], None
        self._said = b""
        self._streams: list[IO[bytes]] = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
        environment = dict(os.environ if env is None else env)
        order = {"arguments": self.args, "prelude": prelude, "cwd": str(cwd or os.getcwd()), "environment": environment}
        self._keeper, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as letter:
            letter.write(json.dumps(order).encode())
            letter.flush()
            descriptors = [theirs.fileno(), letter.fileno(), *(stream.fileno() for stream in self._streams)]
            socket.send_fds(_server_of(os.getpid()), [b"x"], descriptors)
        self.pid = int(self._hear(None))

    def _hear(self, timeout: float | None) -> str:
        """One line of the process' keeper: its id, then its exit code and its CPU time. Raises subprocess.TimeoutExpired."""
        while b"\n" not in self._said:
            if not select.select([self._keeper], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            more = self._keeper.recv(100)
            assert more, "the server of warm processes is gone"
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative where a signal ended it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            code, _, seconds = self._hear(timeout).partition(" ")
            self.returncode = int(code)
            cpu_seconds[0] += float(seconds)
            self._keeper.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and to stderr, once it has ended. Raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        for stream in self._streams:
            stream.seek(0)
        out, errors = (stream.read().decode(errors="replace") for stream in self._streams)
        return out, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def warm_run(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 500.0,
    prelude: str = "",
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """As `subprocess.run` with its output captured as text. A process that takes longer than `timeout` seconds is killed."""
    process = WarmProcess(*arguments, env=env, cwd=cwd, prelude=prelude)
    try:
        out, errors = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), out, errors)


@functools.cache
def _server_of(owner: int) -> socket.socket:
    """The way to this process' server, which starts with the first order and ends when this end closes."""
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.warm_server", str(theirs.fileno())]
    with theirs:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def end() -> None:
        if os.getpid() == owner:
            ours.close()
            server.wait()

    atexit.register(end)
    return ours
