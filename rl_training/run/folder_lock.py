"""One run in one output folder at a time: a `flock` on a small file that says who holds it.

A process that ends, however it ends, lets go of its lock, so that no stale one is left; the file's content is for people. Where
the file system has no locks, the process that the file names is looked for on this machine.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from rl_training.errors import UserError
from rl_training.files import refuse_link
from rl_training.run.launched import is_first

LOCK_NAME = ".lock"


@contextlib.contextmanager
def locked(path: Path, what: str, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for the time of the block; it is removed afterwards.

    what: what is locked, in the words of the refusal ("runs/mine"). shared: others may share it, who say so too.

    Raises UserError, naming the process, where another one holds it; where it is a link, or cannot be written.
    """
    descriptor = _take(path, what, shared)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _alone(descriptor, shared):
                path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def run_folder_locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which is made for it and removed again where nothing was written.

    Of several processes of one launch (RANK in the environment) the first holds it for all.
    """
    if not is_first():
        yield
        return
    there = folder.exists()
    try:
        with locked(folder / LOCK_NAME, str(folder)):
            yield
    finally:
        if not there and folder.is_dir() and not holds_something(folder):
            with contextlib.suppress(OSError):
                folder.rmdir()


def in_use_by(folder: Path) -> str | None:
    """Who is writing into a run's folder, in words; None where nobody is, as far as can be told from here."""
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _who(_holder(path))
    except OSError:  # no locks on this file system: go by the content
        holder = _holder(path)
        return _who(holder) if holder is not None and _lives(holder) else None
    finally:
        os.close(descriptor)
    return None


def holds_something(folder: Path) -> bool:
    """Whether anything but a lock lies in the folder."""
    return folder.is_dir() and any(path.name != LOCK_NAME for path in folder.iterdir())


def _take(path: Path, what: str, shared: bool) -> int:
    refuse_link(path)
    while True:
        descriptor = _open(path)
        try:
            mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            os.close(descriptor)
            raise UserError(_refusal(what, holder)) from None
        except OSError:  # no locks on this file system: go by the content
            holder = _holder(path)
            if holder is not None and _lives(holder) and not shared:
                os.close(descriptor)
                raise UserError(_refusal(what, holder)) from None
        if _is_still(path, descriptor):  # whoever held it may have removed it in between
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    content = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.pwrite(descriptor, (json.dumps(content) + "\n").encode(), 0)
    return descriptor


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            refuse_link(path)
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another output folder") from error


def _holder(path: Path) -> dict[str, object] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else None


def _refusal(what: str, holder: dict[str, object] | None) -> str:
    return f"{what} is in use by {_who(holder)}: wait for it to end, or choose another output folder"


def _who(holder: dict[str, object] | None) -> str:
    if holder is None:
        return "another process"
    since = f" since {holder['since']}" if "since" in holder else ""
    return f"process {holder['pid']} on {holder.get('host')}{since}"


def _lives(holder: dict[str, object]) -> bool:
    if holder.get("host") != socket.gethostname() or holder["pid"] == os.getpid():
        return holder.get("host") != socket.gethostname()
    try:
        os.kill(int(str(holder["pid"])), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        here, there = os.fstat(descriptor), os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _alone(descriptor: int, shared: bool) -> bool:
    """Whether no other process shares the lock: then its file can go."""
    if not shared:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
