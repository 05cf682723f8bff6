"""Processes forked warm behave as those that Python would start: arguments, surroundings, streams, exit codes, signals."""

import os
import signal
import subprocess

import pytest

from tests.warm_python import WarmProcess, warm_run


def test_arguments_surroundings_and_streams_are_its_own(tmp_path):
    code = "import os, sys; print(sys.argv, os.getcwd(), sorted(os.environ)); print('to stderr', file=sys.stderr)"
    done = warm_run("-c", code, 1, "two", env={"ONLY": "this"}, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == f"['-c', '1', 'two'] {tmp_path} ['ONLY']\n" and done.stderr == "to stderr\n"
    assert "ONLY" not in os.environ


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('a last word')", 1, "a last word"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import atexit, sys; atexit.register(lambda: print('at the end', file=sys.stderr))", 0, "at the end"),
        ("import threading, time, sys; "
         "threading.Thread(target=lambda: time.sleep(0.2) or print('waited for', file=sys.stderr)).start()", 0, "waited for"),
    ],
)  # fmt: skip
def test_it_ends_as_any_other(code, expected, words):
    done = warm_run("-c", code)
    assert done.returncode == expected and words in done.stderr


def test_it_is_killed_where_it_takes_too_long_and_when_asked():
    sleeping = WarmProcess("-c", "import time; time.sleep(1000)")
    assert sleeping.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        sleeping.wait(0.01)
    sleeping.kill()
    assert sleeping.wait(60) == sleeping.poll() == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        warm_run("-c", "import time; time.sleep(1000)", timeout=0.01)


def test_a_process_changes_nothing_of_the_next():
    warm_run("-c", "import torch, transformers; torch.set_num_threads(7); transformers.planted = True")
    done = warm_run(
        "-c", "import torch, transformers; print(torch.get_num_threads(), hasattr(transformers, 'planted'))"
    )
    assert done.stdout == "1 False\n"
