"""A reward function of one's own in a child process, so that a call can be stopped at a limit
(`task.reward_process: true`).

The child imports the function once and answers call after call; where one takes too long or too
much memory the child is killed, and the next call starts another. It is a limit and no sandbox: the
function is the user's, and may do what it likes.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from rl_training.tasks.sandbox.scoring import RewardLimits

# Importing a module may load a model library, and reading the first call's arguments another (the
# trainer's state is of transformers): no limit of a call should count that.
SECONDS_TO_START = 300.0
# Beyond the limit, until a call is ended whose caller is no longer there to do it.
_GRACE_SECONDS = 5.0
_CHILD = "import sys; sys.path[:] = eval(sys.argv[2]); from rl_training.tasks.reward_process import answer; answer(sys.argv[1])"


class RewardProcess:
    """Calls `path` as TRL does, from any thread, one call at a time.

    Raises TimeoutError and MemoryError at the limits, RuntimeError with the child's own words for
    what the function raised or where it ended its process.

    Args:
        limits: seconds and memory of one call.
    """

    def __init__(self, path: str, limits: RewardLimits) -> None:
        self._path, self._limits = path, limits
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_extra: Any = None,
        log_metric: Any = None,
        **rest: Any,
    ) -> Any:
        with self._lock:
            line = self._line if self._line is not None else self._start()
            try:
                line.send({"prompts": list(prompts), "completions": list(completions), **rest})
                self._receive(line, SECONDS_TO_START)  # it has read them, whatever it had to import for that
                kind, value, logged = self._receive(line, self._limits.seconds)
            except BaseException:
                self.close()
                raise
        for name, arguments in logged:
            log = {"log_extra": log_extra, "log_metric": log_metric}[name]
            if log is not None:
                log(*arguments)
        if kind == "memory":
            raise MemoryError(f"more than {self._limits.memory:,} bytes beside what it takes when loaded")
        if kind == "error":
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """Kill the child, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        if self._line is not None:
            self._line.close()
        self._child = self._line = None

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        command = [sys.executable, "-c", _CHILD, str(theirs.fileno()), repr(sys.path)]
        self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._line = ours
        ours.send((self._path, int(self._limits.memory), float(self._limits.seconds)))
        kind, value, _ = self._receive(ours, SECONDS_TO_START)
        if kind == "error":
            self.close()
            raise RuntimeError(value)
        return ours

    def _receive(self, line: Connection, seconds: float) -> tuple[str, Any, list[tuple[str, tuple]]]:
        if not line.poll(seconds):
            raise TimeoutError(f"took longer than {seconds:g} s")
        try:
            return line.recv()
        except EOFError:
            status = None if self._child is None else self._child.wait()
            raise RuntimeError(f"ended its process (status {status})") from None


def answer(descriptor: str) -> None:
    """The child's side."""
    import resource  # of Unix alone

    from rl_training.tasks.own_rewards import find_reward

    line = Connection(int(descriptor))
    path, memory, seconds = line.recv()
    try:
        function = find_reward(path)
    except Exception as error:
        line.send(("error", str(error), []))
        return
    statm = Path("/proc/self/statm")
    if statm.exists():  # address space, in pages, is what the system can limit
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    line.send(("ready", None, []))
    while True:
        try:
            keywords = line.recv()
        except EOFError:  # the parent has gone
            return
        line.send(("called", None, []))
        # By the kernel, whatever the function holds: its caller may have been killed.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)
        found = _called(function, keywords)
        signal.setitimer(signal.ITIMER_REAL, 0)
        line.send(found)


def _called(function: Any, keywords: dict[str, Any]) -> tuple[str, Any, list[tuple[str, tuple]]]:
    """What kind of end the call came to, its result or words, and what it logged."""
    logged: list[tuple[str, tuple]] = []
    logs = {name: functools.partial(_log, logged, name) for name in ("log_extra", "log_metric")}
    try:
        value = function(**keywords, **logs)
        return "value", asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value, logged
    except MemoryError:
        return "memory", None, []
    except Exception as error:
        return "error", f"raised {' '.join(repr(error).split())[:200]}", logged


def _log(logged: list[tuple[str, tuple]], name: str, *arguments: Any) -> None:
    logged.append((name, arguments))


async def _awaited(value: Any) -> Any:
    return await value
