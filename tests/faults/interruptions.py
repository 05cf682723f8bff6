"""Commands that are killed, or whose disk fills, at counted points of their work; then gone on with, and compared bit by bit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rl_training.errors import UserError
from tests.faults.cases import Case
from tests.faults.undisturbed import Undisturbed, go_on, refused_in_one_line, start, wait_for

SIZES = (2_000, 3_000, 4_000, 8_000, 16_000, 30_000, 50_000, 80_000, 120_000, 200_000)  # what it says must fit
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.97)
"""Ten disks, by what a command finds free of what it writes."""
MOUNTS = "FAULTS_MAY_MOUNT"
_FULL_LINE = ("no space left", "disk is full", "file limit", "larger than this file system")
_WORDS = {"kill": "kills", "term": "SIGTERM", "full": "full disks", "torch": "full disks in torch's words"}


def point_cases(sound: Undisturbed, name: str, fault: str, count: int) -> Iterator[Case]:
    """`fault` (of tests.faults.dying) at `count` points, evenly over the command's work."""
    points = sound.of(name).points
    for point in sorted({1 + (points - 1) * k // max(count - 1, 1) for k in range(count)}):
        act = _act(sound, name, fault, FAULT=fault, FAULT_POINT=str(point))
        yield Case(f"{_WORDS[fault]} during {name}", f"at point {point} of {points}", act)


def size_cases(sound: Undisturbed, name: str) -> Iterator[Case]:
    """Files that may not grow beyond a size."""
    for size in SIZES:
        yield Case(f"file limits during {name}", f"{size:,} bytes", _act(sound, name, "size", FAULT_SIZE=str(size)))


def disk_cases(sound: Undisturbed, name: str) -> Iterator[Case]:
    """Disks of ten sizes, really full: file systems in memory, mounted where the command writes."""
    for share in SHARES:
        yield Case(f"disks too small for {name}", f"{share:.0%} of what it writes is free", _disk(sound, name, share))


def with_mounts_of_its_own() -> bool:
    """Start this process again where it may mount file systems that nobody else sees; False where the machine forbids that."""
    if os.environ.get(MOUNTS):
        return True
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        with contextlib.suppress(OSError):
            if subprocess.run([*unshare, "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True).returncode == 0:
                os.environ[MOUNTS] = "1"
                os.execvp("unshare", [*unshare, sys.executable, *sys.orig_argv[1:]])
    return False


def _disk(sound: Undisturbed, name: str, share: float) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        command, whole = sound.commands[name], sound.of(name)
        _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
        try:
            arguments = command.prepare(folder)
            free = int(share * whole.size) // 4096 * 4096
            disk = os.statvfs(folder)  # whose own count is what it must stay above
            used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            _mount("-o", f"remount,size={max(used + free, 4096)}", str(folder))
            code, said = wait_for(start(arguments))[0]
            assert code in (0, 2), (code, said[-600:])
            if code:
                refused_in_one_line(said, _FULL_LINE)
            _mount("-o", "remount,size=64m", str(folder))
            if code:
                go_on(command, arguments, 1, folder, whole)
            else:
                assert command.bits(folder) == whole.bits, "it ended well, and what it left is not whole"
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        raise UserError("as it must be")  # the end that a case of this table has

    return act


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _act(sound: Undisturbed, name: str, fault: str, **environment: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        command, whole = sound.commands[name], sound.of(name)
        arguments = command.prepare(folder)
        code, said = wait_for(start(arguments, **environment))[0]
        if fault == "kill":
            assert code == -signal.SIGKILL, (code, said)
        elif fault == "term":
            assert code in (0, 128 + signal.SIGTERM), (code, said)
        elif code:
            assert code == 2, (code, said)
            refused_in_one_line(said, _FULL_LINE)
        if code:
            go_on(command, arguments, 1, folder, whole)
        else:
            assert command.bits(folder) == whole.bits, "it ended well, and what it left is not whole"
        raise UserError("as it must be")  # the end that a case of this table has

    return act
