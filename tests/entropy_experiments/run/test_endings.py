"""Whatever ends a command is one line on stderr and an exit status."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from entropy_experiments import cli
from entropy_experiments.run.endings import _status_and_line, run_to_the_end
from rl_training.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]


def ended(monkeypatch, capsys, error: BaseException, *words: str) -> tuple[int, str]:
    """(exit status, stderr) of a command that raises `error`."""

    def app(**options):
        raise error

    monkeypatch.setattr(sys, "argv", ["entropy-experiments", *words])
    with pytest.raises(SystemExit) as ending:
        run_to_the_end(app)
    return int(str(ending.value.code)), capsys.readouterr().err


MISTAKES = {
    "a user's": (UserError("no folder\nthere"), "error: no folder there"),
    "ours": (KeyError("x"), "error: this is our mistake: KeyError: 'x'"),
    "ours, without words": (AssertionError(), "error: this is our mistake: AssertionError"),
    "too deep": (RecursionError("maximum recursion depth exceeded"), "error: this is our mistake: RecursionError"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "error: the disk is full"),
    "a full disk, said by torch": (RuntimeError("PytorchStreamWriter failed writing file data/0"), "error: the disk is full"),
    "no memory": (MemoryError(), "error: out of memory"),
    "no memory, said by torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "error: out of memory"),
    "permissions": (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "error: /x/y: Permission denied"),
    "foreign exit": (SystemExit(0), "error: sys.exit(0) was called"),
    "escapes of a terminal": (UserError("\x1b[2Jgone"), "error: ⟨U+001B⟩[2Jgone"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(monkeypatch, capsys, kind):
    error, words = MISTAKES[kind]
    status, printed = ended(monkeypatch, capsys, error)
    assert status == 2
    assert printed.startswith(words) and printed.count("\n") == 1, printed


def test_a_mistake_of_ours_names_the_place_and_the_way_to_its_traceback(monkeypatch, capsys):
    def app(**options):
        return cli._print_json({"x": object()})

    monkeypatch.setattr(sys, "argv", ["entropy-experiments", "report"])
    with pytest.raises(SystemExit):
        run_to_the_end(app)
    printed = capsys.readouterr().err
    assert "TypeError" in printed and "entropy_experiments/cli.py, line" in printed and "--debug" in printed


def test_debug_prints_the_traceback_and_is_no_argument_of_the_command(monkeypatch, capsys):
    status, printed = ended(monkeypatch, capsys, UserError("wrong"), "report", "--debug", "x")
    assert status == 2 and "Traceback" in printed and printed.endswith("error: wrong\n")
    assert sys.argv[1:] == ["report", "x"]


def test_an_interrupted_command_says_what_is_kept(monkeypatch, capsys):
    status, printed = ended(monkeypatch, capsys, KeyboardInterrupt(), "analyze")
    assert (status, printed.count("\n")) == (130, 1) and "--resume" in printed


@pytest.mark.parametrize(
    "words",
    [["analyse"], ["analyze"], ["analyze", "x", "--nope"], ["sweep", "--shard"], ["explore", "x", "--port", "y"]],
)
def test_a_mistyped_command_is_one_line(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["entropy-experiments", *words])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    printed = capsys.readouterr().err
    assert ending.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1, printed
    assert "--help" in printed


WAITS = """
import sys, time
from entropy_experiments import cli
def command(**options):
    try:
        print("ready", flush=True)
        time.sleep(600)
    finally:
        print("closed", flush=True)
cli.app = command
sys.argv = ["entropy-experiments", "analyze"]
cli.main()
"""


SIGNALS = pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)


def ended_by(number: int, script: str) -> tuple[int, str, str]:
    """(exit status, rest of stdout, stderr) of a script that gets a signal once it has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "1"},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@SIGNALS
def test_a_signal_closes_what_is_open_and_ends_in_one_line(number, status):
    code, out, err = ended_by(number, WAITS)
    assert (code, out) == (status, "closed\n"), err
    assert err.count("\n") == 1 and "--resume" in err, err


SLOW_IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "entropy_experiments.cli":
            print("ready", flush=True)
            time.sleep(600)
sys.meta_path.insert(0, Slow())
from entropy_experiments.__main__ import main
main()
"""


@SIGNALS
def test_a_signal_during_imports_ends_in_one_line(number, status):
    code, _, err = ended_by(number, SLOW_IMPORT)
    assert code == status and err.count("\n") == 1 and err.startswith(("interrupted", "ended by")), err


def test_a_working_folder_that_is_gone_is_one_line(tmp_path):
    script = 'mkdir "$1" && cd "$1" && rmdir "$1" && shift && exec "$@"'
    arguments = [sys.executable, "-m", "entropy_experiments", "doctor", "/tmp"]
    done = subprocess.run(
        ["sh", "-c", script, "sh", str(tmp_path / "gone"), *arguments], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: the working folder is gone: change to one that exists\n")


SWALLOWING_IMPORT = """
import sys, time
from entropy_experiments import cli
class Swallowing:
    def find_spec(self, name, path=None, target=None):
        if name == "half_a_module":
            try:
                print("ready", flush=True)
                time.sleep(600)
            except BaseException:
                pass
sys.meta_path.insert(0, Swallowing())
def command(**options):
    import half_a_module
cli.app = command
sys.argv = ["entropy-experiments", "analyze"]
cli.main()
"""


@SIGNALS
def test_a_signal_during_an_import_of_a_command_is_not_swallowed(number, status):
    """Libraries catch whatever is raised while they try their optional parts, and go on with half a module."""
    code, _, err = ended_by(number, SWALLOWING_IMPORT)
    assert code == status and err.count("\n") == 1 and "--resume" in err, err


def test_a_closed_pipe_is_no_error():
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    script = (
        "from entropy_experiments import cli\n"
        "def endless(**options):\n    for _ in range(100000): print('x' * 100)\n"
        "cli.app = endless\ncli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


def test_a_terminal_without_unicode_gets_escapes():
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii:strict"}
    script = (
        "from entropy_experiments import cli\n"
        "def prints(**options):\n    print('δ'); cli._print_json({'a': 'é'})\n"
        "cli.app = prints\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b'\\u03b4\n{"a": "\\u00e9"}\n'


_GLOO = "[/x/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is typically a firewall"


@pytest.mark.parametrize(
    ("size", "words"), [("2", "another process of this run died or was stopped"), ("1", "our mistake")]
)
def test_where_another_process_of_a_training_dies_that_is_said(monkeypatch, size: str, words: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr(sys, "argv", ["entropy-experiments", "train", "x.yaml"])
    status, line = _status_and_line(RuntimeError(_GLOO))
    assert status == 2 and words in line
    if size == "2":
        assert "/x/gloo" not in line and "checkpoints are kept: go on with the same command and --resume" in line
    assert "our mistake" in _status_and_line(RuntimeError("a shape"))[1]
