"""Commands in one, two and three processes, one of which is killed at a random moment, or whose launcher is; then gone on with.

A moment is a share of the time that the command takes undisturbed, drawn from a generator whose seed is the case's name. Nothing
is asked of the moment: a case where everything had ended already is a case too. Processes without a launcher are forked from a
warm server; a launcher is `torch.distributed.run`, with interpreters of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rl_training.errors import UserError
from tests.faults.cases import Case
from tests.faults.interruptions import PRELUDE, Command
from tests.warm_python import WarmProcess

_LONG = 1400.0
_ENDINGS = (0, 2, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)


class Launches:
    """Cases of `count` processes of a command."""

    def __init__(self, found: Mapping[str, Command], scratch: Path) -> None:
        self._commands, self._scratch = found, scratch
        self._expected: dict[tuple[str, int], tuple[float, Mapping[str, Any]]] = {}

    def _undisturbed(self, command: Command, count: int) -> tuple[float, Mapping[str, Any]]:
        key = (command.name, count)
        if key not in self._expected:
            folder = self._scratch / f"{command.name}-{count}"
            folder.mkdir()
            arguments, started = command.prepare(folder), time.monotonic()
            ended = _ended(_started(arguments, count))
            assert all(code == 0 for code, _ in ended), ended
            self._expected[key] = (time.monotonic() - started, command.bits(folder))
        return self._expected[key]

    def cases(self, name: str, count: int, kills: int) -> Iterator[Case]:
        """`kills` random moments, each of one random process of `count`."""
        for number in range(kills):
            chance = random.Random(f"{name} {count} {number}")
            victim, share = chance.randrange(count), chance.random()
            act = self._act(self._commands[name], count, victim, share)
            yield Case(
                f"kills of {name}, {count} process{'es' * (count > 1)}",
                f"{number}: process {victim} after {share:.3f} of its time",
                act,
            )

    def launcher_cases(self, name: str, count: int, kills: int) -> Iterator[Case]:
        """The launcher of `count` processes is killed."""
        for number in range(kills):
            share = random.Random(f"launcher {name} {count} {number}").random()
            act = self._launched(self._commands[name], count, share)
            yield Case(f"launchers of {name}, {count} processes", f"{number}: after {share:.3f} of its time", act)

    def _act(self, command: Command, count: int, victim: int, share: float) -> Callable[[Path], None]:
        def act(folder: Path) -> None:
            duration, expected = self._undisturbed(command, count)
            arguments = command.prepare(folder)
            processes = _started(arguments, count)
            time.sleep(share * duration)
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[victim].pid, signal.SIGKILL)
            for rank, (code, said) in enumerate(_ended(processes)):
                assert code in _ENDINGS, (rank, code, said[-600:])
                assert "Traceback" not in said, (rank, said[-600:])
                if code == 2:
                    assert sum(line.startswith("error:") for line in said.splitlines()) == 1, said[-600:]
                    assert "our mistake" not in said, said[-600:]
            self._gone_on_with(command, arguments, count, folder, expected)

        return act

    def _launched(self, command: Command, count: int, share: float) -> Callable[[Path], None]:
        def act(folder: Path) -> None:
            duration, expected = self._undisturbed(command, count)
            arguments = command.prepare(folder)
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            started = time.monotonic()
            with open(folder / "said", "wb") as said:
                launcher = subprocess.Popen(
                    [*launch, "-m", "entropy_experiments", *arguments], stdout=said, stderr=said, start_new_session=True
                )
                while not _children(launcher.pid) and launcher.poll() is None:
                    time.sleep(0.1)
                time.sleep(share * (duration + time.monotonic() - started))
                children = _children(launcher.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(launcher.pid, signal.SIGKILL)
                launcher.wait()
            _wait_for(children)  # they are orphans now, and end by themselves
            self._gone_on_with(command, arguments, count, folder, expected)

        return act

    def _gone_on_with(
        self, command: Command, arguments: list[str], count: int, folder: Path, expected: Mapping[str, Any]
    ) -> None:
        ended = _ended(_started([*arguments, *command.again], count))
        # Where it was whole already, that is said, and the bits tell.
        whole = all(code == 0 or (code == 2 and "exists already" in said) for code, said in ended)
        assert whole, [(code, said[-500:]) for code, said in ended]
        found = command.bits(folder)
        different = [key for key in expected if found.get(key) != expected[key]]
        assert not different, f"after going on, {different[:3]} differ"
        raise UserError("as it must be")  # the end that a case of this table has


def _started(arguments: list[str], count: int) -> list[WarmProcess]:
    group: dict[str, str] = {}
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        WarmProcess(
            "-m", "entropy_experiments", *arguments, prelude=PRELUDE,
            env={**os.environ, **group, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if group else {})},
        )
        for rank in range(count)
    ]  # fmt: skip


def _ended(processes: list[WarmProcess]) -> list[tuple[int, str]]:
    """(exit code, what was said on stderr) of each."""
    try:
        return [(process.wait(_LONG), process.communicate(_LONG)[1]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def _children(parent: int) -> list[int]:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(parent).children(recursive=True)]
    return []


def _wait_for(children: list[int]) -> None:
    import psutil

    alive = [psutil.Process(pid) for pid in children if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(alive, timeout=_LONG)
    for process in alive:
        process.kill()
    assert not alive, "processes whose launcher was killed did not end"
