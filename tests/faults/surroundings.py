"""Commands in surroundings that are not as they should be, and two at once where one may be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rl_training.errors import UserError
from tests.faults.cases import Case
from tests.faults.undisturbed import PRELUDE, Undisturbed, refused_in_one_line, start, wait_for
from tests.warm_python import WarmProcess

_ENVIRONMENTS: dict[str, dict[str, str]] = {
    "no home": {"HOME": "/nowhere"}, "no folder for temporary files": {"TMPDIR": "/nowhere"},
    "a terminal of one column": {"COLUMNS": "1"}, "a hub's cache that is a device": {"HF_HOME": "/dev/null"},
    "no UTF-8": {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}, "threads that are no number": {"OMP_NUM_THREADS": "many"},
    "processes that are no number": {"WORLD_SIZE": "two"}, "a process beyond the last": {"WORLD_SIZE": "2", "RANK": "7"},
    "two processes and no meeting point": {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": ""},
    "a cache that is a device": {"ENTROPY_EXPERIMENTS_CACHE": "/dev/null"},
    "a dumb terminal": {"TERM": "dumb", "FORCE_COLOR": "1"},
}  # fmt: skip


def environment_cases(run: Path, results: Path) -> Iterator[Case]:
    """`doctor` of a run and `report` of its results in each of them, from a folder that is gone, and into a full device."""
    for what, environment in _ENVIRONMENTS.items():
        for name in ("doctor", "report"):
            yield Case("environment", f"{name}: {what}", _ended(name, run, results, environment))
    for name in ("doctor", "report"):
        yield Case("environment", f"{name}: a working folder that is gone", _ended(name, run, results, {}, gone=True))


def _ended(
    name: str, run: Path, results: Path, environment: dict[str, str], gone: bool = False
) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        where = run if name == "doctor" else Path(shutil.copytree(results, folder / "analysis"))
        here = folder / "here"
        here.mkdir()
        arguments = ["-m", "entropy_experiments", name, str(where)]
        if gone:  # before the process is there: a warm one would not find its folder
            script = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
            ran = subprocess.run(
                ["sh", "-c", script, "sh", str(here), sys.executable, *arguments], capture_output=True, text=True,
                env={**os.environ, "PYTHONPATH": os.getcwd()},
            )  # fmt: skip
            code, said = ran.returncode, ran.stderr
        else:
            ended = WarmProcess(*arguments, prelude=PRELUDE, env={**os.environ, **environment}, cwd=here)
            code, said = wait_for([ended])[0]
        assert code in (0, 1, 2) and "Traceback" not in said, (code, said[-600:])
        if code == 2:
            refused_in_one_line(said)
        raise UserError("as it must be")  # the end that a case of this table has

    return act


def concurrency_cases(sound: Undisturbed) -> Iterator[Case]:
    """The same command twice at once into one folder: one is done, the other too or refused in one line; nothing is mixed."""
    for name in ("train", "analyze", "sweep", "import", "report", "compare"):
        for number in range(2):
            yield Case("two at once", f"{name}: {number}", _twice(sound, name))


def _twice(sound: Undisturbed, name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        command, whole = sound.commands[name], sound.of(name)
        arguments = command.prepare(folder)
        ended = wait_for([*start(arguments), *start(arguments)])
        assert any(code == 0 for code, _ in ended), [said[-300:] for _, said in ended]
        for code, said in ended:
            assert code in (0, 2), (code, said[-600:])
            if code == 2:
                refused_in_one_line(said, ("in use", "exists already", "not empty", "unfinished"))
        assert command.bits(folder) == whole.bits, "two at once have left something else than one"
        raise UserError("as it must be")  # the end that a case of this table has

    return act
