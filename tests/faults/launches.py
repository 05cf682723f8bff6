"""Commands in one, two and three processes, one of which is killed at a random moment, or whose launcher is; then gone on with.

A moment is a share of the processor time that a process of the command takes undisturbed, drawn from a generator whose seed
is the case's name: other work on the machine moves nothing. Nothing is asked of the moment: a case where everything had ended
already is a case too. Processes without a launcher are forked from a warm server; a launcher is `torch.distributed.run`, with
interpreters of its own, and so are commands that get a signal, imports included.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from rl_training.errors import UserError
from tests.faults.cases import Case
from tests.faults.undisturbed import Undisturbed, go_on, refused_in_one_line, start, wait_for

_LONG = 1400.0
_ENDINGS = (0, 2, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
_STARTS = 7.0
"""Processor seconds in which an interpreter imports what a warm process has; moments are shares of these and the command's."""
_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def kill_cases(sound: Undisturbed, name: str, count: int, kills: int) -> Iterator[Case]:
    """`kills` random moments, each of one random process of `count`."""
    for number in range(kills):
        chance = random.Random(f"{name} {count} {number}")
        victim, share = chance.randrange(count), chance.random()
        yield Case(
            f"kills of {name} at random moments, {count} process{'es' * (count > 1)}",
            f"{number}: process {victim} after {share:.3f} of its time",
            _killed(sound, name, count, victim, share),
        )


def launcher_cases(sound: Undisturbed, name: str, count: int, kills: int) -> Iterator[Case]:
    """The launcher of `count` processes is killed."""
    for number in range(kills):
        share = random.Random(f"launcher {name} {count} {number}").random()
        act = _launched(sound, name, count, share)
        yield Case(f"launchers of {name} killed, {count} processes", f"{number}: after {share:.3f} of its time", act)


def signal_cases(sound: Undisturbed, name: str, count: int) -> Iterator[Case]:
    """`count` random moments of a whole interpreter, its imports included, at which Ctrl-C, SIGTERM or SIGHUP comes."""
    for number in range(count):
        share, wanted = random.Random(f"signal {name} {number}").random(), list(_SIGNALS)[number % len(_SIGNALS)]
        yield Case(
            f"signals during {name}", f"{number}: {wanted.name} after {share:.3f} of its time",
            _signalled(sound, name, wanted, share),
        )  # fmt: skip


def _killed(sound: Undisturbed, name: str, count: int, victim: int, share: float) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        command, whole = sound.commands[name], sound.of(name, count)
        arguments = command.prepare(folder)
        processes = start(arguments, count)
        _wait_until(processes[victim].pid, share * whole.seconds)
        processes[victim].kill()
        for rank, (code, said) in enumerate(wait_for(processes)):
            assert code in _ENDINGS, (rank, code, said[-600:])
            assert "Traceback" not in said, (rank, said[-600:])
            if code == 2:
                refused_in_one_line(said)
        go_on(command, arguments, count, folder, whole)
        raise UserError("as it must be")  # the end that a case of this table has

    return act


def _launched(sound: Undisturbed, name: str, count: int, share: float) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        command, whole = sound.commands[name], sound.of(name, count)
        arguments = command.prepare(folder)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        with open(folder / "said", "wb") as said:
            launcher = subprocess.Popen(
                [*launch, "-m", "entropy_experiments", *arguments], stdout=said, stderr=said, start_new_session=True
            )
            while len(_children(launcher.pid)) < count and launcher.poll() is None:
                time.sleep(0.05)
            children = _children(launcher.pid)
            if children:
                _wait_until(children[0].pid, share * (_STARTS + whole.seconds))
            children = _children(launcher.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(launcher.pid, signal.SIGKILL)
            launcher.wait()
        _, alive = psutil.wait_procs(children, timeout=_LONG)  # they are orphans now, and end by themselves
        for process in alive:
            process.kill()
        assert not alive, "processes whose launcher was killed did not end"
        go_on(command, arguments, count, folder, whole)
        raise UserError("as it must be")  # the end that a case of this table has

    return act


def _signalled(sound: Undisturbed, name: str, number: signal.Signals, share: float) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        command, whole = sound.commands[name], sound.of(name)
        arguments = command.prepare(folder)
        with open(folder / "said", "wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "entropy_experiments", *arguments], stdout=subprocess.DEVNULL, stderr=said,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
            )  # fmt: skip
            _wait_until(process.pid, 0.15 + share * (_STARTS + whole.seconds))  # Python itself starts in the former
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
            code = process.wait(_LONG)
        lines = [line for line in (folder / "said").read_text(errors="replace").splitlines() if line.strip()]
        (folder / "said").unlink()
        assert code in (0, _SIGNALS[number]), (code, lines[-5:])
        if code:
            assert lines and lines[-1].startswith(("interrupted", "ended by")), lines[-3:]
            assert not any("Traceback" in line or "Error" in line for line in lines), lines
        go_on(command, arguments, 1, folder, whole)
        raise UserError("as it must be")  # the end that a case of this table has

    return act


def _wait_until(pid: int, seconds: float) -> None:
    """Until a process has used so many seconds of a processor, or has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE and sum(process.cpu_times()[:2]) < seconds:
            time.sleep(0.01)


def _children(parent: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(parent).children(recursive=True)
    return []
