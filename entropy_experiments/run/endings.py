"""How a command ends: any exception, signal or closed pipe becomes one line on stderr and an exit status.

    0     done                             130   Ctrl-C
    1     a finding (doctor, audit)        128 + n   ended by signal n (SIGTERM, SIGHUP)
    2     refused or failed                141   the reader of stdout closed the pipe

What is wrong with the input was raised as `UserError`; whatever else arrives here is a mistake of ours, and says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from entropy_experiments.run.launch_end import ending_the_launch
from entropy_experiments.text.display import visible
from rl_training.errors import UserError
from rl_training.run.disk import disk_is_full

_PACKAGES = ("entropy_core", "rl_training", "entropy_experiments")
_TORCH_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_KEPT = {
    "analyze": "what is finished is kept: go on with the same command and --resume",
    "sweep": "what is finished is kept: go on with the same command and --resume",
    "train": "checkpoints are kept: go on with the same command and --resume",
}
_DEBUG = "--debug"
_PEER_GONE = ("gloo/transport", "closed by peer", "reset by peer", "NCCL", "Broken pipe")
"""Words of communication libraries whose other end is gone."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP, so that what is open is closed before the process ends. `args[0]` is the signal's number."""


class _ForeignExit(Exception):
    """Code that is not the command line's ended the interpreter."""


@contextmanager
def terminating_signals() -> Iterator[None]:
    """Raise `Terminated` in the main thread at SIGTERM or SIGHUP, `KeyboardInterrupt` at Ctrl-C; a second signal ends the process
    at once, and so does one that comes while a module is being imported: libraries may swallow what is raised there, and go on
    with half a module.

    Where the caller ignores a signal (nohup) it stays ignored. Processes of a launch keep the system's action: they may be
    waiting inside a communication library, where no Python code runs.
    """
    if threading.current_thread() is not threading.main_thread() or os.environ.get("WORLD_SIZE", "1") != "1":
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = {
        n: signal.SIG_DFL for n in (getattr(signal, name) for name in names) if signal.getsignal(n) is signal.SIG_DFL
    }
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        taken[signal.SIGINT] = signal.default_int_handler

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, taken[number])
        ending: BaseException = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
        if _importing(frame):
            _end_at_once(*_status_and_line(ending))
        raise ending

    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end_at_once(status: int, line: str) -> None:
    os.write(2, f"{line}\n".encode())
    os._exit(status)


def run_to_the_end(app: Callable[..., Any]) -> None:
    """Run a typer application and end the process as the table above says; returns where it succeeded.

    `--debug` anywhere on the command line prints the traceback of whatever ended it.
    """
    debug = _DEBUG in sys.argv[1:]
    if debug:
        sys.argv[1:] = [word for word in sys.argv[1:] if word != _DEBUG]
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Unicode gets escapes in place of a UnicodeEncodeError.
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with terminating_signals(), ending_the_launch():
            status = _call(app)
            if status:
                raise SystemExit(status)
            sys.stdout.flush()
    except SystemExit as ending:
        if ending.code == 130:
            _end(130, _interrupted("interrupted"))
        raise
    except BaseException as error:
        with contextlib.suppress(ValueError, OSError):  # not in the main thread: then there is no Ctrl-C to fear
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if debug:
            traceback.print_exception(error, file=sys.stderr)
        _end(*_status_and_line(error))


def _call(app: Callable[..., Any]) -> int:
    try:
        status = app(standalone_mode=False)
        return status if isinstance(status, int) else 0
    except SystemExit as ending:
        where = _frame_of(ending, ours=False)
        if where is not None and where[0] in ("typer", "rich"):  # a closed pipe
            raise BrokenPipeError(errno.EPIPE, "closed") from ending
        raise _ForeignExit(f"sys.exit({ending.code!r}) was called{_at(where)}") from ending


def _status_and_line(error: BaseException) -> tuple[int, str]:
    """Exit status, and one line: what is wrong, where, how to mend it."""
    if isinstance(error, KeyboardInterrupt):
        return 130, _interrupted("interrupted")
    if isinstance(error, Terminated):
        number = int(error.args[0])
        return 128 + number, _interrupted(f"ended by {signal.Signals(number).name}")
    if isinstance(error, BrokenPipeError):
        return 141, ""
    if hasattr(error, "format_message"):  # of the command line's library: an unknown option, a missing argument
        context = getattr(error, "ctx", None)
        command = getattr(context, "command_path", "entropy-experiments")
        return 2, f"error: {error.format_message().rstrip('.')}: see `{command} --help`"
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, _ForeignExit):
        return 2, f"error: {error}, outside this project: remove that call; --debug shows the way there"
    text = (str(error).splitlines() or [""])[0]
    if disk_is_full(error):
        path = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return 2, f"error: the disk is full, or a file limit was reached{path}: free space; {_kept_words()}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _TORCH_MEMORY):
        return 2, (
            f"error: out of memory{_at(_frame_of(error))}: lower entropy_analysis.fisher_kernel.token_batch_size "
            "(optimizer.micro_batch_size in training), or take fewer sequences"
        )
    if isinstance(error, RuntimeError) and _of_several() and any(words in str(error) for words in _PEER_GONE):
        reason = re.sub(r"^\[[^]]*\]\s*", "", text)[:200].rstrip(". ")
        return 2, (
            f"error: another process of this run died or was stopped ({reason}): the others' own output says why; {_kept_words()}"
        )
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text
        return 2, f"error: {what or type(error).__name__}: check that the path exists and its permissions"
    return 2, (
        f"error: this is our mistake: {type(error).__name__}: {text[:300]}{_at(_frame_of(error))}: run again with {_DEBUG} "
        "for the traceback, and report it"
    )


def _frame_of(error: BaseException, ours: bool = True) -> tuple[str, str, int] | None:
    """(top package, path below it, line) of the innermost frame: in this project's code where `ours`."""
    found = None
    for frame in traceback.extract_tb(error.__traceback__):
        parts = Path(frame.filename).parts
        top = max((k for k, part in enumerate(parts) if part in (*_PACKAGES, "site-packages")), default=None)
        if top is None or parts[top] == "site-packages":
            named = (parts[top + 1] if top is not None and top + 1 < len(parts) else "", frame.filename)
            place = (*named, frame.lineno or 0)
            found = found if ours else place
        else:
            found = (parts[top], "/".join(parts[top:]), frame.lineno or 0)
    return found


def _at(place: tuple[str, str, int] | None) -> str:
    return "" if place is None else f" ({place[1]}, line {place[2]})"


def _of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _kept_words() -> str:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    return _KEPT.get(command, "then run the same command again")


def _interrupted(what: str) -> str:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    return f"{what}; {_KEPT[command]}" if command in _KEPT else what


def _end(status: int, line: str) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if status == 141:  # the interpreter flushes stdout once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        with contextlib.suppress(OSError):
            print(visible(" ".join(line.split())), file=sys.stderr, flush=True)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(status)  # others of the launch may be gone: a process group would wait for them
    sys.exit(status)
