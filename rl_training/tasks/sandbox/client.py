"""The parent's side of the sandbox: one first process for this process's lifetime, and a server for
each task.

    server = ScoringServer(("reasoning_gym",), {"problems": {...}})
    server.ask({"score": [...], ...}, seconds)

Works from any thread. A server that hangs or dies is ended with everything it forked, and the next
question starts another. What arrives is data whose shape is checked here; nothing that a completion
writes is trusted further than as a number.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rl_training.errors import UserError
from rl_training.tasks.sandbox import messages
from rl_training.tasks.sandbox.strength import SandboxRefused, check_layers

_START_SECONDS = 120.0
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from rl_training.tasks.sandbox.zygote import main; main(int(sys.argv[1]))"
)
# Equal problems in every process: Python's order of sets of texts is otherwise another one each
# time.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
_PACKAGES = {"reasoning_gym": "reasoning-gym", "math_verify": "math-verify"}


class ServerGone(Exception):
    """The server ended or did not answer in time; it has been ended for good, and the next question
    starts another.
    """


class ServerEnded(ServerGone):
    """It ended of itself, or somebody ended it."""


class _Zygote:
    """The first process. Orders go one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._owner, self._folder = os.getpid(), ""
        self.ended: list[int] = []
        """Servers that were ended and wait to be reaped: until then nobody else gets their number.
        """

    def serve(self, modules: Sequence[str]) -> tuple[int, socket.socket]:
        """(process number, socket) of a new server with these modules imported.

        Raises:
            UserError: it cannot be had.
        """
        with self._lock:
            try:
                answer, ours = self._new_server(modules)
            except (messages.Closed, messages.TooLate, OSError):
                self._stop()  # it was ended from outside since the last order
                try:
                    answer, ours = self._new_server(modules)
                except (messages.Closed, messages.TooLate, OSError) as error:
                    self._stop()
                    raise UserError(f"the process that scores completions could not be started ({error})") from error
            if "missing" in answer:
                ours.close()
                raise UserError(
                    f"this task needs a package: pip install {_PACKAGES.get(answer['missing'], answer['missing'])}"
                )
            return int(answer["pid"]), ours

    def _new_server(self, modules: Sequence[str]) -> tuple[dict[str, Any], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                return self._order({"serve": list(modules)}, [theirs.fileno()]), ours
            except BaseException:
                ours.close()
                raise

    def _order(self, order: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        if self._control is None or self._process is None or self._process.poll() is not None:
            self._stop()
            self._start()
        assert self._control is not None
        while self.ended:
            self._exchange({"reap": self.ended.pop()}, [])
        return self._exchange(order, descriptors)

    def _exchange(self, order: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        assert self._control is not None
        data = json.dumps(order).encode("ascii")
        socket.send_fds(self._control, [len(data).to_bytes(4, "big") + data], descriptors)
        return messages.receive(self._control.fileno(), _START_SECONDS)

    def _start(self) -> None:
        if not hasattr(os, "fork"):
            raise UserError(
                "completions of this task are scored in a sandbox, which this operating system cannot make: take "
                "task.reward=exact or last_number with a jsonl task, or run under Linux (on Windows: WSL)"
            )
        ours, theirs = socket.socketpair()
        folder = self._folder = tempfile.mkdtemp(prefix="entropy-experiments-sandbox-")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-c", _BOOTSTRAP, str(theirs.fileno()), json.dumps(_search_path())],
                env=_ENVIRONMENT,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        try:
            messages.receive(ours.fileno(), _START_SECONDS)
        except (messages.Closed, messages.TooLate) as error:
            self._process.kill()
            told = self._process.communicate()[1].decode("utf-8", "replace").strip().splitlines()
            shutil.rmtree(folder, ignore_errors=True)
            ours.close()
            raise messages.Closed(told[-1] if told else str(error)) from error
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._control = ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            if self._owner == os.getpid():
                try:
                    self._process.wait(10)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
                shutil.rmtree(self._folder, ignore_errors=True)  # it does so itself, unless it was killed
        self._control = self._process = None
        self.ended.clear()

    def close(self) -> None:
        """End it, and with it every server."""
        with self._lock:
            self._stop()


def _search_path() -> list[str]:
    """Where this process finds modules, without the working directory (unless this very package
    lies in it).
    """
    here, own = os.getcwd(), str(Path(__file__).resolve().parents[3])
    return [
        own,
        *(p for p in sys.path if os.path.isabs(p) and os.path.realpath(p) not in (os.path.realpath(here), own)),
    ]


@functools.cache
def _zygote_of(process: int) -> _Zygote:
    zygote = _Zygote()
    atexit.register(zygote.close)
    return zygote


def _zygote() -> _Zygote:
    return _zygote_of(os.getpid())  # a fork of this process has one of its own


class ScoringServer:
    """One task's server, started with the first question and again after it was ended.

    Args:
        setup: the first order of every server, answered by what `setup_answer` returns.
    """

    def __init__(self, modules: Sequence[str], setup: dict[str, Any], setup_seconds: float) -> None:
        self._modules, self._setup, self._setup_seconds = modules, setup, setup_seconds
        self._lock = threading.RLock()
        self._pid, self._socket = 0, None
        self._finalizer: weakref.finalize | None = None
        self.layers: list[str] = []
        """Which layers of the operating system hold, of landlock and seccomp; known after the first
        question.
        """

    def start(self) -> dict[str, Any]:
        """The answer to the setup.

        Raises UserError, as the server says it, or where it takes too long or dies.
        """
        with self._lock:
            self.stop()
            self._pid, self._socket = _zygote().serve(self._modules)
            self._finalizer = weakref.finalize(self, _end, self._pid, self._socket, os.getpid())
            try:
                self.layers = [
                    str(layer) for layer in messages.receive(self._socket.fileno(), _START_SECONDS)["layers"]
                ]
                check_layers(self.layers)
                return self._exchange(self._setup, self._setup_seconds)
            except (messages.Closed, messages.TooLate, ServerGone, KeyError) as error:
                self.stop()
                slow = isinstance(error, messages.TooLate) or isinstance(error.__cause__, messages.TooLate)
                why = f"took longer than {self._setup_seconds:g} s" if slow else "ended before they were made"
                raise UserError(
                    f"the process that makes the task's problems {why}: make task.size or task.arguments smaller"
                ) from error
            except SandboxRefused:
                self.stop()
                raise

    def ask(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises ServerGone where the answer does not come in `seconds` or not at all, UserError
        where the server says one.
        """
        with self._lock:
            if self._socket is None:
                self.start()
            return self._exchange(order, seconds)

    def _exchange(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._socket is not None
        try:
            messages.send(self._socket.fileno(), order)
            answer = messages.receive(self._socket.fileno(), seconds)
        except (messages.Closed, messages.TooLate) as error:
            self.stop()
            if isinstance(error, messages.TooLate):
                raise ServerGone("took too long") from error
            raise ServerEnded("ended") from error
        except BaseException:  # interrupted in the middle: the next answer would be to this question
            self.stop()
            raise
        if "user_error" in answer:
            raise UserError(str(answer["user_error"]))
        return answer

    def stop(self) -> None:
        """End the server and everything it forked."""
        if self._finalizer is not None:
            self._finalizer()
        self._pid, self._socket, self._finalizer = 0, None, None


def _end(pid: int, its_socket: socket.socket, owner: int) -> None:
    its_socket.close()
    if os.getpid() != owner:
        return
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    _zygote().ended.append(pid)
