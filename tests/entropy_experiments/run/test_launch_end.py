"""A process of a launch that has done its work ends with code 0, whatever would go wrong while Python is taken apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]

SCRIPT = """
import atexit, os, sys
from entropy_experiments import cli
from rl_training.errors import ShareDone, UserError

class AbortsLate:  # what a thread of a communication library does now and then
    def __del__(self):
        os.abort()

def command(**options):
    atexit.register(print, "a library's exit function")
    print("done", end="")
    {ending}

{hazard}
cli.app = command
cli.main()
"""


HAZARD = 'sys.modules["late"] = AbortsLate()'


def ends(ending: str, processes: str, hazard: str = HAZARD) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": processes, "PYTHONUNBUFFERED": ""}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(ending=ending, hazard=hazard)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


@pytest.mark.parametrize("ending", ["return 0", "return", "raise ShareDone()"])
def test_success_survives_the_teardown(ending):
    done = ends(ending, "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "donea library's exit function\n", "exit functions run, and what was printed is flushed"


def test_alone_a_process_ends_as_any_other():
    assert ends("return 0", "1").returncode == -6, "the hazard of this test is real"


@pytest.mark.parametrize(
    ("ending", "code"), [("return 3", 3), ("raise UserError('wrong')", 2), ("raise OSError('disk')", 2)]
)
def test_failure_is_not_taken_for_success(ending, code):
    assert ends(ending, "2", hazard="").returncode == code
